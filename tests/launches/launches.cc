// Launches the CUDA kernels without JAX, for compute-sanitizer and under stress; `run`, beside this file, builds it.
//
//   launches cases [prefix]   every kernel, in each way it can be instantiated, on ordinary and on hostile operands; or
//                             those whose name begins so, such as `activation_topk bf16`
//   launches once [prefix]    the same, but a case is launched once
//   launches stress           launches of changing kernels and shapes behind each other, on two streams at once,
//                             directly and in CUDA graphs, in workspaces that hold what the launch before left there
//
// A case is launched twice, into results that hold different bytes: where the bits agree, all results were written, and
// made of the operands alone. That they are the right results is for the tests in Python.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "calls.h"

namespace jax_router::launches {
namespace {

using Visit = std::function<void(const Call&)>;

// Experts, and groups of them that the kernels for groups take; 0: none that they do.
struct Experts {
  int32_t experts, num_groups;
};

void hash_router_cases(const Visit& visit) {
  Maker make;
  for (int64_t rows : {1, 1000})
    for (int32_t k : {1, 2, 3, 4, 6, 8, 300}) visit(hash_router(make, rows, k));
}

void activation_topk_cases(const Visit& visit) {
  Maker make;
  for (DType dtype : kDTypes) {
    for (Keys keys : kKeys) {
      // Up to 16 choices of up to 1024 experts: rows in registers, of half a warp where they are many.
      for (auto [experts, num_groups] : {Experts{36, 9},
                                         {37, 0},
                                         {128, 4},
                                         {192, 6},
                                         {256, 8},
                                         {257, 0},
                                         {384, 12},
                                         {511, 0},
                                         {512, 8},
                                         {1024, 32}}) {
        if (keys == Keys::kGroups && num_groups == 0) continue;
        visit(activation_topk(make, dtype, make.pick({1, 17}), experts, make.pick({1, 6, 8, 16}), keys, num_groups,
                              make.pick(kContents)));
        visit(activation_topk(make, dtype, 1025, experts, make.pick({6, 16}), keys, num_groups, Content::kTies));
        if (experts > 512) continue;
        // Rows whose cheap scores do, and rows where they do not.
        for (Content content : {Content::kOrdinary, Content::kBits})
          visit(activation_topk(make, dtype, 4097, experts, make.pick({1, 6, 8}), keys, num_groups, content));
      }
      // More: rows in shared memory.
      for (Content content : kContents) {
        visit(activation_topk(make, dtype, 17, 36, 20, keys, 3, content));
        visit(activation_topk(make, dtype, 17, 1500, 6, keys, 15, content));
        visit(activation_topk(make, dtype, 3, 4095, 64, keys, 15, content));
      }
    }
  }
}

void route_at_cases(const Visit& visit) {
  Maker make;
  for (DType dtype : kDTypes)
    for (int32_t experts : {36, 257})
      for (int32_t k : {1, 6, 8, 64})
        for (int64_t vocab_size : {0, 50})
          visit(route_at(make, dtype, make.pick({1, 33}), experts, k, vocab_size, make.pick(kContents)));
}

void route_cotangent_cases(const Visit& visit) {
  Maker make;
  for (DType dtype : kDTypes) {
    for (ScoreFn score_fn : {ScoreFn::kSqrtSoftplus, ScoreFn::kSigmoid, ScoreFn::kSoftmax, ScoreFn::kIdentity})
      for (int32_t experts : {36, 257, 1024, 4095})
        for (int32_t k : {1, 6, 8, 33, 64})
          visit(route_cotangent(make, dtype, make.pick({1, 2, 33}), experts, k,
                                {score_fn, make.pick({false, true}), 2.5f}, make.pick(kContents)));
    // The gradient of topk_select.
    for (auto [length, k] : {std::array{500, 300}, {4097, 6}, {9001, 700}})
      visit(route_cotangent(make, dtype, 3, length, k, {ScoreFn::kIdentity, false, 1.0f}, make.pick(kContents)));
  }
}

void topk_select_cases(const Visit& visit) {
  using Sizes = std::array<int64_t, 3>;  // rows, length, k
  // Rows in a warp or half of one, for few choices and for more.
  constexpr Sizes kShort[] = {{3, 5, 5},     {3, 256, 6},    {3, 510, 16},    {3, 1024, 9},
                              {4097, 37, 6}, {4097, 128, 1}, {4097, 256, 8},  {4097, 511, 8},
                              {5, 40, 40},   {5, 256, 128},  {1030, 511, 33}, {1030, 1024, 100}};
  // In the registers of a block.
  constexpr Sizes kBlock[] = {{3, 300, 20},     {3, 1999, 6},     {3, 4000, 64},    {3, 8192, 17},
                              {3, 1500, 300},   {3, 4001, 700},   {3, 8000, 900},   {133, 1000, 200},
                              {265, 2001, 200}, {133, 4000, 500}, {265, 4001, 300}, {133, 8000, 1400}};
  // Streamed through one block, or a cluster of 2, 4, 8 and 16.
  constexpr Sizes kLong[] = {{133, 8999, 300}, {3, 9001, 700},  {3, 25001, 2048},
                             {1, 40001, 512},  {1, 65537, 512}, {2, 131073, 8192}};
  Maker make;
  for (DType dtype : kDTypes) {
    const auto visit_all = [&](const auto& all) {
      for (auto [rows, length, k] : all)
        for (Content content : kContents)
          visit(topk_select(make, dtype, rows, length, k, make.pick({false, true}), make.pick({false, true}), content));
    };
    visit_all(kShort);
    visit_all(kBlock);
    visit_all(kLong);
  }
}

void dense_router_cases(const Visit& visit) {
  Maker make;
  for (DType dtype : kDTypes) {
    for (Keys keys : kKeys) {
      for (int64_t rows : {1, make.pick({2, 16}), make.pick({17, 64}), make.pick({65, 128})}) {
        for (auto [experts, num_groups] :
             {Experts{36, 9}, {256, 8}, {257, 0}, {384, 12}, {512, 8}, {1023, 0}, {1024, 32}}) {
          if (keys == Keys::kGroups && num_groups == 0) continue;
          // One step for one warp, several warps, and several steps a warp.
          const int32_t hidden = make.pick({8, 1032, experts > 512 ? 264 : dtype == DType::kF32 ? 5128 : 10248});
          const DenseRouter sizes = dense_sizes(dtype, rows, hidden, experts, make.pick({1, 6, 8, 16}),
                                                keys == Keys::kGroups ? num_groups : 1);
          if (cuda::fuses(sizes)) visit(dense_router(make, sizes, keys, make.pick(kContents)));
        }
      }
      // Many tokens: tiles of every size, one to four parts of the hidden axis, half warps and warps that select.
      for (int64_t rows : {make.pick({129, 250}), make.pick({500, 600}), make.pick({700, 1000}),
                           make.pick({1500, 2100}), make.pick({3000, 4100}), make.pick({5000, 9000})}) {
        for (auto [experts, num_groups] : {Experts{121, 0}, {250, 0}, {256, 8}}) {
          if (keys == Keys::kGroups && num_groups == 0) continue;
          const DenseRouter sizes = dense_sizes(dtype, rows, make.pick({8, 136, 1032}), experts,
                                                make.pick({1, 6, 8, 16}), keys == Keys::kGroups ? num_groups : 1);
          if (cuda::fuses(sizes)) visit(dense_router(make, sizes, keys, make.pick(kContents)));
        }
      }
    }
  }
}

void expert_dispatch_cases(const Visit& visit) {
  Maker make;
  for (int32_t experts : {36, 256, 1000, 4096})
    for (int32_t k : {1, 6})
      for (int64_t choices : {1, 200, 1200, 8200, 40000})  // one block, clusters, a kernel that counts
        for (int64_t batch : {1, 3}) visit(expert_dispatch(make, batch, (choices + k - 1) / k, k, experts));
  // As many choices a thread as there can be: in a cluster, in blocks with one tile, and in blocks with several.
  visit(expert_dispatch(make, 1, 5000, 6, 256));
  visit(expert_dispatch(make, 1, 60000, 6, 256));
  for (int32_t experts : {256, 4096}) visit(expert_dispatch(make, 40, 6000, 6, experts));
}

const std::map<std::string, void (*)(const Visit&)> kOps = {{"activation_topk", activation_topk_cases},
                                                            {"dense_router", dense_router_cases},
                                                            {"expert_dispatch", expert_dispatch_cases},
                                                            {"hash_router", hash_router_cases},
                                                            {"route_at", route_at_cases},
                                                            {"route_cotangent", route_cotangent_cases},
                                                            {"topk_select", topk_select_cases}};

// dense_router looks at its workspace before it has written there, to see whether it was written; any content does. So
// initcheck finds these bytes written. That of expert_dispatch is left as it was allocated.
Buffer make_workspace(const Call& call) {
  Buffer workspace(call.workspace_bytes);
  if (call.name.rfind("dense_router", 0) == 0) workspace.fill(0x5A);
  return workspace;
}

void check_ids(const Call& call, const std::vector<std::vector<char>>& bits) {
  if (call.ids < 0) return;
  const std::vector<char>& bytes = bits[call.ids];
  std::vector<int32_t> ids(bytes.size() / sizeof(int32_t));
  if (!ids.empty()) std::memcpy(ids.data(), bytes.data(), bytes.size());
  for (int32_t id : ids) {
    if (id < -1 || id >= call.ids_below) return fail(call.name, "id " + std::to_string(id));
  }
}

void run_case(const Call& call, bool twice) {
  const Results results(call.result_bytes);
  const Buffer workspace = make_workspace(call);
  const auto launch = [&](int byte) {
    results.fill(byte);
    must(call.launch(results, workspace.data(), cudaStreamPerThread), call.name);
    must(cudaStreamSynchronize(cudaStreamPerThread), call.name);
    return results.read();
  };
  const std::vector<std::vector<char>> bits = launch(0x5A);
  if (twice && launch(0xA5) != bits) fail(call.name, "two launches gave different bits");
  check_ids(call, bits);
}

int run_cases(const std::string& prefix, bool twice) {
  const auto begins = [](const std::string& text, const std::string& with) { return text.rfind(with, 0) == 0; };
  int count = 0;
  for (const auto& [op, cases] : kOps) {
    if (!begins(op, prefix) && !begins(prefix, op)) continue;
    cases([&](const Call& call) {
      if (!begins(call.name, prefix)) return;
      std::printf("%s\n", call.name.c_str());  // so that a tool's report stands below its case
      std::fflush(stdout);
      run_case(call, twice);
      ++count;
    });
  }
  std::printf("%d cases, %d failures\n", count, failures);
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
    for (const Call& call : calls) bytes = std::max(bytes, call.workspace_bytes);
    return bytes;
  }
  void launch_each() {
    for (size_t i = 0; i < which_.size(); ++i) {
      const Call& call = calls_[which_[i]];
      must(call.launch(results_[i], workspace_.data(), stream_), call.name);
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
  for (auto [rows, hidden, experts] : {std::array{1, 4096, 256},
                                       {64, 7168, 384},
                                       {128, 7168, 384},
                                       {17, 2880, 128},
                                       {8, 4096, 512},
                                       {1000, 2048, 256},
                                       {4096, 1024, 256}}) {
    const DenseRouter sizes = dense_sizes(DType::kBF16, rows, hidden, experts, 6, 1);
    if (cuda::fuses(sizes)) calls.push_back(dense_router(make, sizes, Keys::kBias, Content::kOrdinary));
  }
  calls.push_back(dense_router(make, dense_sizes(DType::kF32, 5, 1024, 64, 4, 1), Keys::kLogits, Content::kOrdinary));
  calls.push_back(topk_select(make, DType::kF32, 1, 262209, 2048, false, false, Content::kOrdinary));
  calls.push_back(topk_select(make, DType::kBF16, 4, 65536, 512, true, true, Content::kTies));
  calls.push_back(expert_dispatch(make, 1, 512, 6, 256));
  calls.push_back(expert_dispatch(make, 1, 8192, 6, 384));
  calls.push_back(activation_topk(make, DType::kF32, 64, 256, 6, Keys::kBias, 1, Content::kOrdinary));

  std::vector<std::vector<std::vector<char>>> want;
  for (const Call& call : calls) {
    const Results results(call.result_bytes);
    const Buffer workspace(call.workspace_bytes);
    must(call.launch(results, workspace.data(), cudaStreamPerThread), call.name);
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
