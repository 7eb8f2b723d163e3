// Calls: those that Python makes, which must be accepted, others near them, and any.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "frames.h"

namespace fuzz {

inline constexpr auto kF32 = XLA_FFI_DataType_F32;
inline constexpr auto kBF16 = XLA_FFI_DataType_BF16;
inline constexpr auto kS32 = XLA_FFI_DataType_S32;
inline constexpr auto kBool = XLA_FFI_DataType_PRED;

using Sizes = std::vector<int64_t>;

// Makes the calls that jax_router/_primitive.py makes: any number of batch axes; where shapes are known, shared
// operands are flat and rows without axes of their own have one of size 1.
class Calls {
 public:
  // With `beyond_limits` now and then with more experts or choices than kernels take, and right but for that.
  Calls(Random& random, bool beyond_limits)
      : random_(random), beyond_limits_(beyond_limits), flat_(chance(random, 70)) {
    const int64_t rank = below(random, 4);
    for (int64_t i = 0; i < rank; ++i) batch_.push_back(pick(random, Sizes{0, 1, 1, 2, 3, 5, 7}));
    if (chance(random, 10)) batch_ = {below(random, 3000)};  // enough for several threads
  }

  Call make(const std::string& target) {
    call_.target = target;
    if (target == "hash_router") hash_router();
    if (target == "activation_topk") activation_topk();
    if (target == "dense_router") dense_router();
    if (target == "route_at") route_at();
    if (target == "scored_hash_router") scored_hash_router();
    if (target == "route_cotangent") route_cotangent();
    if (target == "routed_cotangent") routed_cotangent();
    if (target == "routed_gradients") routed_gradients();
    if (target == "topk_select") topk_select();
    if (target == "expert_dispatch") expert_dispatch();
    if (target == "permute") permute();
    if (target == "combine") combine();
    if (target == "permute_cotangent") cotangent("permute");
    if (target == "combine_cotangent") cotangent("combine");
    if (target == "expert_counts") expert_counts();
    return call_;
  }

 private:
  void hash_router() {
    const int64_t k = some_choices(64), vocabulary = pick(random_, Sizes{0, 1, 3, 50});
    call_.operands = {scalars(kS32, vocabulary), shared(kS32, {vocabulary, k})};
    call_.results = {rows(kF32, {k}), rows(kS32, {k})};
    call_.attributes["scale"] = 1.5f;
  }

  void activation_topk() {
    const int64_t experts = some_experts();
    call_.operands = {rows(a_float(), {experts})};
    select(experts);
  }

  void dense_router() {
    const int64_t experts = some_experts(), hidden = pick(random_, Sizes{1, 2, 8, 33});
    const auto dtype = a_float();
    call_.operands = {rows(dtype, {hidden}), shared(chance(random_, 50) ? dtype : kF32, {experts, hidden})};
    if (optional("logit_bias")) call_.operands.push_back(shared(kF32, {experts}));
    select(experts);
    call_.results.insert(call_.results.begin() + 2, workspace());
  }

  void route_at() {
    const int64_t experts = some_experts(0), k = chance(random_, 5) ? 0 : some_choices(64);
    call_.operands = {rows(a_float(), {experts}), rows(kS32, {k}, experts)};
    route(k);
  }

  void scored_hash_router() {
    const int64_t experts = some_experts(0), k = some_choices(64);
    const int64_t vocabulary = pick(random_, Sizes{0, 1, 3, 50});
    call_.operands = {rows(a_float(), {experts}), scalars(kS32, vocabulary), shared(kS32, {vocabulary, k}, experts)};
    route(k);
  }

