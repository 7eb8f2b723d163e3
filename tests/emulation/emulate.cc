// Runs the cases of tests/launches by emulation, every plan once, in random order until the time is up. All plans of a
// case must give the same bits, which are known of topk_select, and ids that are within their range. A plan that has
// nothing else to be compared with is launched twice. Kernels with tensor cores are left out.
//
//   emulate [--seconds 60] [--seed 1] [prefix]   of all ops, or of the cases whose name begins so
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/dense_router.h"
#include "../launches/cases.h"
#include "emulation.h"

namespace jax_router {
namespace cuda {

// Have tensor cores; nothing here calls them.
cudaError_t run_few(const DenseRouter&, const DenseRouterPlan&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t run_many(const DenseRouter&, const DenseRouterPlan&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t run(const RoutedGradients&, const RoutedGradientsPlan&, cudaStream_t) { return cudaErrorNotSupported; }

}  // namespace cuda

namespace launches {
namespace {

constexpr size_t kMostBytes = 300000;  // of the operands and results of a call: larger ones take long

// Of an instance or a plan.
bool has_tensor_cores(const std::string& op, const std::string& name) {
  return op == "routed_gradients" || (op == "dense_router" && name.find(" one of ") == std::string::npos);
}

// A GPU has one NaN that arithmetic gives, a host has many.
Bits with_one_nan(Bits bits) {
  for (std::vector<char>& bytes : bits) {
    for (size_t i = 0; i + 4 <= bytes.size(); i += 4) {
      uint32_t word;
      std::memcpy(&word, &bytes[i], 4);
      if ((word & 0x7FFFFFFF) > 0x7F800000) std::memset(&bytes[i], 0x7F, 4);
    }
  }
  return bits;
}

size_t bytes_of(const Call& call) {
  size_t bytes = 0;
  for (const auto& operand : call.operands) bytes += operand->bytes();
  for (size_t of_result : call.result_bytes) bytes += of_result;
  return bytes;
}

// Launches every plan of the case; who goes on when follows from the seed and the plan's name, so that a failure comes
// again with both. Adds the plans' kernels to `seen`.
void run_case(const Call& call, uint64_t seed, std::set<std::string>& seen) {
  const Results results(call.result_bytes);
  Bits wanted = call.expected ? with_one_nan(call.expected()) : Bits{};
  std::vector<Way> ways = call.ways;
  if (ways.size() == 1 && wanted.empty()) ways.push_back(ways.front());
  for (size_t i = 0; i < ways.size(); ++i) {
    const Way& way = ways[i];
    const std::string what = call.name + " by " + way.plan + ", seed " + std::to_string(seed);
    const Buffer workspace(way.workspace_bytes);
    workspace.fill(0xA5);
    results.fill(0x5A);
    emulation::begin(what.c_str(), std::hash<std::string>{}(what) + i);
    must(way.launch(results, workspace.data(), cudaStreamPerThread), what);
    Bits bits = results.read();
    check_ids(call, bits);
    bits = with_one_nan(std::move(bits));
    if (wanted.empty()) wanted = bits;
    if (bits != wanted) fail(what, other_bits(call));
    seen.insert(way.plan.substr(0, way.plan.find(',')));
  }
}

using Clock = std::chrono::steady_clock;

// Each op has the same part of the time, its cases in another order for another seed.
int emulate(double seconds, uint64_t seed, const std::string& prefix) {
  const auto begins = [](const std::string& text, const std::string& with) { return text.rfind(with, 0) == 0; };
  std::vector<std::string> ops;
  for (const auto& [op, of_op] : kOps) {
    if (op != "routed_gradients" && (begins(op, prefix) || begins(prefix, op))) ops.push_back(op);
  }
  for (const std::string& op : ops) {
    const OpCases& of_op = kOps.at(op);
    std::vector<Call> calls;
    of_op.visit([&](Call call) {
      const auto left_out = [&](const Way& way) { return has_tensor_cores(op, way.plan); };
      call.ways.erase(std::remove_if(call.ways.begin(), call.ways.end(), left_out), call.ways.end());
      // A weight may be large: a thread reads much of it.
      const bool fits = !call.ways.empty() && (op == "dense_router" || bytes_of(call) <= kMostBytes);
      if (fits && begins(call.name, prefix)) calls.push_back(std::move(call));
    });
    std::shuffle(calls.begin(), calls.end(), std::mt19937_64(seed));
    const auto start = Clock::now();
    std::set<std::string> seen;
    size_t plans = 0, done = 0;
    const std::chrono::duration<double> part(seconds / ops.size());
    for (; done < calls.size() && Clock::now() - start < part; ++done) {
      run_case(calls[done], seed, seen);
      plans += calls[done].ways.size();
    }
    const std::chrono::duration<double> taken = Clock::now() - start;
    std::printf("%-20s %4zu of %4zu cases, %5zu plans, %4.1f s\n", op.c_str(), done, calls.size(), plans,
                taken.count());
    std::fflush(stdout);
    if (done < calls.size() || !begins(op, prefix)) continue;
    for (const std::string& instance : of_op.instances(*cuda::current_device())) {
      if (!has_tensor_cores(op, instance) && seen.count(instance) == 0)
        fail(op + " " + instance, "no case has a plan with this kernel");
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace launches
}  // namespace jax_router

int main(int argc, char** argv) {
  double seconds = 1e9;
  uint64_t seed = 1;
  std::string prefix;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--seconds" && i + 1 < argc) {
      seconds = std::atof(argv[++i]);
    } else if (argument == "--seed" && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (argument[0] != '-' && prefix.empty()) {
      prefix = argument;
    } else {
      std::fprintf(stderr, "usage: emulate [--seconds S] [--seed N] [prefix]\n");
      return 2;
    }
  }
  return jax_router::launches::emulate(seconds, seed, prefix);
}
