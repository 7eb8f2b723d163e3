// Launches the CUDA kernels without JAX, for compute-sanitizer and under stress; `run`, beside this file, builds it.
//
//   launches cases [prefix]   every kernel, in each way it can be instantiated, on ordinary and on hostile operands; or
//                             those whose name begins so, such as `activation_topk bf16`
//   launches once [prefix]    the same, but a case is launched once
//   launches stress           launches of changing kernels and shapes behind each other, on two streams at once,
//                             directly and in CUDA graphs, in workspaces that hold what the launch before left there
//
// Every buffer of a case is an allocation of exactly its size, so that an access past its end shows. A case is launched
// twice, into results that hold different bytes: where the bits agree, all results were written, and made of the
// operands alone. That they are the right results is for the tests in Python.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/kernels.h"

namespace jax_router {
namespace {

int failures = 0;

void fail(const std::string& what, const std::string& why) {
  ++failures;
  std::printf("FAILED %s: %s\n", what.c_str(), why.c_str());
}

// Nothing that follows would mean anything after such an error.
void must(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  fail(what, cudaGetErrorString(status));
  std::exit(2);
}

// Device memory.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    void* data = nullptr;
    must(cudaMalloc(&data, std::max<size_t>(bytes, 1)), "cudaMalloc");
    data_.reset(data);
  }
  Buffer(const void* host, size_t bytes) : Buffer(bytes) {
    must(cudaMemcpy(data(), host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }

  void* data() const { return data_.get(); }
  void fill(int byte) const { must(cudaMemset(data(), byte, bytes_), "cudaMemset"); }
  std::vector<char> read() const {
    std::vector<char> host(bytes_);
    must(cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
  }

 private:
  struct Free {
    void operator()(void* data) const { cudaFree(data); }
  };
  size_t bytes_;
  std::unique_ptr<void, Free> data_;
};

// A call's results, each a buffer of its own.
class Results {
 public:
  explicit Results(const std::vector<size_t>& bytes) : buffers_(bytes.begin(), bytes.end()) {}

  template <class T>
  T* get(size_t i) const {
    return static_cast<T*>(buffers_[i].data());
  }
  void fill(int byte) const {
    for (const Buffer& buffer : buffers_) buffer.fill(byte);
  }
  std::vector<std::vector<char>> read() const {
    std::vector<std::vector<char>> bits;
    for (const Buffer& buffer : buffers_) bits.push_back(buffer.read());
    return bits;
  }

 private:
  std::vector<Buffer> buffers_;
};

using Launch = std::function<cudaError_t(const Results&, void* workspace, cudaStream_t)>;

// An op with its operands in device memory.
struct Call {
  std::string name;
  std::vector<std::shared_ptr<Buffer>> operands;
  std::vector<size_t> result_bytes;
  size_t workspace_bytes = 0;
  Launch launch;
  int ids = -1;           // the result that holds ids, if they are such as
  int64_t ids_below = 0;  // -1 <= id < ids_below
};

// What the floating-point numbers of an operand are.
enum class Content {
  kOrdinary,
  kBits,    // any: NaN of both signs, infinities, denormals
  kTies,    // one of four
  kRising,  // neighbours in ascending order
};
constexpr Content kContents[] = {Content::kOrdinary, Content::kBits, Content::kTies, Content::kRising};

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};

size_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// Makes calls. What does not decide which kernel runs is picked at random, alike in every run.
class Maker {
 public:
  Maker() : words_(1 << 20) {
    for (uint32_t& word : words_) word = random_();
  }

  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[random_() % choices.size()];
  }
  Content pick(const Content (&contents)[4]) { return contents[random_() % 4]; }

  // The name of the next call: an op and its sizes, and of floating-point operands the type and the content before
  // these.
  using Sizes = std::initializer_list<std::pair<const char*, int64_t>>;
  void name(std::string op, Sizes sizes) {
    call_ = {};
    call_.name = std::move(op);
    for (const auto& [what, size] : sizes) call_.name += std::string(" ") + what + std::to_string(size);
  }
  void name(const std::string& op, DType dtype, Content content, Sizes sizes) {
    constexpr const char* kContentNames[] = {" ordinary", " bits", " ties", " rising"};
    const char* type = dtype == DType::kF32 ? " f32" : dtype == DType::kBF16 ? " bf16" : " f16";
    name(op + type + kContentNames[static_cast<int>(content)], sizes);
  }

  template <class T>
  const T* operand(const std::vector<T>& values) {
    call_.operands.push_back(std::make_shared<Buffer>(values.data(), values.size() * sizeof(T)));
    return static_cast<const T*>(call_.operands.back()->data());
  }
  const void* floats(DType dtype, int64_t count, Content content) {
    if (dtype == DType::kF32) return operand(numbers<float>(count, content));
    if (dtype == DType::kBF16) return operand(numbers<__nv_bfloat16>(count, content));
    return operand(numbers<__half>(count, content));
  }
  const float* floats(int64_t count, Content content) { return operand(numbers<float>(count, content)); }

  // Most of them below `bound`, some equal to it, some of any bits.
  const int32_t* ids(int64_t count, int64_t bound) {
    std::vector<int32_t> values(count);
    for (int32_t& value : values) {
      const uint32_t kind = random_() % 16;
      value = static_cast<int32_t>(kind == 0 ? random_() : kind == 1 ? bound : random_() % bound);
    }
    return operand(values);
  }
  const int32_t* lengths(int64_t count, int64_t length, int64_t k) {
    std::vector<int32_t> values(count);
    for (int32_t& value : values) {
      value = static_cast<int32_t>(pick<int64_t>({-5, 0, k - 1, k, k + 1, length - 1, length, length + 7}));
    }
    return operand(values);
  }
  const bool* mask(int64_t count) {
    std::vector<uint8_t> values(count);
    for (uint8_t& value : values) value = random_() % 4 != 0;
    return reinterpret_cast<const bool*>(operand(values));
  }

  Scoring scoring() {
    return {pick({ScoreFn::kSqrtSoftplus, ScoreFn::kSigmoid, ScoreFn::kSoftmax}), pick({false, true}), 2.5f};
  }

  // `launch` has a copy of the op, since its results differ from launch to launch.
  Call finish(std::vector<size_t> result_bytes, Launch launch, size_t workspace_bytes = 0) {
    call_.result_bytes = std::move(result_bytes);
    call_.launch = std::move(launch);
    call_.workspace_bytes = workspace_bytes;
    return std::move(call_);
  }
  static Call with_ids(Call call, int result, int64_t below) {
    call.ids = result;
    call.ids_below = below;
    return call;
  }

 private:
  template <class T>
  std::vector<T> numbers(int64_t count, Content content) {
    std::vector<T> values(count);
    const uint32_t first = random_();
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = words_[(first + i) % words_.size()];
      if (content == Content::kBits) {
        std::memcpy(static_cast<void*>(&values[i]), &bits, sizeof(T));
      } else if (content == Content::kRising) {
        const uint32_t rising = sizeof(T) == 4 ? 0x3F800000 + i % 0x400000 : 0x3C00 + i % 0x4000;
        std::memcpy(static_cast<void*>(&values[i]), &rising, sizeof(T));
      } else {
        values[i] = T(content == Content::kTies ? static_cast<float>(bits % 4) : (bits >> 8) * 0x1p-21f - 4.0f);
      }
    }
    return values;
  }

