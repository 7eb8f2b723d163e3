// From XLA's call frames to the structs of common/ops.h, the same for CPU and CUDA: for each op the name of its target,
// and a function that reads what the target is called with. That function is all there is to say of a target: call.h
// makes a declaration of it, which the native modules export and Python compares with its own. Attribute names are the
// parameter names of the Python primitives.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <tuple>

#include "../common/ops.h"
#include "call.h"

namespace jax_router {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();

constexpr Choice<ScoreFn> kScoreFns[] = {
    {"sqrtsoftplus", ScoreFn::kSqrtSoftplus},
    {"sigmoid", ScoreFn::kSigmoid},
    {"softmax", ScoreFn::kSoftmax},
    {"identity", ScoreFn::kIdentity},
};
constexpr Choice<GroupScore> kGroupScores[] = {{"top2_sum", GroupScore::kTop2Sum}, {"max", GroupScore::kMax}};

inline Scoring read_scoring(Call& call, bool with_identity = false) {
  Scoring scoring;
  scoring.score_fn = call.choice("score_fn", kScoreFns, std::size(kScoreFns) - (with_identity ? 0 : 1));
  scoring.renormalize = call.flag("renormalize");
  scoring.scale = call.number("scale");
  scoring.eps = call.number("eps");
  return scoring;
}

inline Groups read_groups(Call& call, int32_t experts) {
  Groups groups;
  groups.score = call.choice("group_score", kGroupScores);
  groups.num_groups = call.integer<int32_t>("num_groups", {1, experts, " (the experts)"});
  const bool one_each = groups.num_groups > 1 && groups.num_groups == experts;
  if (experts % groups.num_groups != 0 || (one_each && groups.score == GroupScore::kTop2Sum)) {
    call.must_be("num_groups",
                 "1 or a divisor of the " + std::to_string(experts) + " experts that leaves " +
                     (groups.score == GroupScore::kTop2Sum ? "two" : "one") + " or more to a group",
                 std::to_string(groups.num_groups));
  }
  groups.top_groups = call.integer<int32_t>("top_groups", {1, groups.num_groups, " (num_groups)"});
  return groups;
}

template <typename Op>
struct Target;

template <>
struct Target<HashRouter> {
  static constexpr const char* kName = "hash_router";

  static void read(Call& call, HashRouter& op) {
    const Argument token_ids = call.operand("token_ids");
    const Argument hash_lut = call.operand("hash_lut");
    const Argument weights = call.result("weights");
    op.rows = token_ids.rows(0);
    op.k = weights.size<int32_t>(0, {1, kMaxTopK});
    op.token_ids = token_ids.numbers<int32_t>(op.rows, {});
    op.vocab_size = hash_lut.table<int64_t>(wire<int32_t>(), op.k, {0, kMaxInt64});
    op.hash_lut = static_cast<const int32_t*>(hash_lut.data());
    op.scale = call.number("scale");
    op.weights = weights.numbers<float>(op.rows, {op.k});
    op.expert_ids = call.result("expert_ids").numbers<int32_t>(op.rows, {op.k});
  }
};

// The first operand of the ops that route by logits.
template <typename Op>
void read_logits(Call& call, Op& op, int32_t& experts, const Range& range) {
  const Argument logits = call.operand("logits");
  op.rows = logits.rows(1);
  experts = logits.size<int32_t>(0, range);
  op.dtype = logits.float_dtype();
  op.logits = logits.data();
}

// Everything of an ActivationTopk behind its logits.
inline void read_selection(Call& call, ActivationTopk& op) {
  Selection& selection = op.selection;
  selection.groups = read_groups(call, selection.experts);
  const int64_t eligible = int64_t{selection.experts} / selection.groups.num_groups * selection.groups.top_groups;
  selection.k = call.integer<int32_t>("top_k", {1, std::min<int64_t>(eligible, kMaxTopK)});
  selection.scoring = read_scoring(call);
  const Argument bias = call.optional_operand("bias");
  const bool shared = bias.is_one_row_of(selection.experts);
  op.bias = bias.numbers<float>(shared ? 1 : op.rows, {selection.experts});
  op.bias_stride = shared ? 0 : selection.experts;
  op.token_mask = call.optional_operand("token_mask").numbers<uint8_t>(op.rows, {});
  op.weights = call.result("weights").numbers<float>(op.rows, {selection.k});
  op.expert_ids = call.result("expert_ids").numbers<int32_t>(op.rows, {selection.k});
}

inline void read_chosen_logits(Call& call, ActivationTopk& op) {
  op.chosen_logits = call.optional_result("chosen_logits").numbers<float>(op.rows, {op.selection.k});
}

// A kernel that has not enough of it has no plan.
inline Workspace read_workspace(const Argument& workspace) {
  return {workspace.memory(ffi::DataType::U8), workspace.elements()};
}

template <>
struct Target<ActivationTopk> {
  static constexpr const char* kName = "activation_topk";

