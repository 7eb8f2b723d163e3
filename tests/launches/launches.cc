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
// orders. That they are the right results is for the tests in Python.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <set>
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
      // Up to 16 choices of up to 1024 experts: rows in registers, or in shared memory.
      for (auto [experts, num_groups] : {Experts{5, 0},
                                         {36, 9},
                                         {37, 0},
                                         {128, 4},
                                         {160, 0},
                                         {192, 6},
                                         {256, 8},
                                         {257, 0},
                                         {384, 12},
                                         {511, 0},
                                         {512, 8},
                                         {1024, 32}}) {
        if (keys == Keys::kGroups && num_groups == 0) continue;
        for (Content content : kContents) {
          const int32_t k = std::min(experts, make.pick({1, 6, 8, 16}));
          visit(activation_topk(make, dtype, make.pick({1, 17, 130}), experts, k, keys, num_groups, content));
        }
      }
      // More: rows in shared memory alone.
      for (Content content : kContents) {
        visit(activation_topk(make, dtype, 17, 36, 20, keys, 3, content));
        visit(activation_topk(make, dtype, 17, 1500, 6, keys, 15, content));
        visit(activation_topk(make, dtype, 3, 4095, 64, keys, 15, content));
      }
    }
  }
}

void weighing_cases(const Visit& visit, int64_t vocab_size) {
  Maker make;
  for (DType dtype : kDTypes)
    for (int32_t experts : {36, 257})
      for (int32_t k : {1, 6, 8, 64})
        for (bool whole_row : {false, true}) {
          const Scoring scoring = whole_row ? Scoring{ScoreFn::kSoftmax, false, 2.5f} : make.scoring();
          visit(route_at(make, dtype, make.pick({1, 33}), experts, k, vocab_size, scoring, make.pick(kContents)));
        }
}

void route_at_cases(const Visit& visit) { weighing_cases(visit, 0); }

void scored_hash_router_cases(const Visit& visit) { weighing_cases(visit, 50); }

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
  // In a warp or half of one, in the registers of a block, and streamed through one block or a cluster of up to 16.
  constexpr Sizes kSizes[] = {{2, 1, 1},        {3, 5, 5},        {3, 256, 6},      {33, 37, 6},      {130, 128, 1},
                              {3, 510, 16},     {3, 1024, 9},     {5, 40, 40},      {5, 256, 128},    {30, 511, 33},
                              {30, 1024, 100},  {3, 1999, 6},     {3, 4000, 64},    {3, 8192, 17},    {3, 1500, 300},
                              {3, 2001, 200},   {3, 4001, 700},   {133, 4000, 500}, {3, 8000, 900},   {133, 8000, 1400},
                              {133, 8999, 300}, {3, 2000, 2000},  {3, 9001, 700},   {3, 25001, 2048}, {1, 40001, 512},
                              {1, 65537, 512},  {2, 131073, 8192}};
  Maker make;
  for (DType dtype : kDTypes)
    for (auto [rows, length, k] : kSizes)
      for (Content content : kContents)
        visit(topk_select(make, dtype, rows, length, k, make.pick({false, true}), make.pick({false, true}), content));
  // Zeros of which a block's sample promises more than there are.
  for (DType dtype : kDTypes)
    visit(topk_select(make, dtype, 3, 40960, 512, make.pick({false, true}), false, Content::kZeros));
  // So many choices that a block takes no sample and has no room for its whole row, whose largest elements are those
  // behind the last whole vector.
  for (DType dtype : kDTypes)
    for (auto [length, k] : {std::array{12285, 4096}, {24573, 8192}})
      visit(topk_select(make, dtype, 140, length, k, make.pick({false, true}), false, Content::kRising));
}

