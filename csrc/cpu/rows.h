// The kernels that exist once for each instruction set: rows [begin, end) of an op. Every file that defines one is
// compiled with JR_ISA set to the name of the instruction set, and everything it defines lies in that namespace or has
// internal linkage. Such a file uses no standard library template: the linker would keep one copy of it, perhaps one
// with instructions that the machine does not have. No include guard: instruction_set.cc includes it once for each.
#include <cstdint>

#include "../common/ops.h"

namespace jax_router::cpu::JR_ISA {

void rows(const ActivationTopk& op, int64_t begin, int64_t end);
void rows(const Permute& op, int64_t begin, int64_t end);  // of tokens, in all of them
void rows(const Combine& op, int64_t begin, int64_t end);
void rows(const PermuteCotangent& op, int64_t begin, int64_t end);
void rows(const CombineCotangent& op, int64_t begin, int64_t end);
void rows(const RouteAt& op, int64_t begin, int64_t end);
void rows(const RouteCotangent& op, int64_t begin, int64_t end);
void rows(const TopkSelect& op, int64_t begin, int64_t end);

}  // namespace jax_router::cpu::JR_ISA
