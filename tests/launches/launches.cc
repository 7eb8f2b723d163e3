// Launches the CUDA kernels without JAX, for compute-sanitizer and under stress; `run`, beside this file, builds it.
//
//   launches cases [prefix]   every plan of every case, on ordinary and on hostile operands; or of the cases whose name
//                             begins so, such as `activation_topk bf16`. Fails where a kernel is in no case's plans.
//   launches once [prefix]    the same, but a plan is launched once
//   launches stress           launches of changing kernels and shapes behind each other, on two streams at once,
//                             directly and in CUDA graphs, in workspaces that hold what the launch before left there
//
// A plan is launched twice, into results that hold different bytes: where the bits agree, all results were written, and
// made of the operands alone. So must those of all plans of a case agree, but for dense_router's, which add up in other
// orders; and those of topk_select with what the host finds. That others are the right results is for the tests in
// Python.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cases.h"

namespace jax_router::launches {
namespace {

// dense_router looks at its workspace before it has written there, to see whether it was written; any content does. So
// initcheck finds these bytes written. That of expert_dispatch is left as it was allocated.
Buffer make_workspace(const Call& call, size_t bytes) {
  Buffer workspace(bytes);
  if (call.name.rfind("dense_router", 0) == 0) workspace.fill(0x5A);
  return workspace;
}

// Adds the kernels of the case's plans to `seen`.
void run_case(const Call& call, bool twice, std::set<std::string>& seen) {
  const Results results(call.result_bytes);
  Bits wanted = call.expected ? call.expected() : Bits{};
  for (const Way& way : call.ways) {
    const std::string what = call.name + " by " + way.plan;
    std::printf("%s\n", what.c_str());  // so that a tool's report stands below its plan
    std::fflush(stdout);
    const Buffer workspace = make_workspace(call, way.workspace_bytes);
    const auto launch = [&](int byte) {
      results.fill(byte);
      must(way.launch(results, workspace.data(), cudaStreamPerThread), what);
      must(cudaStreamSynchronize(cudaStreamPerThread), what);
      return results.read();
    };
    const Bits bits = launch(0x5A);
    if (twice && launch(0xA5) != bits) fail(what, "two launches gave different bits");
    if (wanted.empty()) wanted = bits;
    if (call.is_exact && bits != wanted) fail(what, other_bits(call));
    check_ids(call, bits);
    seen.insert(way.plan.substr(0, way.plan.find(',')));
  }
}

int run_cases(const std::string& prefix, bool twice) {
  const auto begins = [](const std::string& text, const std::string& with) { return text.rfind(with, 0) == 0; };
  int cases = 0;
  size_t plans = 0;
  for (const auto& [op, of_op] : kOps) {
    if (!begins(op, prefix) && !begins(prefix, op)) continue;
    std::set<std::string> seen;
    of_op.visit([&](const Call& call) {
      if (!begins(call.name, prefix)) return;
      run_case(call, twice, seen);
      ++cases;
      plans += call.ways.size();
    });
    if (!begins(op, prefix)) continue;  // only some of the cases
    for (const std::string& instance : of_op.instances(*cuda::current_device())) {
      if (seen.count(instance) == 0) fail(op + " " + instance, "no case has a plan with this kernel");
    }
  }
  std::printf("%d cases, %zu plans, %d failures\n", cases, plans, failures);
  return failures == 0 ? 0 : 1;
}

// A stream with a workspace that all its launches share, each with results of its own.
class Lane {
 public:
  Lane(const std::vector<Call>& calls, int launches, int seed) : calls_(calls), workspace_(most_bytes(calls)) {
    must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    std::mt19937 random(seed);
    for (int i = 0; i < launches; ++i) {
      which_.push_back(random() % calls.size());
      results_.emplace_back(calls[which_.back()].result_bytes);
    }
    workspace_.fill(0xA5);
    must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    launch_each();
    cudaGraph_t graph;
    must(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    must(cudaGraphInstantiate(&graph_, graph, 0), "cudaGraphInstantiate");
    must(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }
  ~Lane() {
    cudaGraphExecDestroy(graph_);
    cudaStreamDestroy(stream_);
  }

  void launch(bool by_graph) {
    if (by_graph) {
      must(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    } else {
      launch_each();
    }
  }
  void poison() const {
    for (const Results& results : results_) results.fill(0xA5);
  }
  void check(const std::vector<std::vector<std::vector<char>>>& want, const std::string& how) const {
    must(cudaStreamSynchronize(stream_), how);
    for (size_t i = 0; i < which_.size(); ++i) {
      if (results_[i].read() != want[which_[i]]) fail(calls_[which_[i]].name, "other bits " + how);
    }
  }

 private:
  static size_t most_bytes(const std::vector<Call>& calls) {
    size_t bytes = 0;
    for (const Call& call : calls) bytes = std::max<size_t>(bytes, call.way().workspace_bytes);
    return bytes;
  }
  void launch_each() {
    for (size_t i = 0; i < which_.size(); ++i) {
      const Call& call = calls_[which_[i]];
      must(call.way().launch(results_[i], workspace_.data(), stream_), call.name);
    }
  }

  const std::vector<Call>& calls_;
  Buffer workspace_;
  cudaStream_t stream_;
  cudaGraphExec_t graph_;
  std::vector<size_t> which_;
  std::vector<Results> results_;
};

int run_stress() {
  constexpr int kLaunches = 100, kRounds = 20;
  Maker make;
  std::vector<Call> calls;
  const auto add_dense = [&](DType weight, int64_t rows, int32_t hidden, int32_t experts) {
    const DenseRouter sizes = dense_sizes(DType::kBF16, weight, rows, hidden, experts, 6, 1);
    Call call = dense_router(make, sizes, Keys::kBias, Content::kOrdinary);
    if (!call.ways.empty()) calls.push_back(std::move(call));
  };
  for (auto [rows, hidden, experts] : {std::array{1, 4096, 256},
                                       {64, 7168, 384},
                                       {128, 7168, 384},
                                       {17, 2880, 128},
                                       {8, 4096, 512},
                                       {1000, 2048, 256},
                                       {4096, 1024, 256}}) {
    add_dense(DType::kBF16, rows, hidden, experts);
  }
  add_dense(DType::kF32, 64, 7168, 384);
  const DenseRouter of_f32 = dense_sizes(DType::kF32, DType::kF32, 5, 1024, 64, 4, 1);
  calls.push_back(dense_router(make, of_f32, Keys::kLogits, Content::kOrdinary));
  calls.push_back(topk_select(make, DType::kF32, 1, 262209, 2048, false, false, Content::kOrdinary));
  calls.push_back(topk_select(make, DType::kBF16, 4, 65536, 512, true, true, Content::kTies));
  calls.push_back(expert_dispatch(make, 1, 512, 6, 256));
  calls.push_back(expert_dispatch(make, 1, 8192, 6, 384));
  calls.push_back(permute(make, DType::kBF16, 2, true, {1, 300, 6, 2048, 100}, Content::kOrdinary));
  calls.push_back(combine(make, DType::kBF16, true, {1, 300, 6, 2048, 100}, Content::kOrdinary));
  calls.push_back(combine_cotangent(make, DType::kBF16, {1, 20, 6, 4096, 100}, Content::kOrdinary));
  Call gradients = routed_gradients(make, 1000, 128, 8, 2048, {ScoreFn::kSoftmax, true, 1.0f}, Content::kOrdinary);
  if (!gradients.ways.empty()) calls.push_back(std::move(gradients));
  calls.push_back(expert_dispatch(make, 1, 8192, 6, 256, 128, 200));
  calls.push_back(expert_counts(make, 1, 8192, 6, 256));
  calls.push_back(expert_counts(make, 1, 300000, 6, 256));
  calls.push_back(activation_topk(make, DType::kF32, 64, 256, 6, Keys::kBias, 1, Content::kOrdinary));

  std::vector<std::vector<std::vector<char>>> want;
  for (const Call& call : calls) {
    const Results results(call.result_bytes);
    const Buffer workspace(call.way().workspace_bytes);
    must(call.way().launch(results, workspace.data(), cudaStreamPerThread), call.name);
    must(cudaStreamSynchronize(cudaStreamPerThread), call.name);
    want.push_back(results.read());
    check_ids(call, want.back());
  }
  Lane lanes[] = {{calls, kLaunches, 1}, {calls, kLaunches, 2}};
  for (bool by_graph : {false, true}) {
    const std::string how = by_graph ? "in a graph" : "launched directly";
    for (int round = 0; round < kRounds; ++round) {
      for (const Lane& lane : lanes) lane.poison();
      must(cudaDeviceSynchronize(), how);
      for (Lane& lane : lanes) lane.launch(by_graph);
      for (const Lane& lane : lanes) lane.check(want, how);
    }
    std::printf("stress: %d launches %s\n", 2 * kLaunches * kRounds, how.c_str());
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_router::launches

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "cases" || what == "once")
    return jax_router::launches::run_cases(argc > 2 ? argv[2] : "", what == "cases");
  if (what == "stress") return jax_router::launches::run_stress();
  std::fprintf(stderr, "usage: launches cases|once [prefix], or launches stress\n");
  return 2;
}