  static void read(Call& call, ActivationTopk& op) {
    read_logits(call, op, op.selection.experts, {1, kMaxExperts});
    read_selection(call, op);
    read_chosen_logits(call, op);
  }
};

template <>
struct Target<DenseRouter> {
  static constexpr const char* kName = "dense_router";

  static void read(Call& call, DenseRouter& op) {
    const Argument x = call.operand("x");
    const Argument weight = call.operand("weight");
    op.operand_dtype = x.float_dtype();
    op.weight_dtype = weight.float_dtype() == DType::kF32 ? DType::kF32 : op.operand_dtype;
    op.hidden = x.size<int32_t>(0, {1, kMaxInt32});
    op.x = x.data();
    op.weight = weight.data();
    op.select.rows = x.rows(1);
    op.select.selection.experts = weight.table<int32_t>(wire(op.weight_dtype), op.hidden, {1, kMaxExperts});
    op.select.dtype = DType::kF32;
    op.select.logits = nullptr;
    op.logit_bias = call.optional_operand("logit_bias").numbers<float>(1, {op.select.selection.experts});
    read_selection(call, op.select);
    op.workspace = read_workspace(call.result("workspace"));
    read_chosen_logits(call, op.select);
  }
};

// Everything of a RouteAt behind its ids; `weights` is its first result.
inline void read_weighing(Call& call, const Argument& weights, RouteAt& op) {
  op.scoring = read_scoring(call);
  op.weights = weights.numbers<float>(op.rows, {op.k});
  op.valid_ids = call.result("expert_ids").numbers<int32_t>(op.rows, {op.k});
  op.chosen_logits = call.optional_result("chosen_logits").numbers<float>(op.rows, {op.k});
}

template <>
struct Target<RouteAt> {
  static constexpr const char* kName = "route_at";

  static void read(Call& call, RouteAt& op) {
    read_logits(call, op, op.experts, {0, kMaxExperts});
    const Argument expert_ids = call.operand("expert_ids");
    op.k = expert_ids.size<int32_t>(0, {0, kMaxTopK});
    op.expert_ids = expert_ids.numbers<int32_t>(op.rows, {op.k});
    read_weighing(call, call.result("weights"), op);
    if (op.k == 0) op.rows = 0;  // nothing to compute, however many rows there are
  }
};

template <>
struct Target<ScoredHashRouter> {
  static constexpr const char* kName = "scored_hash_router";

