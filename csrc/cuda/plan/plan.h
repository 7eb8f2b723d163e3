// A plan says how a launch computes an op: by which kernel, with what tile, grid and workspace. For each op there are
//
//   plan(op, device)    the plan that is taken, or none where no kernel can compute the op
//   plans(op, device)   every plan that could be taken; their results are the same, of dense_router but for rounding
//   name(op, plan)      the kernel as it is instantiated, and what else was chosen, but nothing that follows from
//   sizes:
//                       a name has one plan at a size, and means the same at all sizes
//   needs(plan)         what the plan asks of the device
//   instances(op, device)  every kernel that is compiled, for any op of the type: the names up to their comma
//
// Sizes, options and the alignment of pointers decide, never what they point to. To be included as "plan/plan.h", which
// has the plans of all ops.
#pragma once

#include "activation_topk.h"
#include "combine.h"
#include "combine_cotangent.h"
#include "dense_router.h"
#include "expert_counts.h"
#include "expert_dispatch.h"
#include "hash_router.h"
#include "permute.h"
#include "permute_cotangent.h"
#include "route_at.h"
#include "route_cotangent.h"
#include "routed_gradients.h"
#include "topk_select.h"
