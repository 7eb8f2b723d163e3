// What `launches` launches: the ops of csrc/cuda/kernels.h on operands that lie in device memory, each buffer an
// allocation of exactly its size, so that an access past its end shows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../csrc/common/order.h"
#include "../../csrc/cuda/kernels.h"

namespace jax_router::launches {

inline int failures = 0;

inline void fail(const std::string& what, const std::string& why) {
  ++failures;
  std::printf("FAILED %s: %s\n", what.c_str(), why.c_str());
}

// Nothing that follows would mean anything after such an error.
inline void must(cudaError_t status, const std::string& what) {
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
  size_t bytes() const { return bytes_; }
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

// The bytes of each result.
using Bits = std::vector<std::vector<char>>;

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
  Bits read() const {
    Bits bits;
    for (const Buffer& buffer : buffers_) bits.push_back(buffer.read());
    return bits;
  }

 private:
  std::vector<Buffer> buffers_;
};

// One way to compute a call.
struct Way {
  std::string plan;  // its name
  int64_t workspace_bytes;
  std::function<cudaError_t(const Results&, void* workspace, cudaStream_t)> launch;
};

// An op with its operands in device memory.
struct Call {
  std::string name;
  std::vector<std::shared_ptr<Buffer>> operands;
  std::vector<size_t> result_bytes;
  std::vector<Way> ways;           // every plan
  size_t chosen = 0;               // the one that launches take
  bool is_exact = true;            // all plans give the same bits
  std::function<Bits()> expected;  // those, where the host can tell
  int ids = -1;                    // the result that holds ids, if they are such as
  int64_t ids_below = 0;           // -1 <= id < ids_below

  const Way& way() const { return ways[chosen]; }
};

// What is wrong where they are not the same.
inline std::string other_bits(const Call& call) {
  return "other bits than " + (call.expected ? "on the host" : "by " + call.ways.front().plan);
}

inline void check_ids(const Call& call, const Bits& bits) {
  if (call.ids < 0) return;
  const std::vector<char>& bytes = bits[call.ids];
  std::vector<int32_t> ids(bytes.size() / sizeof(int32_t));
  if (!ids.empty()) std::memcpy(ids.data(), bytes.data(), bytes.size());
  for (int32_t id : ids) {
    if (id < -1 || id >= call.ids_below) return fail(call.name, "id " + std::to_string(id));
  }
}

// What topk_select gives, by a sort on the host.
template <class T>
Bits sorted_on_host(const TopkSelect& op, const std::vector<char>& scores, const std::vector<char>& lengths) {
  Bits bits{std::vector<char>(op.rows * op.k * sizeof(T)), std::vector<char>(op.rows * op.k * sizeof(int32_t))};
  auto* value = reinterpret_cast<T*>(bits[0].data());
  auto* index = reinterpret_cast<int32_t*>(bits[1].data());
  const auto* row = reinterpret_cast<const T*>(scores.data());
  std::vector<uint64_t> pairs(op.length);
  for (int64_t r = 0; r < op.rows; ++r, row += op.length, value += op.k, index += op.k) {
    int64_t length = op.length;
    if (!lengths.empty()) {
      length = std::clamp<int64_t>(reinterpret_cast<const int32_t*>(lengths.data())[r], 0, op.length);
    }
    const int64_t k = std::min(op.k, length);
    for (int64_t i = 0; i < length; ++i) pairs[i] = order_pair(order_key(static_cast<float>(row[i])), i);
    const auto begin = pairs.begin(), chosen = begin + k, end = begin + length;
    std::nth_element(begin, chosen, end, std::greater<uint64_t>());
    std::sort(begin, chosen,
              [&op](uint64_t a, uint64_t b) { return op.sorted ? a > b : pair_index(a) < pair_index(b); });
    std::fill_n(value, op.k, T(-INFINITY));
    std::fill_n(index, op.k, -1);
    for (int64_t i = 0; i < k; ++i) {
      index[i] = static_cast<int32_t>(pair_index(pairs[i]));
      value[i] = row[index[i]];
    }
  }
  return bits;
}

// What the floating-point numbers of an operand are.
enum class Content {
  kOrdinary,
  kBits,      // any: NaN of both signs, infinities, denormals
  kTies,      // one of four
  kRising,    // neighbours in ascending order
  kZeros,     // -1, but for stretches of -0 with a few 0
  kNarrow,    // one of six that lie close together
  kSteps,     // one of sixteen
  kBinade,    // one of the numbers from 1 to 2 of an f16, or of a bf16 in other types
  kOutliers,  // one in 64 as large as can be, of either sign, or NaN
  kDenormals,
  kSpikes,  // -1, but for an element of each of the first 64 vectors of 16 bytes, in ascending order
};
// Those that every case has.
constexpr Content kContents[] = {Content::kOrdinary, Content::kBits, Content::kTies, Content::kRising, Content::kZeros};

using cuda::kDTypes;
using cuda::size_of;

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
  Content pick(const Content (&contents)[5]) { return contents[random_() % 5]; }