  void route_cotangent() {
    const int64_t experts = chance(random_, 5) ? 5000 : some_experts(0), k = chance(random_, 5) ? 0 : some_choices(100);
    const auto dtype = a_float();
    call_.operands = {rows(kF32, {k}), rows(kS32, {k}, experts)};
    scoring({"sqrtsoftplus", "sigmoid", "softmax", "identity"});
    const std::string score_fn = std::get<std::string>(call_.attributes["score_fn"]);
    const bool whole_row = score_fn == "softmax" && !std::get<bool>(call_.attributes["renormalize"]);
    call_.attributes["has_residual"] = score_fn != "identity";
    if (whole_row) {
      call_.operands.push_back(rows(dtype, {experts}));
    } else if (score_fn != "identity") {
      call_.operands.push_back(rows(kF32, {k}));
    }
    call_.results = {rows(dtype, {experts})};
    call_.attributes["num_experts"] = experts;
  }

  void routed_cotangent() {
    const int64_t experts = some_experts(0), k = chance(random_, 5) ? 0 : some_choices(64);
    call_.operands = {rows(kF32, {k}), rows(kS32, {k}, experts), rows(kF32, {k})};
    scoring({"sqrtsoftplus", "sigmoid", "softmax"});
    if (std::get<std::string>(call_.attributes["score_fn"]) == "softmax") call_.attributes["renormalize"] = true;
    call_.results = {rows(kBF16, {experts, 2}), rows(kF32, {k})};
    call_.attributes["num_experts"] = experts;
  }

  void routed_gradients() {
    routed_cotangent();
    const int64_t experts = std::get<int64_t>(call_.attributes["num_experts"]);
    const int64_t hidden = pick(random_, Sizes{0, 1, 8, 200});
    call_.operands.push_back(rows(kBF16, {hidden}));
    call_.operands.push_back({kBF16, {experts, hidden}, 8});
    call_.results = {rows(kBF16, {hidden}), {kBF16, {experts, hidden}, 8}, workspace()};
  }

  void topk_select() {
    const int64_t length = pick(random_, Sizes{1, 2, 31, 64, 65, 300, 4097, 9000});
    const int64_t k = 1 + below(random_, chance(random_, 50) ? std::min<int64_t>(length, 8) : length);
    const auto dtype = a_float();
    if (length > 300 && batch_.size() == 1) batch_ = {below(random_, 20)};
    call_.operands = {rows(dtype, {length})};
    if (optional("lengths")) call_.operands.push_back(scalars(kS32, length));
    call_.results = {rows(dtype, {k}), rows(kS32, {k})};
    call_.attributes["k"] = k;
    call_.attributes["sorted"] = chance(random_, 50);
  }

  void expert_dispatch() {
    const int64_t experts = some_experts(), k = some_choices(12);
    const int64_t tokens = chance(random_, 10) ? below(random_, 5000) : below(random_, 30);
    if (batch_.size() == 1) batch_ = {below(random_, 4)};
    call_.operands = {rows(kS32, {tokens, k}, experts)};
    const int64_t align = chance(random_, 50) ? 1 : pick(random_, Sizes{2, 7, 16, 128});
    const int64_t capacity = chance(random_, 50) ? kNoCapacity : below(random_, 40);
    call_.results = {rows(kS32, {slots(tokens * k, experts, align, capacity)}), rows(kS32, {tokens, k}),
                     rows(kS32, {experts})};
    if (chance(random_, 50)) call_.results.push_back(workspace());
    call_.attributes["num_experts"] = experts;
    call_.attributes["align"] = align;
    call_.attributes["capacity"] = capacity;
  }

  void expert_counts() {
    const int64_t experts = some_experts(), k = some_choices(12);
    const int64_t tokens = chance(random_, 10) ? below(random_, 5000) : below(random_, 30);
    if (batch_.size() == 1) batch_ = {below(random_, 4)};
    call_.operands = {rows(kS32, {tokens, k}, experts)};
    if (optional("token_mask")) call_.operands.push_back(rows(kBool, {tokens}));
    call_.results = {rows(kS32, {experts})};
    if (chance(random_, 50)) call_.results.push_back(workspace());
    call_.attributes["num_experts"] = experts;
  }

  static constexpr int64_t kNoCapacity = std::numeric_limits<int32_t>::max();

