// The custom-call targets of a backend: one handler for each op that it has a kernel for. A backend is a type with
//   add_context(binding)   the binding with what the handlers need besides the call (a thread pool, a stream)
//   kTraits                of its handlers
//   kHas<Op>               whether it has a kernel
//   check(call, op)        what its kernels do not take beyond what no backend takes
//   run(op, context...)    the kernel, as an ffi::Error
#pragma once

#include <new>
#include <string>
#include <tuple>
#include <utility>

#include "decode.h"

namespace jax_router {

// What jax.ffi registers: a plain function, bound on its first call.
template <typename Backend, typename Op>
XLA_FFI_Error* handler(XLA_FFI_CallFrame* frame) {
  static auto* const bound = [] {
    auto run = [](ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes,
                  auto... context) {
      try {  // XLA's own code cannot be thrown through
        Call call(Target<Op>::kName, operands, results, attributes);
        Op op{};
        Target<Op>::read(call, op);
        Backend::check(call, op);
        const ffi::Error error = call.finish();
        return error.failure() ? error : Backend::run(op, std::move(context)...);
      } catch (const std::bad_alloc&) {
        return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                          std::string(kPrefix) + Target<Op>::kName + ": out of memory");
      }
    };
    return Backend::add_context(ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs())
        .To(run, Backend::kTraits)
        .release();
  }();
  return bound->Call(frame);
}

// Calls visit(name, handler, declaration) for every target of a backend.
template <typename Backend, typename Visitor, typename... AllOps>
void for_each_target(Visitor&& visit, const std::tuple<AllOps...>&) {
  const auto visit_op = [&](auto op) {
    using Op = decltype(op);
    if constexpr (Backend::template kHas<Op>) visit(Target<Op>::kName, handler<Backend, Op>, declaration<Op>());
  };
  (visit_op(AllOps{}), ...);
}

template <typename Backend, typename Visitor>
void for_each_target(Visitor&& visit) {
  for_each_target<Backend>(visit, Ops{});
}

}  // namespace jax_router
