// The backend of the CPU kernels: they are threaded over XLA's own pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>

#include "../cpu/kernels.h"
#include "targets.h"

namespace jax_router {

// Splits [0, count) into chunks that the calling thread and the pool's threads take in turn. The caller works too and
// waits only for chunks that another thread has begun, so that a pool whose threads all wait here still makes progress.
inline void parallel_for(ffi::ThreadPool& pool, int64_t count, int64_t grain,
                         const std::function<void(int64_t, int64_t)>& body) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t chunk = std::max({int64_t{1}, grain, (count + 4 * threads - 1) / (4 * threads)});
  const int64_t chunks = (count + chunk - 1) / chunk;
  if (chunks <= 1 || threads == 1) {
    if (count > 0) body(0, count);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::exception_ptr failure;  // the last one
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto shared = std::make_shared<Shared>();
  // `body` lives as long as the caller waits; a task that starts later finds no chunk and does not touch it.
  auto work = [shared, chunks, chunk, count, &body] {
    int64_t mine = 0;
    std::exception_ptr failure;
    for (int64_t i; (i = shared->next.fetch_add(1)) < chunks; ++mine) {
      try {
        body(i * chunk, std::min(count, (i + 1) * chunk));
      } catch (...) {
        failure = std::current_exception();
      }
    }
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(shared->mutex);
    shared->done += mine;
    if (failure) shared->failure = std::move(failure);
    if (shared->done == chunks) shared->finished.notify_all();
  };
  const int64_t helpers = std::min(threads, chunks) - 1;
  try {
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  } catch (const std::bad_alloc&) {
    // Those that could be asked, and the caller, do it all.
  }
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done == chunks; });
  if (shared->failure) std::rethrow_exception(shared->failure);
}

template <typename Op, typename = void>
constexpr bool kHasKernel = false;
template <typename Op>
constexpr bool
    kHasKernel<Op, std::void_t<decltype(cpu::run(std::declval<const Op&>(), std::declval<cpu::ParallelFor>()))>> = true;

struct Cpu {
  static constexpr std::initializer_list<ffi::Traits> kTraits{};
  template <typename Op>
  static constexpr bool kHas = kHasKernel<Op>;

  template <typename Op>
  static void check(Call&, const Op&) {}

  template <typename Binding>
  static auto add_context(Binding binding) {
    return std::move(binding).template Ctx<ffi::ThreadPool>();
  }

  template <typename Op>
  static ffi::Error run(const Op& op, ffi::ThreadPool pool) {
    cpu::run(op, [&pool](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
      parallel_for(pool, count, grain, body);
    });
    return ffi::Error::Success();
  }
};

}  // namespace jax_router
