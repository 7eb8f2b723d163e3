// Which kernel computes a route_cotangent. The op leaves little choice: softmax over a whole row needs a warp a row,
// few choices leave room for several rows a warp, and more choices or experts than a router's are cut into stretches.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "names.h"

namespace jax_router::cuda {

enum class CotangentKernel { kFewChoices, kChoices, kWholeRow, kStretches };
constexpr CotangentKernel kCotangentKernels[] = {CotangentKernel::kFewChoices, CotangentKernel::kChoices,
                                                 CotangentKernel::kWholeRow, CotangentKernel::kStretches};

constexpr int kCotangentWarps = 4;           // of a block
constexpr int kFewChoiceLanes = 8;           // that hold the choices of a row, where these are few
constexpr int kCotangentStretch = 1024;      // floats of shared memory a warp
constexpr int kLongCotangentStretch = 4096;  // results of a block, where rows are cut
constexpr int kLongCotangentThreads = 256;
constexpr int kMostLongChoices = 1 << 30;  // numbers of choices are 32 bits wide

struct RouteCotangentPlan {
  CotangentKernel kernel;
  int threads;
  int64_t blocks;
  int stretches;  // of a row
};

inline std::optional<RouteCotangentPlan> plan_with(const RouteCotangent& op, CotangentKernel kernel) {
  // Whether each choice has a gradient of its own.
  const bool apart = !op.scoring.renormalize && op.scoring.score_fn != ScoreFn::kSoftmax;
  const bool whole_row = op.scoring.needs_whole_row();
  RouteCotangentPlan plan{kernel, 32 * kCotangentWarps, 0, 1};
  switch (kernel) {
    case CotangentKernel::kFewChoices:
      if (whole_row || op.k > kFewChoiceLanes || op.experts > kMaxExperts) return std::nullopt;
      plan.blocks = ceil_div(op.rows, kCotangentWarps * (32 / kFewChoiceLanes));
      break;
    case CotangentKernel::kChoices:
    case CotangentKernel::kWholeRow:
      if (whole_row != (kernel == CotangentKernel::kWholeRow) || op.k > kMaxTopK || op.experts > kMaxExperts) {
        return std::nullopt;
      }
      plan.blocks = ceil_div(op.rows, kCotangentWarps);
      break;
    case CotangentKernel::kStretches:
      if (!apart || op.k > kMostLongChoices || op.in_parts) return std::nullopt;
      plan.threads = kLongCotangentThreads;
      plan.stretches = static_cast<int>(ceil_div(op.experts, kLongCotangentStretch));
      plan.blocks = op.rows * plan.stretches;
  }
  return plan.blocks <= kMostBlocks ? std::optional(plan) : std::nullopt;
}

// Measured on an H100: of more experts, a row is a warp's work also where its choices are few, or a block's where they
// are many and may be apart.
constexpr int kFewChoiceExperts = 1000;
constexpr int kManyChoices = 32;
constexpr int kManyChoiceExperts = 800;

inline std::optional<RouteCotangentPlan> plan(const RouteCotangent& op, const Device&) {
  for (CotangentKernel kernel : kCotangentKernels) {
    if (kernel == CotangentKernel::kFewChoices && op.experts > kFewChoiceExperts) continue;
    const bool crowded = op.experts > kManyChoiceExperts && op.k > kManyChoices;
    if (kernel == CotangentKernel::kChoices && crowded && plan_with(op, CotangentKernel::kStretches)) continue;
    if (const auto plan = plan_with(op, kernel)) return plan;
  }
  return std::nullopt;
}

inline std::vector<RouteCotangentPlan> plans(const RouteCotangent& op, const Device&) {
  std::vector<RouteCotangentPlan> found;
  for (CotangentKernel kernel : kCotangentKernels) {
    if (const auto plan = plan_with(op, kernel)) found.push_back(*plan);
  }
  return found;
}

inline std::string instance_name(DType dtype, CotangentKernel kernel) {
  switch (kernel) {
    case CotangentKernel::kFewChoices:
      return name(dtype) + " few choices";
    case CotangentKernel::kChoices:
      return name(dtype) + " choices";
    case CotangentKernel::kWholeRow:
      return name(dtype) + " whole row";
    case CotangentKernel::kStretches:
      return name(dtype) + " stretches";
  }
  return "";
}

inline std::string name(const RouteCotangent& op, const RouteCotangentPlan& plan) {
  return instance_name(op.dtype, plan.kernel);
}

// Parts in bf16 take the way of f32 numbers, a few choices at a time or more of them.
inline std::vector<std::string> instances(const RoutedCotangent&, const Device&) {
  return {instance_name(DType::kF32, CotangentKernel::kFewChoices),
          instance_name(DType::kF32, CotangentKernel::kChoices)};
}

inline std::vector<std::string> instances(const RouteCotangent&, const Device&) {
  std::vector<std::string> all;
  for (DType dtype : kDTypes) {
    for (CotangentKernel kernel : kCotangentKernels) all.push_back(instance_name(dtype, kernel));
  }
  return all;
}

}  // namespace jax_router::cuda
