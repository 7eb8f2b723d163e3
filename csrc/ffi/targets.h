// The list of custom-call targets: one handler an op, made for a backend. A backend is a type with
//   add_context(binding)   the binding with what the handlers need besides the call (a thread pool, a stream)
//   kTraits                of its handlers
//   run(op, context...)    the kernel, as an ffi::Error
//   kHasDenseRouter        whether it has kernels that fuse the product and the selection
#pragma once

#include <utility>

#include "decode.h"

namespace jax_router {

// What jax.ffi registers: a plain function, bound on its first call.
template <typename Backend, typename Op>
XLA_FFI_Error* handler(XLA_FFI_CallFrame* frame) {
  static auto* const bound = [] {
    auto run = [](ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs, auto... context) {
      CallReader call(args, rets, attrs);
      Op op{};
      read(call, op);
      return call.failed() ? call.error() : Backend::run(op, std::move(context)...);
    };
    return Backend::add_context(ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs())
        .To(run, Backend::kTraits)
        .release();
  }();
  return bound->Call(frame);
}

// Calls visit(name, handler) for every target of a backend.
template <typename Backend, typename Visitor>
void for_each_target(Visitor&& visit) {
  visit("hash_router", handler<Backend, HashRouter>);
  visit("activation_topk", handler<Backend, ActivationTopk>);
  visit("route_at", handler<Backend, RouteAt>);
  visit("scored_hash_router", handler<Backend, ScoredHashRouter>);
  visit("route_cotangent", handler<Backend, RouteCotangent>);
  visit("topk_select", handler<Backend, TopkSelect>);
  visit("expert_dispatch", handler<Backend, ExpertDispatch>);
  if constexpr (Backend::kHasDenseRouter) visit("dense_router", handler<Backend, DenseRouter>);
}

}  // namespace jax_router
