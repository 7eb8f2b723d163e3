// The CPU kernels, one an op. Each is called with a ParallelFor that splits rows over XLA's thread pool. What they
// throw is std::bad_alloc.
#pragma once

#include <cstdint>
#include <functional>

#include "../common/ops.h"

namespace jax_router::cpu {

// parallel_for(count, grain, body): body(begin, end) over disjoint ranges that cover [0, count), each but the last of
// at least `grain` items, on any threads; returns when all are done, and throws what a body threw.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

void run(const HashRouter& op, const ParallelFor& parallel_for);
void run(const ActivationTopk& op, const ParallelFor& parallel_for);
void run(const RouteAt& op, const ParallelFor& parallel_for);
void run(const RouteCotangent& op, const ParallelFor& parallel_for);
void run(const RoutedCotangent& op, const ParallelFor& parallel_for) = delete;  // CPUs multiply in f32
void run(const TopkSelect& op, const ParallelFor& parallel_for);
void run(const ExpertDispatch& op, const ParallelFor& parallel_for);
void run(const Permute& op, const ParallelFor& parallel_for);
void run(const Combine& op, const ParallelFor& parallel_for);
void run(const PermuteCotangent& op, const ParallelFor& parallel_for);
void run(const CombineCotangent& op, const ParallelFor& parallel_for);
void run(const ExpertCounts& op, const ParallelFor& parallel_for);

}  // namespace jax_router::cpu