  std::mt19937 random_{1};
  std::vector<uint32_t> words_;  // random, of which the numbers are made
  Call call_;
};

Call hash_router(Maker& make, int64_t rows, int32_t k) {
  make.name("hash_router", {{"N", rows}, {"k", k}});
  HashRouter op{};
  op.rows = rows;
  op.vocab_size = 50;
  op.k = k;
  op.token_ids = make.ids(rows, op.vocab_size);
  op.hash_lut = make.ids(op.vocab_size * k, 256);
  op.scale = 1.5f;
  const size_t choices = rows * k;
  return make.finish({4 * choices, 4 * choices}, [op](const Results& results, void*, cudaStream_t stream) mutable {
    op.weights = results.get<float>(0);
    op.expert_ids = results.get<int32_t>(1);
    return cuda::launch(op, stream);
  });
}

// How the keys that select are made; with groups, of as many as given.
enum class Keys { kLogits, kBias, kBiasOfToken, kGroups };
constexpr Keys kKeys[] = {Keys::kLogits, Keys::kBias, Keys::kBiasOfToken, Keys::kGroups};

// All of an ActivationTopk but logits and results.
ActivationTopk selection(Maker& make, int64_t rows, int32_t experts, int32_t k, Keys keys, int32_t num_groups,
                         Content content) {
  ActivationTopk op{};
  op.rows = rows;
  op.experts = experts;
  op.k = k;
  op.scoring = make.scoring();
  op.groups = {1, 1, make.pick({GroupScore::kTop2Sum, GroupScore::kMax})};
  if (keys == Keys::kGroups) op.groups = {num_groups, (num_groups + 1) / 2, op.groups.score};
  if (keys == Keys::kBiasOfToken) {
    op.bias = make.floats(rows * experts, content);
    op.bias_stride = experts;
  } else if (keys == Keys::kBias || (keys == Keys::kGroups && make.pick({false, true}))) {
    op.bias = make.floats(experts, content);
  }
  if (make.pick({false, true})) op.token_mask = make.mask(rows);
  return op;
}

