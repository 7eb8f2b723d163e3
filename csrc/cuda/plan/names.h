// The words that names of plans are made of.
#pragma once

#include <string>

#include "../../common/ops.h"
#include "row_tile.h"

namespace jax_router::cuda {

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
constexpr KeyMode kKeyModes[] = {KeyMode::kLogits, KeyMode::kScores, KeyMode::kGroups};

constexpr int size_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

inline std::string name(DType dtype) { return dtype == DType::kF32 ? "f32" : dtype == DType::kBF16 ? "bf16" : "f16"; }
inline std::string name(KeyMode mode) {
  return mode == KeyMode::kLogits ? "logits" : mode == KeyMode::kScores ? "scores" : "groups";
}
inline std::string name(const RowTile& tile) {
  return "tile " + std::to_string(tile.lanes) + "x" + std::to_string(tile.chunks);
}

}  // namespace jax_router::cuda
