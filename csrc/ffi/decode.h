// From XLA FFI call frames to the structs of common/ops.h, the same for CPU and CUDA. Attribute names are the parameter
// names of the Python primitives; an operand that was not given is absent from the call, and its has_* attribute is
// false. Leading axes are rows, however many there are; operands that all rows share may come flattened.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "../common/ops.h"
#include "xla/ffi/api/ffi.h"

namespace jax_router {

namespace ffi = xla::ffi;

// The size of axis `axis` counted from the last one, which is 0; 1 where there is no such axis.
inline int64_t axis_from_end(const ffi::AnyBuffer& buffer, size_t axis) {
  const auto dims = buffer.dimensions();
  return axis < dims.size() ? dims[dims.size() - 1 - axis] : 1;
}

// The product of all axes but the last `core_rank`.
inline int64_t leading_count(const ffi::AnyBuffer& buffer, size_t core_rank) {
  const auto dims = buffer.dimensions();
  int64_t count = 1;
  for (size_t i = 0; i + core_rank < dims.size(); ++i) count *= dims[i];
  return count;
}

// Reads operands and results in their order and attributes by name, and keeps the first error.
class CallReader {
 public:
  CallReader(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs)
      : args_(args), rets_(rets), attrs_(attrs) {}

  ffi::Error error() const { return error_; }
  bool failed() const { return error_.failure(); }

  template <typename T>
  T attr(std::string_view name) {
    ffi::ErrorOr<T> value = attrs_.get<T>(name);
    if (value.has_error()) {
      fail(std::string("attribute ") + std::string(name) + ": " + value.error().message());
      return T{};
    }
    return *value;
  }

  bool has_result() const { return next_result_ < rets_.size(); }

  ffi::AnyBuffer operand() {
    ffi::ErrorOr<ffi::AnyBuffer> buffer = args_.get<ffi::AnyBuffer>(next_operand_++);
    if (buffer.has_error()) {
      fail("missing operand " + std::to_string(next_operand_ - 1));
      return ffi::AnyBuffer(&kNoBuffer);
    }
    return *buffer;
  }

  // The next result as a pointer to `count` elements.
  template <typename T>
  T* result(int64_t count) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> buffer = rets_.get<ffi::AnyBuffer>(next_result_++);
    if (buffer.has_error()) {
      fail("missing result " + std::to_string(next_result_ - 1));
      return nullptr;
    }
    expect_count(**buffer, count);
    return static_cast<T*>((*buffer)->untyped_data());
  }

  template <typename T>
  const T* operand(int64_t count) {
    const ffi::AnyBuffer buffer = operand();
    expect_count(buffer, count);
    return static_cast<const T*>(buffer.untyped_data());
  }

  DType dtype(const ffi::AnyBuffer& buffer) { return dtype(buffer.element_type()); }

  // The dtype of the next result.
  DType result_dtype() {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> buffer = rets_.get<ffi::AnyBuffer>(next_result_);
    return buffer.has_error() ? DType::kF32 : dtype((*buffer)->element_type());
  }

  int64_t result_axis_from_end(size_t axis) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> buffer = rets_.get<ffi::AnyBuffer>(next_result_);
    return buffer.has_error() ? 0 : axis_from_end(**buffer, axis);
  }

  void expect_count(const ffi::AnyBuffer& buffer, int64_t count) {
    const auto got = static_cast<int64_t>(buffer.element_count());
    if (got != count) {
      fail("a buffer has " + std::to_string(got) + " elements where " + std::to_string(count) + " were expected");
    }
  }

  void fail(const std::string& message) {
    if (error_.success()) error_ = ffi::Error::InvalidArgument("jax_router: " + message);
  }

 private:
  DType dtype(ffi::DataType element_type) {
    switch (element_type) {
      case ffi::DataType::F32:
        return DType::kF32;
      case ffi::DataType::BF16:
        return DType::kBF16;
      case ffi::DataType::F16:
        return DType::kF16;
      default:
        fail("floating operands must be f32, bf16 or f16");
        return DType::kF32;
    }
  }

  static constexpr XLA_FFI_Buffer kNoBuffer{
      XLA_FFI_Buffer_STRUCT_SIZE, nullptr, XLA_FFI_DataType_INVALID, nullptr, 0, nullptr};

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  ffi::Dictionary attrs_;
  size_t next_operand_ = 0;
  size_t next_result_ = 0;
  ffi::Error error_ = ffi::Error::Success();
};