  static void read(Call& call, ScoredHashRouter& op) {
    read_logits(call, op, op.experts, {0, kMaxExperts});
    op.token_ids = call.operand("token_ids").numbers<int32_t>(op.rows, {});
    const Argument hash_lut = call.operand("hash_lut");
    const Argument weights = call.result("weights");
    op.k = weights.size<int32_t>(0, {1, kMaxTopK});
    op.vocab_size = hash_lut.table<int64_t>(wire<int32_t>(), op.k, {0, kMaxInt64});
    op.expert_ids = static_cast<const int32_t*>(hash_lut.data());
    read_weighing(call, weights, op);
  }
};

// What the cotangents of weights have in common; the residual and the results come behind it.
template <typename Op>
void read_cotangent(Call& call, const Range& choices, const Range& experts, Op& op) {
  const Argument grad_weights = call.operand("grad_weights");
  op.rows = grad_weights.rows(1);
  op.k = grad_weights.size<int32_t>(0, choices);
  op.experts = call.integer<int32_t>("num_experts", experts);
  op.grad_weights = grad_weights.numbers<float>(op.rows, {op.k});
  op.expert_ids = call.operand("expert_ids").numbers<int32_t>(op.rows, {op.k});
}

template <>
struct Target<RouteCotangent> {
  static constexpr const char* kName = "route_cotangent";

  static void read(Call& call, RouteCotangent& op) {
    read_cotangent(call, {0, kMaxInt32}, {0, kMaxInt32}, op);
    const Argument residual = call.optional_operand("residual");
    const Argument grad_logits = call.result("grad_logits");
    op.scoring = read_scoring(call, true);
    op.dtype = grad_logits.float_dtype();
    op.residual = op.scoring.needs_whole_row() ? residual.numbers(op.dtype, op.rows, {op.experts})
                                               : residual.numbers<float>(op.rows, {op.k});
    if (op.scoring.score_fn != ScoreFn::kIdentity && !residual.given()) {
      call.must_be("has_residual", "true where score_fn is not identity", "false");
    }
    op.grad_logits = grad_logits.numbers(op.dtype, op.rows, {op.experts});
    if (op.experts == 0) op.rows = 0;  // nothing to compute, however many rows there are
  }
};

template <>
struct Target<RoutedCotangent> {
  static constexpr const char* kName = "routed_cotangent";

  static void read(Call& call, RoutedCotangent& op) {
    read_cotangent(call, {0, kMaxTopK}, {0, kMaxExperts}, op);
    op.residual = call.operand("residual").numbers<float>(op.rows, {op.k});
    op.scoring = read_scoring(call);
    if (op.scoring.needs_whole_row()) call.must_be("renormalize", "true where score_fn is softmax", "false");
    op.dtype = DType::kF32;
    op.in_parts = true;
    op.grad_logits = call.result("grad_logits").numbers(DType::kBF16, op.rows, {op.experts, 2});
    op.grad_chosen = call.result("grad_chosen").numbers<float>(op.rows, {op.k});
    if (op.experts == 0) op.rows = 0;  // nothing to compute, however many rows there are
  }
};

template <>
struct Target<RoutedGradients> {
  static constexpr const char* kName = "routed_gradients";

  static void read(Call& call, RoutedGradients& op) {
    read_cotangent(call, {0, kMaxTopK}, {0, kMaxExperts}, op);
    op.residual = call.operand("residual").numbers<float>(op.rows, {op.k});
    op.scoring = read_scoring(call);
    if (op.scoring.needs_whole_row()) call.must_be("renormalize", "true where score_fn is softmax", "false");
    const Argument x = call.operand("x");
    op.hidden = x.size<int32_t>(0, {0, kMaxInt32});
    op.x = x.numbers(DType::kBF16, op.rows, {op.hidden});
    op.weight = call.operand("weight").numbers(DType::kBF16, op.experts, {op.hidden});
    op.grad_x = call.result("grad_x").numbers(DType::kBF16, op.rows, {op.hidden});
    op.grad_weight = call.result("grad_weight").numbers(DType::kBF16, op.experts, {op.hidden});
    op.workspace = read_workspace(call.result("workspace"));
  }
};

template <>
struct Target<TopkSelect> {
  static constexpr const char* kName = "topk_select";