  // Counted block by block: each group takes one for its first choice, then one for every `align` more.
  static int64_t slots(int64_t choices, int64_t experts, int64_t align, int64_t capacity) {
    int64_t blocks = 0;
    for (int64_t held = 0; held < capacity && choices > 0; held += align) {
      const int64_t cost = held == 0 ? 1 : align;
      const int64_t opened = std::min(experts, choices / cost);
      if (opened == 0) break;
      blocks += opened;
      choices -= opened * cost;
    }
    return blocks * align;
  }

  // Rows of tokens and of slots, of one length.
  struct Moved {
    int64_t tokens, slots, k, hidden;
  };
  Moved some_moved() {
    if (batch_.size() == 1) batch_ = {below(random_, 4)};
    const int64_t tokens = chance(random_, 10) ? below(random_, 500) : below(random_, 10);
    const int64_t k = chance(random_, 5) ? 0 : some_choices(64);
    const int64_t slots = chance(random_, 50) ? tokens * std::min<int64_t>(k, 8) : below(random_, 30);
    return {tokens, slots, k, pick(random_, Sizes{0, 1, 3, 8, 40, 1030})};
  }
  // Most numbers of tokens and slots are wrong.
  std::vector<Array> dispatch(const Moved& moved) const {
    return {rows(kS32, {moved.slots}, moved.tokens), rows(kS32, {moved.tokens, moved.k}, moved.slots)};
  }

  void permute() {
    const Moved moved = some_moved();
    const bool weights = optional("weights");
    const auto dtype = weights || chance(random_, 70) ? a_float() : XLA_FFI_DataType_F8E4M3FN;
    call_.operands = dispatch(moved);
    call_.operands.insert(call_.operands.begin(), rows(dtype, {moved.tokens, moved.hidden}));
    if (weights) call_.operands.push_back(rows(kF32, {moved.tokens, moved.k}));
    call_.results = {rows(dtype, {moved.slots, moved.hidden})};
  }

  void combine() {
    const Moved moved = some_moved();
    const auto dtype = a_float();
    call_.operands = dispatch(moved);
    call_.operands.insert(call_.operands.begin(), rows(dtype, {moved.slots, moved.hidden}));
    if (optional("weights")) call_.operands.push_back(rows(kF32, {moved.tokens, moved.k}));
    call_.results = {rows(dtype, {moved.tokens, moved.hidden})};
  }

  void cotangent(const std::string& of) {
    const Moved moved = some_moved();
    const auto dtype = a_float();
    const Array of_tokens = rows(dtype, {moved.tokens, moved.hidden}),
                of_slots = rows(dtype, {moved.slots, moved.hidden});
    const bool is_combine = of == "combine";
    call_.operands = dispatch(moved);
    call_.operands.insert(call_.operands.begin(), is_combine ? of_slots : of_tokens);
    call_.operands.insert(call_.operands.begin(), is_combine ? of_tokens : of_slots);
    call_.operands.push_back(rows(kF32, {moved.tokens, moved.k}));
    call_.results = {is_combine ? of_slots : of_tokens, rows(kF32, {moved.tokens, moved.k})};
  }

  // What dense_router and activation_topk have in common.
  void select(int64_t experts) {
    if (optional("bias")) {
      call_.operands.push_back(chance(random_, 50) ? shared(kF32, {experts}) : rows(kF32, {experts}));
    }
    if (optional("token_mask")) call_.operands.push_back(scalars(kBool));
    scoring({"sqrtsoftplus", "sigmoid", "softmax"});
    const std::string group_score = chance(random_, 50) ? "max" : "top2_sum";
    const int64_t least = group_score == "max" ? 1 : 2;  // experts a group
    Sizes divisors = {1};
    for (int64_t groups = 2; groups * least <= experts; ++groups) {
      if (experts % groups == 0) divisors.push_back(groups);
    }
    const int64_t groups = chance(random_, 50) ? 1 : pick(random_, divisors);
    const int64_t top_groups = 1 + below(random_, groups);
    const int64_t most = std::min<int64_t>(64, experts / groups * top_groups);
    const int64_t k = most == 0 || beyond_limits_ ? some_choices(std::max<int64_t>(most, 1)) : 1 + below(random_, most);
    call_.attributes["group_score"] = group_score;
    call_.attributes["num_groups"] = groups;
    call_.attributes["top_groups"] = top_groups;
    call_.attributes["top_k"] = k;
    results(k);
  }