void dense_router_cases(const Visit& visit) {
  Maker make;
  for (const auto& [x, weight] : cuda::kOperandDTypes) {
    for (Keys keys : kKeys) {
      for (int64_t rows : {make.pick({1, 2, 16}), make.pick({17, 64, 65, 128})}) {
        for (auto [experts, num_groups] :
             {Experts{36, 9}, {256, 8}, {257, 0}, {384, 12}, {512, 8}, {1023, 0}, {1024, 32}}) {
          if (keys == Keys::kGroups && num_groups == 0) continue;
          // One step for one warp, several warps, and several steps a warp.
          const int32_t hidden = make.pick({8, 1032, experts > 512 ? 264 : x == DType::kF32 ? 5128 : 10248});
          const DenseRouter sizes = dense_sizes(x, weight, rows, hidden, experts, make.pick({1, 6, 8, 16}),
                                                keys == Keys::kGroups ? num_groups : 1);
          visit(dense_router(make, sizes, keys, make.pick(kContents)));
        }
      }
      // Many tokens: one to four parts of the hidden axis, half warps and warps that select, several waves.
      for (int64_t rows : {make.pick({129, 250}), make.pick({500, 3000})}) {
        for (auto [experts, num_groups] : {Experts{121, 0}, {250, 0}, {256, 8}}) {
          if (keys == Keys::kGroups && num_groups == 0) continue;
          const DenseRouter sizes = dense_sizes(x, weight, rows, make.pick({8, 136, 1032}), experts,
                                                make.pick({1, 6, 8, 16}), keys == Keys::kGroups ? num_groups : 1);
          visit(dense_router(make, sizes, keys, make.pick(kContents)));
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
  // Groups that end in slots without a choice, and groups that drop choices, in every kernel.
  for (int32_t experts : {36, 4096})
    for (int64_t tokens : {1, 200, 1400, 9000, 70000})
      for (int32_t align : {1, 100, 128})
        for (int32_t capacity : {0, 1, 100, INT32_MAX})
          visit(expert_dispatch(make, 1, tokens, 6, experts, align, capacity));
}

void expert_counts_cases(const Visit& visit) {
  Maker make;
  for (int32_t experts : {1, 36, 256, 4096})
    for (int32_t k : {1, 6})
      for (int64_t choices : {1, 203, 8200, 40000, 500000})  // one block, clusters, several of them
        for (int64_t batch : {1, 3}) visit(expert_counts(make, batch, (choices + k - 1) / k, k, experts));
}

// Rows of pieces and of single elements, shorter and longer than a warp's and a block's; one token, many, and several
// problems; few choices, and more than a warp's lanes; no slots but those in use, and many.
void moved_cases(const std::function<void(DType, const MovedSizes&, Content)>& visit) {
  constexpr MovedSizes kSizes[] = {{1, 1, 8, 2048, 0},   {1, 1, 1, 8, 0},     {1, 64, 6, 1032, 300},
                                   {2, 33, 3, 72, 9},    {1, 17, 8, 7168, 5}, {3, 5, 33, 257, 1},
                                   {1, 9, 64, 40, 1000}, {1, 700, 2, 1, 40},  {1, 3, 12, 4099, 3},
                                   {1, 2500, 8, 520, 0}, {1, 0, 4, 64, 11},   {2, 60, 0, 96, 30}};
  Maker make;
  for (DType dtype : kDTypes) {
    for (MovedSizes sizes : kSizes) {
      visit(dtype, sizes, make.pick(kContents));
      sizes.hostile = true;
      if (sizes.tokens > 0) visit(dtype, sizes, make.pick(kContents));
    }
  }
}

void permute_cases(const Visit& visit) {
  Maker make;
  moved_cases([&](DType dtype, const MovedSizes& sizes, Content content) {
    visit(permute(make, dtype, size_of(dtype), false, sizes, content));
    visit(permute(make, dtype, size_of(dtype), true, sizes, content));
    if (dtype == DType::kF16) visit(permute(make, dtype, 1, false, sizes, content));
  });
}

void combine_cases(const Visit& visit) {
  Maker make;
  moved_cases([&](DType dtype, const MovedSizes& sizes, Content content) {
    visit(combine(make, dtype, make.pick({false, true}), sizes, content));
  });
  // Few rows, each for many tokens: batches of them, and blocks that own the end of a segment and the begin of the
  // next.
  for (DType dtype : kDTypes) {
    for (const MovedSizes& sizes :
         {MovedSizes{1, 700, 6, 2056, -4000}, MovedSizes{1, 260, 16, 1040, -4000}, MovedSizes{1, 129, 1, 8, -100},
          MovedSizes{1, 3000, 7, 4096, -20800}, MovedSizes{1, 300, 0, 64, 10}})
      visit(combine(make, dtype, true, sizes, make.pick(kContents)));
  }
}

void permute_cotangent_cases(const Visit& visit) {
  Maker make;
  moved_cases([&](DType dtype, const MovedSizes& sizes, Content content) {
    if (sizes.tokens > 0) visit(permute_cotangent(make, dtype, sizes, content));
  });
}

void combine_cotangent_cases(const Visit& visit) {
  Maker make;
  moved_cases([&](DType dtype, const MovedSizes& sizes, Content content) {
    visit(combine_cotangent(make, dtype, sizes, content));
  });
}

// The cases of an op, and its kernels, each of which must be in the plans of one of them.
struct OpCases {
  void (*visit)(const Visit&);
  std::vector<std::string> (*instances)(const cuda::Device&);
};

template <class Op>
std::vector<std::string> instances_of(const cuda::Device& device) {
  return cuda::instances(Op{}, device);
}

const std::map<std::string, OpCases> kOps = {
    {"activation_topk", {activation_topk_cases, instances_of<ActivationTopk>}},
    {"combine", {combine_cases, instances_of<Combine>}},
    {"combine_cotangent", {combine_cotangent_cases, instances_of<CombineCotangent>}},
    {"dense_router", {dense_router_cases, instances_of<DenseRouter>}},
    {"expert_counts", {expert_counts_cases, instances_of<ExpertCounts>}},
    {"expert_dispatch", {expert_dispatch_cases, instances_of<ExpertDispatch>}},
    {"hash_router", {hash_router_cases, instances_of<HashRouter>}},
    {"permute", {permute_cases, instances_of<Permute>}},
    {"permute_cotangent", {permute_cotangent_cases, instances_of<PermuteCotangent>}},
    {"route_at", {route_at_cases, instances_of<RouteAt>}},
    {"route_cotangent", {route_cotangent_cases, instances_of<RouteCotangent>}},
    {"scored_hash_router", {scored_hash_router_cases, instances_of<RouteAt>}},
    {"topk_select", {topk_select_cases, instances_of<TopkSelect>}}};

// dense_router looks at its workspace before it has written there, to see whether it was written; any content does. So
// initcheck finds these bytes written. That of expert_dispatch is left as it was allocated.
Buffer make_workspace(const Call& call, size_t bytes) {
  Buffer workspace(bytes);
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

// Adds the kernels of the case's plans to `seen`.
void run_case(const Call& call, bool twice, std::set<std::string>& seen) {
  const Results results(call.result_bytes);
  std::vector<std::vector<char>> of_first;
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
    const std::vector<std::vector<char>> bits = launch(0x5A);
    if (twice && launch(0xA5) != bits) fail(what, "two launches gave different bits");
    if (of_first.empty()) of_first = bits;
    if (call.is_exact && bits != of_first) fail(what, "other bits than by " + call.ways.front().plan);
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