  static void read(Call& call, TopkSelect& op) {
    const Argument scores = call.operand("scores");
    op.rows = scores.rows(1);
    op.length = scores.size<int64_t>(0, {1, kMaxInt32});
    op.dtype = scores.float_dtype();
    op.scores = scores.data();
    op.k = call.integer<int64_t>("k", {1, op.length, " (the length of a row)"});
    op.sorted = call.flag("sorted");
    op.lengths = call.optional_operand("lengths").numbers<int32_t>(op.rows, {});
    op.values = call.result("values").numbers(op.dtype, op.rows, {op.k});
    op.indices = call.result("indices").numbers<int32_t>(op.rows, {op.k});
  }
};

// The experts of all choices, of which there are as many as int32 numbers: an operand of what takes tokens together.
template <typename Op>
void read_choices(Call& call, Op& op) {
  const Argument expert_ids = call.operand("expert_ids");
  op.batch = expert_ids.rows(2);
  op.k = expert_ids.size<int32_t>(0, {1, kMaxInt32});
  op.tokens = expert_ids.size<int64_t>(1, {0, kMaxInt32 / op.k});
  op.experts = call.integer<int32_t>("num_experts", {1, kMaxExperts});
  op.expert_ids = expert_ids.numbers<int32_t>(op.batch, {op.tokens, op.k});
}

template <>
struct Target<ExpertDispatch> {
  static constexpr const char* kName = "expert_dispatch";

  static void read(Call& call, ExpertDispatch& op) {
    read_choices(call, op);
    op.align = call.integer<int32_t>("align", {1, kMaxInt32});
    op.capacity = call.integer<int32_t>("capacity", {0, kMaxInt32});
    const int64_t slots = slots_of(op);
    if (slots > kMaxInt32) {
      call.must_be("align", "such that there are at most 2^31 - 1 slots", std::to_string(op.align));
    }
    op.token_index = call.result("token_index").numbers<int32_t>(op.batch, {slots});
    op.slot = call.result("slot").numbers<int32_t>(op.batch, {op.tokens, op.k});
    op.group_sizes = call.result("group_sizes").numbers<int32_t>(op.batch, {op.experts});
    op.workspace = read_workspace(call.optional_result("workspace"));
  }
};

// Which choice lies where: two operands of permute, combine and their cotangents.
inline void read_dispatch(Call& call, DispatchedRows& rows) {
  const Argument token_index = call.operand("token_index");
  const Argument slot = call.operand("slot");
  rows.batch = slot.rows(2);
  rows.k = slot.size<int32_t>(0, {0, kMaxTopK});
  rows.tokens = slot.size<int64_t>(1, {0, kMaxInt32});
  rows.slots = token_index.size<int64_t>(0, {0, kMaxInt32});
  rows.slot = slot.numbers<int32_t>(rows.batch, {rows.tokens, rows.k});
  rows.token_index = token_index.numbers<int32_t>(rows.batch, {rows.slots});
}

inline const float* read_weights(const Argument& weights, const DispatchedRows& rows) {
  return weights.numbers<float>(rows.batch, {rows.tokens, rows.k});
}

template <>
struct Target<Permute> {
  static constexpr const char* kName = "permute";

  static void read(Call& call, Permute& op) {
    DispatchedRows& rows = op.rows;
    const Argument x = call.operand("x");
    read_dispatch(call, rows);
    rows.hidden = x.size<int64_t>(0, {0, kMaxInt32});
    const Argument weights = call.optional_operand("weights");
    op.weights = read_weights(weights, rows);
    op.element_bytes = x.float_bytes();
    if (weights.given()) op.dtype = x.float_dtype();
    op.x = x.numbers_like(x, rows.batch, {rows.tokens, rows.hidden});
    op.out = call.result("rows").numbers_like(x, rows.batch, {rows.slots, rows.hidden});
    if (rows.hidden == 0) rows.batch = 0;  // nothing to move, however many rows there are
  }
};

template <>
struct Target<Combine> {
  static constexpr const char* kName = "combine";