  void route(int64_t k) {
    scoring({"sqrtsoftplus", "sigmoid", "softmax"});
    results(k);
  }

  void results(int64_t k) {
    call_.results = {rows(kF32, {k}), rows(kS32, {k})};
    if (chance(random_, 50)) call_.results.push_back(rows(kF32, {k}));
  }

  void scoring(const std::vector<std::string>& score_fns) {
    call_.attributes["score_fn"] = pick(random_, score_fns);
    call_.attributes["renormalize"] = chance(random_, 50);
    call_.attributes["scale"] = 2.5f;
    call_.attributes["eps"] = 1e-20f;
  }

  bool optional(const char* name) {
    const bool given = chance(random_, 50);
    call_.attributes[std::string("has_") + name] = given;
    return given;
  }

  XLA_FFI_DataType a_float() {
    return pick(random_, std::vector{kF32, kF32, XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16});
  }
  int64_t some_choices(int64_t most) {
    if (beyond_limits_ && chance(random_, 50)) return most + 1 + below(random_, 200);
    return 1 + below(random_, chance(random_, 80) ? std::min<int64_t>(most, 8) : most);
  }
  int64_t some_experts(int64_t least = 1) {
    if (beyond_limits_ && chance(random_, 50)) return pick(random_, Sizes{0, 4097, 5000, 8192});
    return pick(random_, Sizes{least, 1, 2, 6, 8, 33, 64, 65, 128, 256, 384, 4096});
  }

  Array rows(XLA_FFI_DataType dtype, const Sizes& own, int64_t bound = 8) const {
    Sizes sizes = batch_;
    sizes.insert(sizes.end(), own.begin(), own.end());
    return {dtype, sizes, bound};
  }
  Array workspace() { return rows(XLA_FFI_DataType_U8, {below(random_, 1000)}); }
  Array scalars(XLA_FFI_DataType dtype, int64_t bound = 8) const {
    return flat_ ? rows(dtype, {1}, bound) : rows(dtype, {}, bound);
  }
  Array shared(XLA_FFI_DataType dtype, const Sizes& sizes, int64_t bound = 8) const {
    if (!flat_) return {dtype, sizes, bound};
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    return {dtype, {count}, bound};
  }

