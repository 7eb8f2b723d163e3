// How a routed_gradients divides its work, and whether it is worth it: elsewhere products of XLA's, or sums of rows,
// are faster.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../../common/macros.h"
#include "names.h"
#include "route_cotangent.h"

namespace jax_router::cuda {

constexpr int kGradientTokens = 64;                       // of a tile
constexpr int kGradientColumns = 128;                     // of a block
constexpr int kGradientExperts = 128;                     // at most
constexpr int kGradientChoices = 8;                       // of a token, at most
constexpr int kGradientStages = 3;                        // tiles that are in shared memory
constexpr int kGradientChoiceSlots = 8;                   // and those whose choices are
constexpr int kGradientBoxBytes = 128 * kGradientTokens;  // of 64 columns
constexpr int kGradientStageBytes = 6 * kGradientBoxBytes;
constexpr int kGradientResultBytes = 4 * kGradientBoxBytes;
constexpr int kGradientAlignment = 1024;  // of what the copy engine writes
constexpr int kGradientStaticBytes = 8 * (2 * kGradientStages + kGradientChoiceSlots + 1);
constexpr int kGradientChoiceBytes = 8 * kGradientTokens * kGradientChoices;  // of a tile, at most
constexpr int kGradientSumBytes = 4 * kGradientExperts * kGradientColumns;

struct RoutedGradientsPlan {
  int slices;  // of the columns
  int splits;  // of the tokens
  int64_t blocks;
  int64_t shared_bytes;
  int64_t sums;  // where in the workspace they begin, behind the choices
  int64_t workspace_bytes;
};

inline std::optional<RoutedGradientsPlan> plan(const RoutedGradients& op, const Device& device) {
  // Coordinates of the copy engine are 32 bits wide, and so is a grid.
  if (!device.has_hopper_kernels || op.rows < 1 || op.rows > INT32_MAX - 1024 || op.hidden < 1 || op.hidden % 8 != 0 ||
      op.experts < 1 || op.experts > kGradientExperts || op.k < 1 || op.k > kGradientChoices ||
      op.scoring.needs_whole_row()) {
    return std::nullopt;
  }
  RoutedGradientsPlan plan{};
  plan.slices = static_cast<int>(ceil_div(op.hidden, kGradientColumns));
  const int64_t tiles = ceil_div(op.rows, kGradientTokens);
  plan.splits = static_cast<int>(std::clamp<int64_t>(device.multiprocessors / plan.slices, 1, tiles));
  plan.blocks = int64_t{plan.slices} * plan.splits;
  plan.shared_bytes = kGradientStages * kGradientStageBytes + kGradientResultBytes +
                      kGradientChoiceSlots * kGradientChoiceBytes + kGradientAlignment;
  plan.sums = tiles * kGradientTokens * op.k * 8;
  plan.workspace_bytes = plan.sums + plan.blocks * kGradientSumBytes;
  const bool fits = plan.shared_bytes + kGradientStaticBytes <= device.shared_bytes;
  return fits && plan.workspace_bytes <= op.workspace.bytes ? std::optional(plan) : std::nullopt;
}

inline std::vector<RoutedGradientsPlan> plans(const RoutedGradients& op, const Device& device) {
  const auto only = plan(op, device);
  return only ? std::vector{*only} : std::vector<RoutedGradientsPlan>{};
}

constexpr Needs needs(const RoutedGradientsPlan& plan) { return {plan.shared_bytes + kGradientStaticBytes, 1, true}; }

// Measured on an H100 with 8 to 128 experts and hidden sizes of 1024 to 7168: 5 to 23 % faster from here on.
constexpr int64_t kGradientLeastTokens = 1024;
constexpr int kGradientLeastExperts = 8;

inline bool pays(const RoutedGradients& op, const RoutedGradientsPlan&, const Device&) {
  return op.rows >= kGradientLeastTokens && op.experts >= kGradientLeastExperts;
}

inline std::string name(const RoutedGradients&, const RoutedGradientsPlan&) { return "bf16"; }

inline std::vector<std::string> instances(const RoutedGradients&, const Device& device) {
  if (!device.has_hopper_kernels) return {};
  return {"bf16"};
}

}  // namespace jax_router::cuda