std::vector<size_t> result_bytes(const ActivationTopk& op) {
  const size_t bytes = 4 * op.rows * op.k;
  return {bytes, bytes, bytes};
}

void set_results(ActivationTopk& op, const Results& results) {
  op.weights = results.get<float>(0);
  op.expert_ids = results.get<int32_t>(1);
  op.chosen_logits = results.get<float>(2);
}

Call activation_topk(Maker& make, DType dtype, int64_t rows, int32_t experts, int32_t k, Keys keys, int32_t num_groups,
                     Content content) {
  make.name("activation_topk", dtype, content,
            {{"N", rows}, {"E", experts}, {"k", k}, {"keys ", static_cast<int>(keys)}, {"groups ", num_groups}});
  ActivationTopk op = selection(make, rows, experts, k, keys, num_groups, content);
  op.dtype = dtype;
  op.logits = make.floats(dtype, rows * experts, content);
  const auto launch = [op](const Results& results, void*, cudaStream_t stream) mutable {
    set_results(op, results);
    return cuda::launch(op, stream);
  };
  return Maker::with_ids(make.finish(result_bytes(op), launch), 1, experts);
}

Call dense_router(Maker& make, const DenseRouter& sizes, Keys keys, Content content) {
  const ActivationTopk& select = sizes.select;
  make.name("dense_router", sizes.operand_dtype, content,
            {{"N", select.rows},
             {"D", sizes.hidden},
             {"E", select.experts},
             {"k", select.k},
             {"keys ", static_cast<int>(keys)},
             {"groups ", select.groups.num_groups}});
  DenseRouter op = sizes;
  op.select = selection(make, select.rows, select.experts, select.k, keys, select.groups.num_groups, content);
  op.x = make.floats(op.operand_dtype, select.rows * op.hidden, content);
  op.weight = make.floats(op.operand_dtype, static_cast<int64_t>(select.experts) * op.hidden, content);
  if (make.pick({false, true})) op.logit_bias = make.floats(select.experts, content);
  const auto launch = [op](const Results& results, void* workspace, cudaStream_t stream) mutable {
    set_results(op.select, results);
    return cuda::launch(op, workspace, stream);
  };
  return Maker::with_ids(make.finish(result_bytes(op.select), launch, cuda::workspace_bytes(op)), 1, select.experts);
}

DenseRouter dense_sizes(DType dtype, int64_t rows, int32_t hidden, int32_t experts, int32_t k, int32_t num_groups) {
  DenseRouter op{};
  op.operand_dtype = dtype;
  op.hidden = hidden;
  op.select.rows = rows;
  op.select.experts = experts;
  op.select.k = k;
  op.select.groups.num_groups = num_groups;
  return op;
}

// With a vocabulary the ids are those of a table.
Call route_at(Maker& make, DType dtype, int64_t rows, int32_t experts, int32_t k, int64_t vocab_size, Content content) {
  make.name(vocab_size > 0 ? "route_at by token" : "route_at", dtype, content, {{"N", rows}, {"E", experts}, {"k", k}});
  RouteAt op{};
  op.rows = rows;
  op.experts = experts;
  op.k = k;
  op.dtype = dtype;
  op.logits = make.floats(dtype, rows * experts, content);
  op.vocab_size = vocab_size;
  if (vocab_size > 0) op.token_ids = make.ids(rows, vocab_size);
  op.expert_ids = make.ids((vocab_size > 0 ? vocab_size : rows) * k, experts);
  op.scoring = make.scoring();
  const size_t bytes = 4 * rows * k;
  const auto launch = [op](const Results& results, void*, cudaStream_t stream) mutable {
    op.weights = results.get<float>(0);
    op.valid_ids = results.get<int32_t>(1);
    op.chosen_logits = results.get<float>(2);
    return cuda::launch(op, stream);
  };
  return Maker::with_ids(make.finish({bytes, bytes, bytes}, launch), 1, experts);
}