  // The name of the next call: an op and its sizes, and of floating-point operands the type and the content before
  // these.
  using Sizes = std::initializer_list<std::pair<const char*, int64_t>>;
  void name(std::string op, Sizes sizes) {
    call_ = {};
    call_.name = std::move(op);
    for (const auto& [what, size] : sizes) call_.name += std::string(" ") + what + std::to_string(size);
  }
  void name(const std::string& op, DType dtype, Content content, Sizes sizes) {
    constexpr const char* kContentNames[] = {" ordinary", " bits",   " ties",     " rising",    " zeros", " narrow",
                                             " steps",    " binade", " outliers", " denormals", " spikes"};
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
  std::vector<int32_t> permutation(int64_t count) {
    std::vector<int32_t> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<int32_t>(i);
    std::shuffle(values.begin(), values.end(), random_);
    return values;
  }
  const int32_t* lengths(int64_t count, int64_t length, int64_t k) {
    std::vector<int32_t> values(count);
    for (int32_t& value : values) {
      value = static_cast<int32_t>(pick<int64_t>({-5, 0, k - 1, k, k + 1, length - 1, length, length + 7}));
    }
    return operand(values);
  }
  const uint8_t* mask(int64_t count) {
    std::vector<uint8_t> values(count);
    for (uint8_t& value : values) value = random_() % 4 != 0;
    return operand(values);
  }

  Scoring scoring() {
    return {pick({ScoreFn::kSqrtSoftplus, ScoreFn::kSigmoid, ScoreFn::kSoftmax}), pick({false, true}), 2.5f, 1e-20f};
  }

  // set_results(op, results) puts the results of a launch into a copy of the op.
  template <class Op, class SetResults>
  Call finish(const Op& op, std::vector<size_t> result_bytes, SetResults set_results) {
    const cuda::Device* device = cuda::current_device();
    if (device == nullptr) must(cudaErrorInvalidDevice, call_.name);
    const auto chosen = plan(op, *device);
    for (const auto& candidate : plans(op, *device)) {
      if (chosen && cuda::name(op, candidate) == cuda::name(op, *chosen)) call_.chosen = call_.ways.size();
      call_.ways.push_back({cuda::name(op, candidate), cuda::workspace_bytes(candidate),
                            [op, candidate, set_results](const Results& results, void* workspace, cudaStream_t stream) {
                              Op of_launch = op;
                              set_results(of_launch, results);
                              if constexpr (cuda::kHasWorkspace<std::decay_t<decltype(candidate)>>)
                                of_launch.workspace.data = workspace;
                              return cuda::run(of_launch, candidate, stream);
                            }});
    }
    call_.result_bytes = std::move(result_bytes);
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
      } else if (content == Content::kZeros) {
        values[i] = T(i % 2560 >= 512 ? -1.0f : bits % 50 == 0 ? 0.0f : -0.0f);
      } else if (content == Content::kNarrow) {
        values[i] = T(1.0f + bits % 6 * 0x1p-7f);
      } else if (content == Content::kSteps) {
        values[i] = T(static_cast<float>(bits % 16));
      } else if (content == Content::kBinade) {
        values[i] = T(1.0f + (std::is_same_v<T, __half> ? bits % 1024 * 0x1p-10f : bits % 128 * 0x1p-7f));
      } else if (content == Content::kOutliers && bits % 64 == 0) {
        values[i] = T(bits >> 6 & 1 ? bits >> 7 & 1 ? NAN : -3e38f : 3e38f);
      } else if (content == Content::kDenormals) {
        const uint32_t sign = 1u << (8 * sizeof(T) - 1), below = std::is_same_v<T, __half> ? 0x400 : sign >> 8;
        const uint32_t denormal = (bits & sign) | bits % below;
        std::memcpy(static_cast<void*>(&values[i]), &denormal, sizeof(T));
      } else if (content == Content::kSpikes) {
        constexpr int64_t kElements = 16 / sizeof(T);
        values[i] = T(i % kElements == 0 && i < 64 * kElements ? 1.0f + i / kElements : -1.0f);
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

inline Call hash_router(Maker& make, int64_t rows, int32_t k) {
  make.name("hash_router", {{"N", rows}, {"k", k}});
  HashRouter op{};
  op.rows = rows;
  op.vocab_size = 50;
  op.k = k;
  op.token_ids = make.ids(rows, op.vocab_size);
  op.hash_lut = make.ids(op.vocab_size * k, 256);
  op.scale = 1.5f;
  const size_t choices = rows * k;
  return make.finish(op, {4 * choices, 4 * choices}, [](HashRouter& op, const Results& results) {
    op.weights = results.get<float>(0);
    op.expert_ids = results.get<int32_t>(1);
  });
}

// How the keys that select are made; with groups, of as many as given.
enum class Keys { kLogits, kBias, kBiasOfToken, kGroups };
constexpr Keys kKeys[] = {Keys::kLogits, Keys::kBias, Keys::kBiasOfToken, Keys::kGroups};

// All of an ActivationTopk but logits and results.
inline ActivationTopk selection(Maker& make, int64_t rows, int32_t experts, int32_t k, Keys keys, int32_t num_groups,
                                Content content) {
  ActivationTopk op{};
  op.rows = rows;
  op.selection.experts = experts;
  op.selection.k = k;
  op.selection.scoring = make.scoring();
  op.selection.groups = {1, 1, make.pick({GroupScore::kTop2Sum, GroupScore::kMax})};
  if (keys == Keys::kGroups) op.selection.groups = {num_groups, (num_groups + 1) / 2, op.selection.groups.score};
  if (keys == Keys::kBiasOfToken) {
    op.bias = make.floats(rows * experts, content);
    op.bias_stride = experts;
  } else if (keys == Keys::kBias || (keys == Keys::kGroups && make.pick({false, true}))) {
    op.bias = make.floats(experts, content);
  }
  if (make.pick({false, true})) op.token_mask = make.mask(rows);
  return op;
}

inline std::vector<size_t> result_bytes(const ActivationTopk& op) {
  const size_t bytes = 4 * op.rows * op.selection.k;
  return {bytes, bytes, bytes};
}

inline void set_results(ActivationTopk& op, const Results& results) {
  op.weights = results.get<float>(0);
  op.expert_ids = results.get<int32_t>(1);
  op.chosen_logits = results.get<float>(2);
}

inline Call activation_topk(Maker& make, DType dtype, int64_t rows, int32_t experts, int32_t k, Keys keys,
                            int32_t num_groups, Content content) {
  make.name("activation_topk", dtype, content,
            {{"N", rows}, {"E", experts}, {"k", k}, {"keys ", static_cast<int>(keys)}, {"groups ", num_groups}});
  ActivationTopk op = selection(make, rows, experts, k, keys, num_groups, content);
  op.dtype = dtype;
  op.logits = make.floats(dtype, rows * experts, content);
  return Maker::with_ids(make.finish(op, result_bytes(op), set_results), 1, experts);
}

inline Call dense_router(Maker& make, const DenseRouter& sizes, Keys keys, Content content) {
  const ActivationTopk& select = sizes.select;
  const bool is_mixed = sizes.weight_dtype != sizes.operand_dtype;
  make.name("dense_router", sizes.operand_dtype, content,
            {{is_mixed ? "f32 weight N" : "N", select.rows},
             {"D", sizes.hidden},
             {"E", select.selection.experts},
             {"k", select.selection.k},
             {"keys ", static_cast<int>(keys)},
             {"groups ", select.selection.groups.num_groups}});
  DenseRouter op = sizes;
  op.select = selection(make, select.rows, select.selection.experts, select.selection.k, keys,
                        select.selection.groups.num_groups, content);
  op.x = make.floats(op.operand_dtype, select.rows * op.hidden, content);
  op.weight = make.floats(op.weight_dtype, static_cast<int64_t>(select.selection.experts) * op.hidden, content);
  if (make.pick({false, true})) op.logit_bias = make.floats(select.selection.experts, content);
  const auto set = [](DenseRouter& op, const Results& results) { set_results(op.select, results); };
  Call call = Maker::with_ids(make.finish(op, result_bytes(op.select), set), 1, select.selection.experts);
  call.is_exact = false;  // the sums are made in other orders
  return call;
}

inline DenseRouter dense_sizes(DType x, DType weight, int64_t rows, int32_t hidden, int32_t experts, int32_t k,
                               int32_t num_groups) {
  DenseRouter op{};
  op.operand_dtype = x;
  op.weight_dtype = weight;
  op.hidden = hidden;
  op.select.rows = rows;
  op.select.selection.experts = experts;
  op.select.selection.k = k;
  op.select.selection.groups.num_groups = num_groups;
  return op;
}

// With a vocabulary the ids are those of a table.
inline Call route_at(Maker& make, DType dtype, int64_t rows, int32_t experts, int32_t k, int64_t vocab_size,
                     Scoring scoring, Content content) {
  make.name(vocab_size > 0 ? "scored_hash_router" : "route_at", dtype, content,
            {{"N", rows}, {"E", experts}, {"k", k}});
  RouteAt op{};
  op.rows = rows;
  op.experts = experts;
  op.k = k;
  op.dtype = dtype;
  op.logits = make.floats(dtype, rows * experts, content);
  op.vocab_size = vocab_size;
  if (vocab_size > 0) op.token_ids = make.ids(rows, vocab_size);
  op.expert_ids = make.ids((vocab_size > 0 ? vocab_size : rows) * k, experts);
  op.scoring = scoring;
  const size_t bytes = 4 * rows * k;
  const auto set = [](RouteAt& op, const Results& results) {
    op.weights = results.get<float>(0);
    op.valid_ids = results.get<int32_t>(1);
    op.chosen_logits = results.get<float>(2);
  };
  return Maker::with_ids(make.finish(op, {bytes, bytes, bytes}, set), 1, experts);
}

inline Call route_cotangent(Maker& make, DType dtype, int64_t rows, int32_t experts, int32_t k, Scoring scoring,
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
  const size_t bytes = rows * experts * size_of(dtype);
  return make.finish(op, {bytes},
                     [](RouteCotangent& op, const Results& results) { op.grad_logits = results.get<void>(0); });
}

// What the cotangents of chosen weights are found from.
template <class Op>
void set_choices(Maker& make, Op& op, int64_t rows, int32_t experts, int32_t k, Scoring scoring, Content content) {
  op.rows = rows;
  op.experts = experts;
  op.k = k;
  op.scoring = scoring;
  op.grad_weights = make.floats(rows * k, content);
  op.residual = make.floats(rows * k, content);
  op.expert_ids = make.ids(rows * k, experts);
}

inline Call routed_cotangent(Maker& make, int64_t rows, int32_t experts, int32_t k, Scoring scoring, Content content) {
  make.name("routed_cotangent", DType::kF32, content,
            {{"N", rows}, {"E", experts}, {"k", k}, {"score_fn ", static_cast<int>(scoring.score_fn)}});
  RoutedCotangent op{};
  set_choices(make, op, rows, experts, k, scoring, content);
  op.dtype = DType::kF32;
  op.in_parts = true;
  const size_t count = rows * experts;
  return make.finish(op, {4 * count, static_cast<size_t>(4 * rows * k)},
                     [](RoutedCotangent& op, const Results& results) {
                       op.grad_logits = results.get<void>(0);
                       op.grad_chosen = results.get<float>(1);
                     });
}

inline Call routed_gradients(Maker& make, int64_t rows, int32_t experts, int32_t k, int32_t hidden, Scoring scoring,
                             Content content) {
  make.name("routed_gradients", DType::kBF16, content,
            {{"N", rows}, {"E", experts}, {"k", k}, {"D", hidden}, {"score_fn ", static_cast<int>(scoring.score_fn)}});
  RoutedGradients op{};
  set_choices(make, op, rows, experts, k, scoring, content);
  op.hidden = hidden;
  op.x = make.floats(DType::kBF16, rows * hidden, content);
  op.weight = make.floats(DType::kBF16, int64_t{experts} * hidden, content);
  return make.finish(op, {static_cast<size_t>(2 * rows * hidden), size_t{2} * experts * hidden},
                     [](RoutedGradients& op, const Results& results) {
                       op.grad_x = results.get<void>(0);
                       op.grad_weight = results.get<void>(1);
                     });
}

inline Call topk_select(Maker& make, DType dtype, int64_t rows, int64_t length, int64_t k, bool sorted,
                        bool has_lengths, Content content) {
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
  const auto set = [](TopkSelect& op, const Results& results) {
    op.values = results.get<void>(0);
    op.indices = results.get<int32_t>(1);
  };
  const size_t choices = rows * k;
  Call call = Maker::with_ids(make.finish(op, {choices * size_of(dtype), 4 * choices}, set), 1, length);
  call.expected = [op, operands = call.operands] {
    const std::vector<char> scores = operands[0]->read();
    const std::vector<char> lengths = operands.size() > 1 ? operands[1]->read() : std::vector<char>{};
    if (op.dtype == DType::kF32) return sorted_on_host<float>(op, scores, lengths);
    if (op.dtype == DType::kBF16) return sorted_on_host<__nv_bfloat16>(op, scores, lengths);
    return sorted_on_host<__half>(op, scores, lengths);
  };
  return call;
}

inline Call expert_dispatch(Maker& make, int64_t batch, int64_t tokens, int32_t k, int32_t experts, int32_t align = 1,
                            int32_t capacity = INT32_MAX) {
  make.name("expert_dispatch",
            {{"batch ", batch}, {"N", tokens}, {"E", experts}, {"k", k}, {"align ", align}, {"capacity ", capacity}});
  ExpertDispatch op{};
  op.batch = batch;
  op.tokens = tokens;
  op.k = k;
  op.experts = experts;
  op.align = align;
  op.capacity = capacity;
  op.expert_ids = make.ids(batch * tokens * k, experts);
  const size_t choices = batch * tokens * k;
  const auto set = [](ExpertDispatch& op, const Results& results) {
    op.token_index = results.get<int32_t>(0);
    op.slot = results.get<int32_t>(1);
    op.group_sizes = results.get<int32_t>(2);
  };
  const int64_t slots = slots_of(op);
  const std::vector<size_t> bytes{4 * static_cast<size_t>(batch * slots), 4 * choices,
                                  4 * static_cast<size_t>(batch * experts)};
  return Maker::with_ids(make.finish(op, bytes, set), 1, slots);
}

inline Call expert_counts(Maker& make, int64_t batch, int64_t tokens, int32_t k, int32_t experts) {
  make.name("expert_counts", {{"batch ", batch}, {"N", tokens}, {"E", experts}, {"k", k}});
  ExpertCounts op{};
  op.batch = batch;
  op.tokens = tokens;
  op.k = k;
  op.experts = experts;
  op.expert_ids = make.ids(batch * tokens * k, experts);
  if (make.pick({false, true})) op.token_mask = make.mask(batch * tokens);
  const auto set = [](ExpertCounts& op, const Results& results) { op.counts = results.get<int32_t>(0); };
  return Maker::with_ids(make.finish(op, {4 * static_cast<size_t>(batch * experts)}, set), 0, tokens * k + 1);
}

// Of the ops that move rows between tokens and slots.
struct MovedSizes {
  int64_t batch, tokens;
  int32_t k;
  int64_t hidden;
  int64_t padding;       // slots besides those that the choices need; fewer than none, and choices share them
  bool hostile = false;  // tokens and slots that do not know of each other, and numbers that are neither's
};

// The choices have slots in any order, with others between them, and every seventh choice has none. To be called behind
// `name`.
inline DispatchedRows dispatched_rows(Maker& make, const MovedSizes& sizes) {
  const auto [batch, tokens, k, hidden, padding, hostile] = sizes;
  DispatchedRows rows{batch, tokens, tokens * k + padding, k, hidden, nullptr, nullptr};
  std::vector<int32_t> token_index(rows.slot_rows(), -1), slot(rows.token_rows() * k, -1);
  for (int64_t problem = 0; problem < batch; ++problem) {
    const std::vector<int32_t> places = make.permutation(rows.slots);
    for (int64_t choice = 0; choice < tokens * k; ++choice) {
      const bool wrong = choice % 7 == 3;
      const int32_t nowhere = hostile ? make.pick({INT32_MIN, -2, static_cast<int32_t>(rows.slots), INT32_MAX}) : -1;
      const int32_t place = places[choice % rows.slots];
      slot[problem * tokens * k + choice] = wrong ? nowhere : place;
      if (!wrong) token_index[problem * rows.slots + place] = static_cast<int32_t>(choice / k);
    }
  }
  rows.slot = make.operand(slot);
  rows.token_index = hostile ? make.ids(rows.slot_rows(), tokens) : make.operand(token_index);
  return rows;
}

inline void name_moved(Maker& make, const std::string& op, DType dtype, Content content, const MovedSizes& sizes) {
  make.name(op, dtype, content,
            {{"B", sizes.batch},
             {"N", sizes.tokens},
             {"k", sizes.k},
             {"D", sizes.hidden},
             {"padding ", sizes.padding},
             {"hostile ", sizes.hostile}});
}

// Where element_bytes is 1, of rows of bytes.
inline Call permute(Maker& make, DType dtype, int32_t element_bytes, bool weighted, const MovedSizes& sizes,
                    Content content) {
  name_moved(make, weighted ? "permute weighted" : "permute", dtype, content, sizes);
  const DispatchedRows rows = dispatched_rows(make, sizes);
  Permute op{};
  op.rows = rows;
  op.dtype = dtype;
  op.element_bytes = element_bytes;
  op.x = make.floats(dtype, rows.token_rows() * rows.hidden, content);
  if (weighted) op.weights = make.floats(rows.token_rows() * rows.k, content);
  return make.finish(op, {static_cast<size_t>(rows.slot_rows() * rows.hidden * element_bytes)},
                     [](Permute& op, const Results& results) { op.out = results.get<void>(0); });
}

inline Call combine(Maker& make, DType dtype, bool weighted, const MovedSizes& sizes, Content content) {
  name_moved(make, weighted ? "combine weighted" : "combine", dtype, content, sizes);
  const DispatchedRows rows = dispatched_rows(make, sizes);
  Combine op{};
  op.rows = rows;
  op.dtype = dtype;
  op.y = make.floats(dtype, rows.slot_rows() * rows.hidden, content);
  if (weighted) op.weights = make.floats(rows.token_rows() * rows.k, content);
  return make.finish(op, {static_cast<size_t>(rows.token_rows() * rows.hidden * size_of(dtype))},
                     [](Combine& op, const Results& results) { op.out = results.get<void>(0); });
}

inline Call permute_cotangent(Maker& make, DType dtype, const MovedSizes& sizes, Content content) {
  name_moved(make, "permute_cotangent", dtype, content, sizes);
  const DispatchedRows rows = dispatched_rows(make, sizes);
  PermuteCotangent op{};
  op.rows = rows;
  op.dtype = dtype;
  op.grad = make.floats(dtype, rows.slot_rows() * rows.hidden, content);
  op.x = make.floats(dtype, rows.token_rows() * rows.hidden, content);
  op.weights = make.floats(rows.token_rows() * rows.k, content);
  const size_t row_bytes = rows.token_rows() * rows.hidden * size_of(dtype);
  return make.finish(op, {row_bytes, static_cast<size_t>(4 * rows.token_rows() * rows.k)},
                     [](PermuteCotangent& op, const Results& results) {
                       op.grad_x = results.get<void>(0);
                       op.grad_weights = results.get<float>(1);
                     });
}

inline Call combine_cotangent(Maker& make, DType dtype, const MovedSizes& sizes, Content content) {
  name_moved(make, "combine_cotangent", dtype, content, sizes);
  const DispatchedRows rows = dispatched_rows(make, sizes);
  CombineCotangent op{};
  op.rows = rows;
  op.dtype = dtype;
  op.grad = make.floats(dtype, rows.token_rows() * rows.hidden, content);
  op.y = make.floats(dtype, rows.slot_rows() * rows.hidden, content);
  op.weights = make.floats(rows.token_rows() * rows.k, content);
  const size_t row_bytes = rows.slot_rows() * rows.hidden * size_of(dtype);
  return make.finish(op, {row_bytes, static_cast<size_t>(4 * rows.token_rows() * rows.k)},
                     [](CombineCotangent& op, const Results& results) {
                       op.grad_y = results.get<void>(0);
                       op.grad_weights = results.get<float>(1);
                     });
}

}  // namespace jax_router::launches