  static void read(Call& call, Combine& op) {
    DispatchedRows& rows = op.rows;
    const Argument y = call.operand("y");
    read_dispatch(call, rows);
    rows.hidden = y.size<int64_t>(0, {0, kMaxInt32});
    op.dtype = y.float_dtype();
    op.y = y.numbers(op.dtype, rows.batch, {rows.slots, rows.hidden});
    op.weights = read_weights(call.optional_operand("weights"), rows);
    op.out = call.result("rows").numbers(op.dtype, rows.batch, {rows.tokens, rows.hidden});
    if (rows.hidden == 0) rows.batch = 0;
  }
};

template <>
struct Target<PermuteCotangent> {
  static constexpr const char* kName = "permute_cotangent";

  static void read(Call& call, PermuteCotangent& op) {
    DispatchedRows& rows = op.rows;
    const Argument grad = call.operand("grad");
    const Argument x = call.operand("x");
    read_dispatch(call, rows);
    rows.hidden = grad.size<int64_t>(0, {0, kMaxInt32});
    op.dtype = grad.float_dtype();
    op.grad = grad.numbers(op.dtype, rows.batch, {rows.slots, rows.hidden});
    op.x = x.numbers(op.dtype, rows.batch, {rows.tokens, rows.hidden});
    op.weights = read_weights(call.operand("weights"), rows);
    op.grad_x = call.result("grad_x").numbers(op.dtype, rows.batch, {rows.tokens, rows.hidden});
    op.grad_weights = call.result("grad_weights").numbers<float>(rows.batch, {rows.tokens, rows.k});
    if (rows.hidden == 0 && rows.k == 0) rows.batch = 0;
  }
};

template <>
struct Target<CombineCotangent> {
  static constexpr const char* kName = "combine_cotangent";

  static void read(Call& call, CombineCotangent& op) {
    DispatchedRows& rows = op.rows;
    const Argument grad = call.operand("grad");
    const Argument y = call.operand("y");
    read_dispatch(call, rows);
    rows.hidden = grad.size<int64_t>(0, {0, kMaxInt32});
    op.dtype = grad.float_dtype();
    op.grad = grad.numbers(op.dtype, rows.batch, {rows.tokens, rows.hidden});
    op.y = y.numbers(op.dtype, rows.batch, {rows.slots, rows.hidden});
    op.weights = read_weights(call.operand("weights"), rows);
    op.grad_y = call.result("grad_y").numbers(op.dtype, rows.batch, {rows.slots, rows.hidden});
    op.grad_weights = call.result("grad_weights").numbers<float>(rows.batch, {rows.tokens, rows.k});
    if (rows.hidden == 0 && rows.k == 0) rows.batch = 0;
  }
};

template <>
struct Target<ExpertCounts> {
  static constexpr const char* kName = "expert_counts";

  static void read(Call& call, ExpertCounts& op) {
    read_choices(call, op);
    op.token_mask = call.optional_operand("token_mask").numbers<uint8_t>(op.batch, {op.tokens});
    op.counts = call.result("counts").numbers<int32_t>(op.batch, {op.experts});
    op.workspace = read_workspace(call.optional_result("workspace"));
  }
};

template <typename Op>
Declaration declaration() {
  Declaration result;
  Call call(result);
  Op op{};
  Target<Op>::read(call, op);
  return result;
}

// Every op there is. A backend serves those that it has a kernel for.
using Ops = std::tuple<HashRouter, ActivationTopk, RouteAt, ScoredHashRouter, RouteCotangent, RoutedCotangent,
                       RoutedGradients, TopkSelect, ExpertDispatch, Permute, Combine, PermuteCotangent,
                       CombineCotangent, ExpertCounts, DenseRouter>;

}  // namespace jax_router