Call route_cotangent(Maker& make, DType dtype, int64_t rows, int32_t experts, int32_t k, Scoring scoring,
                     Content content) {
  make.name("route_cotangent", dtype, content,
            {{"N", rows}, {"E", experts}, {"k", k}, {"score_fn ", static_cast<int>(scoring.score_fn)}});
  RouteCotangent op{};
  op.rows = rows;
  op.experts = experts;
  op.k = k;
  op.dtype = dtype;
  op.scoring = scoring;
  op.grad_weights = make.floats(rows * k, content);
  if (scoring.needs_whole_row()) {
    op.residual = make.floats(dtype, rows * experts, content);
  } else if (scoring.score_fn != ScoreFn::kIdentity) {
    op.residual = make.floats(rows * k, content);
  }
  op.expert_ids = make.ids(rows * k, experts);
  return make.finish({rows * experts * size_of(dtype)},
                     [op](const Results& results, void*, cudaStream_t stream) mutable {
                       op.grad_logits = results.get<void>(0);
                       return cuda::launch(op, stream);
                     });
}

Call topk_select(Maker& make, DType dtype, int64_t rows, int64_t length, int64_t k, bool sorted, bool has_lengths,
                 Content content) {
  make.name("topk_select", dtype, content,
            {{"B", rows}, {"L", length}, {"k", k}, {"sorted ", sorted}, {"lengths ", has_lengths}});
  TopkSelect op{};
  op.rows = rows;
  op.length = length;
  op.k = k;
  op.dtype = dtype;
  op.sorted = sorted;
  op.scores = make.floats(dtype, rows * length, content);
  if (has_lengths) op.lengths = make.lengths(rows, length, k);
  const auto launch = [op](const Results& results, void*, cudaStream_t stream) mutable {
    op.values = results.get<void>(0);
    op.indices = results.get<int32_t>(1);
    return cuda::launch(op, stream);
  };
  return Maker::with_ids(make.finish({rows * k * size_of(dtype), 4 * static_cast<size_t>(rows * k)}, launch), 1,
                         length);
}

Call expert_dispatch(Maker& make, int64_t batch, int64_t tokens, int32_t k, int32_t experts) {
  make.name("expert_dispatch", {{"batch ", batch}, {"N", tokens}, {"E", experts}, {"k", k}});
  ExpertDispatch op{};
  op.batch = batch;
  op.tokens = tokens;
  op.k = k;
  op.experts = experts;
  op.expert_ids = make.ids(batch * tokens * k, experts);
  const size_t choices = batch * tokens * k;
  const auto launch = [op](const Results& results, void* workspace, cudaStream_t stream) mutable {
    op.token_index = results.get<int32_t>(0);
    op.slot = results.get<int32_t>(1);
    op.group_sizes = results.get<int32_t>(2);
    return cuda::launch(op, workspace, stream);
  };
  const std::vector<size_t> bytes{4 * choices, 4 * choices, 4 * static_cast<size_t>(batch * experts)};
  return Maker::with_ids(make.finish(bytes, launch, cuda::workspace_bytes(op)), 1, tokens * k);
}

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
        visit(activation_topk(make, dtype, 4097, experts, make.pick({1, 6, 8}), keys, num_groups, Content::kBits));
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
  for (auto [rows, hidden, experts] :
       {std::array{1, 4096, 256}, {64, 7168, 384}, {128, 7168, 384}, {17, 2880, 128}, {8, 4096, 512}}) {
    calls.push_back(
        dense_router(make, dense_sizes(DType::kBF16, rows, hidden, experts, 6, 1), Keys::kBias, Content::kOrdinary));
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
}  // namespace jax_router

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "cases" || what == "once") return jax_router::run_cases(argc > 2 ? argv[2] : "", what == "cases");
  if (what == "stress") return jax_router::run_stress();
  std::fprintf(stderr, "usage: launches cases|once [prefix], or launches stress\n");
  return 2;
}