inline Scoring read_scoring(CallReader& call) {
  Scoring scoring{ScoreFn::kIdentity, call.attr<bool>("renormalize"), call.attr<float>("scale")};
  const auto name = call.attr<std::string_view>("score_fn");
  if (name == "sqrtsoftplus") {
    scoring.score_fn = ScoreFn::kSqrtSoftplus;
  } else if (name == "sigmoid") {
    scoring.score_fn = ScoreFn::kSigmoid;
  } else if (name == "softmax") {
    scoring.score_fn = ScoreFn::kSoftmax;
  } else if (name != "identity") {
    call.fail("unknown score_fn " + std::string(name));
  }
  return scoring;
}

inline Groups read_groups(CallReader& call) {
  const auto name = call.attr<std::string_view>("group_score");
  if (name != "top2_sum" && name != "max") call.fail("unknown group_score " + std::string(name));
  return {static_cast<int32_t>(call.attr<int64_t>("num_groups")),
          static_cast<int32_t>(call.attr<int64_t>("top_groups")),
          name == "max" ? GroupScore::kMax : GroupScore::kTop2Sum};
}

inline void read(CallReader& call, HashRouter& op) {
  const ffi::AnyBuffer token_ids = call.operand();
  const ffi::AnyBuffer hash_lut = call.operand();
  op.rows = leading_count(token_ids, 0);
  op.k = static_cast<int32_t>(call.result_axis_from_end(0));
  op.vocab_size = op.k == 0 ? 0 : static_cast<int64_t>(hash_lut.element_count()) / op.k;
  op.token_ids = static_cast<const int32_t*>(token_ids.untyped_data());
  op.hash_lut = static_cast<const int32_t*>(hash_lut.untyped_data());
  op.scale = call.attr<float>("scale");
  op.weights = call.result<float>(op.rows * op.k);
  op.expert_ids = call.result<int32_t>(op.rows * op.k);
}

// The first operand of the ops that route by logits.
template <typename Op>
void read_logits(CallReader& call, Op& op, int32_t& experts) {
  const ffi::AnyBuffer logits = call.operand();
  op.rows = leading_count(logits, 1);
  experts = static_cast<int32_t>(axis_from_end(logits, 0));
  op.dtype = call.dtype(logits);
  op.logits = logits.untyped_data();
}

// Everything of an ActivationTopk behind its logits.
inline void read_selection(CallReader& call, ActivationTopk& op) {
  op.selection.k = static_cast<int32_t>(call.attr<int64_t>("top_k"));
  op.bias = nullptr;
  op.bias_stride = 0;
  if (call.attr<bool>("has_bias")) {
    const ffi::AnyBuffer bias = call.operand();
    const bool shared = static_cast<int64_t>(bias.element_count()) == op.selection.experts;
    op.bias_stride = shared ? 0 : op.selection.experts;
    if (!shared) call.expect_count(bias, op.rows * op.selection.experts);
    op.bias = static_cast<const float*>(bias.untyped_data());
  }
  op.token_mask = call.attr<bool>("has_token_mask") ? call.operand<bool>(op.rows) : nullptr;
  op.selection.scoring = read_scoring(call);
  op.selection.groups = read_groups(call);
  op.weights = call.result<float>(op.rows * op.selection.k);
  op.expert_ids = call.result<int32_t>(op.rows * op.selection.k);
  op.chosen_logits = call.has_result() ? call.result<float>(op.rows * op.selection.k) : nullptr;
}

inline void read(CallReader& call, ActivationTopk& op) {
  read_logits(call, op, op.selection.experts);
  read_selection(call, op);
}