  Random& random_;
  const bool beyond_limits_;
  const bool flat_;
  Sizes batch_;
  Call call_;
};

inline int64_t any_number(Random& random) {
  static const Sizes numbers = {-1,
                                0,
                                1,
                                2,
                                3,
                                4,
                                8,
                                63,
                                64,
                                65,
                                100,
                                255,
                                256,
                                257,
                                4095,
                                4096,
                                4097,
                                8192,
                                100000,
                                2147483646,
                                2147483647,
                                1ll << 31,
                                (1ll << 31) + 64,
                                4294967295,
                                1ll << 32,
                                (1ll << 32) + 2,
                                1ll << 33,
                                1ll << 62,
                                std::numeric_limits<int64_t>::max(),
                                std::numeric_limits<int64_t>::min()};
  return pick(random, numbers);
}

// The number and a little more or less, around the ends of int64.
inline int64_t near(int64_t number, Random& random) {
  return static_cast<int64_t>(static_cast<uint64_t>(number) + static_cast<uint64_t>(below(random, 5) - 2));
}

inline XLA_FFI_DataType any_dtype(Random& random) {
  static const std::vector<XLA_FFI_DataType> dtypes = {
      XLA_FFI_DataType_INVALID, XLA_FFI_DataType_PRED, XLA_FFI_DataType_S8,  XLA_FFI_DataType_S16,
      XLA_FFI_DataType_S32,     XLA_FFI_DataType_S64,  XLA_FFI_DataType_U8,  XLA_FFI_DataType_U16,
      XLA_FFI_DataType_U32,     XLA_FFI_DataType_U64,  XLA_FFI_DataType_F16, XLA_FFI_DataType_F32,
      XLA_FFI_DataType_F64,     XLA_FFI_DataType_BF16, XLA_FFI_DataType_C64, XLA_FFI_DataType_F8E4M3FN};
  return pick(random, dtypes);
}

inline std::string any_text(Random& random) {
  static const std::vector<std::string> texts = {
      "", "sqrtsoftplus", "sigmoid", "softmax", "identity", "top2_sum", "max", "Max", "mean", std::string(5000, 'x')};
  return pick(random, texts);
}

inline Value any_value(Random& random) {
  switch (below(random, 7)) {
    case 0:
      return chance(random, 50);
    case 1:
      return static_cast<int32_t>(any_number(random));
    case 2:
      return any_number(random);
    case 3:
      return static_cast<float>(any_number(random));
    case 4:
      return std::numeric_limits<double>::quiet_NaN();
    case 5:
      return any_text(random);
    default:
      return NoScalar{};
  }
}

inline Array any_array(Random& random) {
  Array array{any_dtype(random), {}};
  const int64_t rank = below(random, 5);
  for (int64_t i = 0; i < rank; ++i) {
    array.sizes.push_back(chance(random, 30) ? any_number(random) : below(random, 10));
  }
  return array;
}

// A small change, to an array or to a list of them.
inline void change(Array& array, Random& random) {
  const auto at = [&](int64_t extra) { return array.sizes.begin() + below(random, array.sizes.size() + extra); };
  switch (below(random, 6)) {
    case 0:
      array.dtype = any_dtype(random);
      return;
    case 1:
      array.sizes.insert(at(1), chance(random, 50) ? 1 : below(random, 4));
      return;
    case 2:
      if (!array.sizes.empty()) array.sizes.erase(at(0));
      return;
    case 3:
      if (!array.sizes.empty()) {
        int64_t& size = *at(0);
        size = near(size, random);
      }
      return;
    case 4:
      if (!array.sizes.empty()) std::swap(*at(0), *at(0));
      return;
    default:
      if (!array.sizes.empty()) *at(0) = any_number(random);
  }
}

inline void change(std::vector<Array>& arrays, Random& random) {
  const auto at = [&](int64_t extra) { return arrays.begin() + below(random, arrays.size() + extra); };
  switch (below(random, 8)) {
    case 0:
      arrays.insert(at(1), any_array(random));
      return;
    case 1:
      if (!arrays.empty()) arrays.erase(at(0));
      return;
    case 2:
      if (!arrays.empty()) arrays.push_back(*at(0));
      return;
    case 3:
      if (!arrays.empty()) std::swap(*at(0), *at(0));
      return;
    default:
      if (!arrays.empty()) change(*at(0), random);
  }
}

inline void change(Call& call, Random& random) {
  if (chance(random, 40) && !call.attributes.empty()) {
    const auto attribute = std::next(call.attributes.begin(), below(random, call.attributes.size()));
    if (chance(random, 15)) {
      call.attributes.erase(attribute);
    } else if (chance(random, 30)) {
      attribute->second = any_value(random);
    } else if (auto* number = std::get_if<int64_t>(&attribute->second)) {
      *number = chance(random, 50) ? any_number(random) : near(*number, random);
    } else if (auto* flag = std::get_if<bool>(&attribute->second)) {
      *flag = !*flag;
    } else if (auto* text = std::get_if<std::string>(&attribute->second)) {
      *text = any_text(random);
    } else {
      attribute->second = any_value(random);
    }
  } else {
    change(chance(random, 60) ? call.operands : call.results, random);
  }
}

// With the attributes that the target reads, of any type and value, and any arrays.
inline Call any_call(const Call& valid, Random& random) {
  Call call = valid;
  for (auto& [name, value] : call.attributes) {
    if (chance(random, 50)) value = any_value(random);
  }
  for (auto* arrays : {&call.operands, &call.results}) {
    arrays->resize(below(random, 6), any_array(random));
    for (Array& array : *arrays) {
      if (chance(random, 50)) array = any_array(random);
    }
  }
  return call;
}

}  // namespace fuzz