inline void read(CallReader& call, DenseRouter& op) {
  const ffi::AnyBuffer x = call.operand();
  const ffi::AnyBuffer weight = call.operand();
  op.operand_dtype = call.dtype(x);
  op.hidden = static_cast<int32_t>(axis_from_end(x, 0));
  op.x = x.untyped_data();
  op.weight = weight.untyped_data();
  op.select.rows = leading_count(x, 1);
  op.select.selection.experts = op.hidden == 0 ? 0 : static_cast<int32_t>(weight.element_count() / op.hidden);
  op.select.dtype = DType::kF32;
  op.select.logits = nullptr;
  op.logit_bias = call.attr<bool>("has_logit_bias") ? call.operand<float>(op.select.selection.experts) : nullptr;
  read_selection(call, op.select);
}

// Everything of a RouteAt behind its ids.
inline void read_weighing(CallReader& call, RouteAt& op) {
  op.scoring = read_scoring(call);
  op.weights = call.result<float>(op.rows * op.k);
  op.valid_ids = call.result<int32_t>(op.rows * op.k);
  op.chosen_logits = call.has_result() ? call.result<float>(op.rows * op.k) : nullptr;
}

inline void read(CallReader& call, RouteAt& op) {
  read_logits(call, op, op.experts);
  const ffi::AnyBuffer expert_ids = call.operand();
  op.k = static_cast<int32_t>(axis_from_end(expert_ids, 0));
  call.expect_count(expert_ids, op.rows * op.k);
  op.expert_ids = static_cast<const int32_t*>(expert_ids.untyped_data());
  read_weighing(call, op);
}

inline void read(CallReader& call, ScoredHashRouter& op) {
  read_logits(call, op, op.experts);
  op.token_ids = call.operand<int32_t>(op.rows);
  const ffi::AnyBuffer hash_lut = call.operand();
  op.k = static_cast<int32_t>(call.result_axis_from_end(0));
  op.vocab_size = op.k == 0 ? 0 : static_cast<int64_t>(hash_lut.element_count()) / op.k;
  op.expert_ids = static_cast<const int32_t*>(hash_lut.untyped_data());
  read_weighing(call, op);
}

inline void read(CallReader& call, RouteCotangent& op) {
  const ffi::AnyBuffer grad_weights = call.operand();
  op.rows = leading_count(grad_weights, 1);
  op.k = static_cast<int32_t>(axis_from_end(grad_weights, 0));
  op.experts = static_cast<int32_t>(call.attr<int64_t>("num_experts"));
  op.scoring = read_scoring(call);
  op.grad_weights = static_cast<const float*>(grad_weights.untyped_data());
  op.expert_ids = call.operand<int32_t>(op.rows * op.k);
  op.residual = nullptr;
  if (call.attr<bool>("has_residual")) {
    op.residual = call.operand<void>(op.rows * (op.scoring.needs_whole_row() ? op.experts : op.k));
  } else if (op.scoring.score_fn != ScoreFn::kIdentity) {
    call.fail("a residual is missing");
  }
  op.dtype = call.result_dtype();
  op.grad_logits = call.result<void>(op.rows * op.experts);
}

inline void read(CallReader& call, TopkSelect& op) {
  const ffi::AnyBuffer scores = call.operand();
  op.rows = leading_count(scores, 1);
  op.length = axis_from_end(scores, 0);
  op.dtype = call.dtype(scores);
  op.scores = scores.untyped_data();
  op.k = call.attr<int64_t>("k");
  op.sorted = call.attr<bool>("sorted");
  op.lengths = call.attr<bool>("has_lengths") ? call.operand<int32_t>(op.rows) : nullptr;
  op.values = call.result<void>(op.rows * op.k);
  op.indices = call.result<int32_t>(op.rows * op.k);
}

inline void read(CallReader& call, ExpertDispatch& op) {
  const ffi::AnyBuffer expert_ids = call.operand();
  op.batch = leading_count(expert_ids, 2);
  op.tokens = axis_from_end(expert_ids, 1);
  op.k = static_cast<int32_t>(axis_from_end(expert_ids, 0));
  op.experts = static_cast<int32_t>(call.attr<int64_t>("num_experts"));
  op.expert_ids = static_cast<const int32_t*>(expert_ids.untyped_data());
  const int64_t choices = op.batch * op.tokens * op.k;
  op.token_index = call.result<int32_t>(choices);
  op.slot = call.result<int32_t>(choices);
  op.group_sizes = call.result<int32_t>(op.batch * op.experts);
}

}  // namespace jax_router
