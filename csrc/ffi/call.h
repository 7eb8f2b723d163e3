// One call of a custom-call target, as XLA makes it: operands and results in order, attributes by name. A saved program
// or a call written by hand may pass anything, so nothing reaches a kernel unchecked: every argument is asked for by
// its name and with what it must be, and the first one that is not becomes the call's error.
//
// The code that reads the arguments of a target is also its declaration: with a Declaration in place of a call it runs
// just the same, finds nothing, and leaves the name of everything that it asked for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/ops.h"
#include "xla/ffi/api/ffi.h"

namespace jax_router {

namespace ffi = xla::ffi;

constexpr const char* kPrefix = "jax_router.";  // of the targets' names

// What a target takes and returns, in order; the name of what may be absent ends in "?".
struct Declaration {
  std::vector<std::string> operands;
  std::vector<std::string> results;
  std::vector<std::pair<std::string, std::string>> attributes;  // name and type
};

// The numbers that an argument may be, and what the largest of them is.
struct Range {
  int64_t low;
  int64_t high;
  const char* meaning = "";
};

// Those of the numbers that T holds.
template <typename T>
Range within(const Range& range) {
  return {range.low, std::min<int64_t>(range.high, std::numeric_limits<T>::max()), range.meaning};
}

inline bool holds(const Range& range, int64_t value) { return value >= range.low && value <= range.high; }

inline std::string text(const Range& range) {
  if (range.high == std::numeric_limits<int64_t>::max()) return "at least " + std::to_string(range.low);
  return "from " + std::to_string(range.low) + " to " + std::to_string(range.high) + range.meaning;
}

template <typename T>
struct Choice {
  const char* name;
  T value;
};

// As numpy calls it.
inline std::string text(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::PRED:
      return "bool";
    case ffi::DataType::S8:
      return "int8";
    case ffi::DataType::S16:
      return "int16";
    case ffi::DataType::S32:
      return "int32";
    case ffi::DataType::S64:
      return "int64";
    case ffi::DataType::U8:
      return "uint8";
    case ffi::DataType::U16:
      return "uint16";
    case ffi::DataType::U32:
      return "uint32";
    case ffi::DataType::U64:
      return "uint64";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::F64:
      return "float64";
    default:
      return "dtype " + std::to_string(static_cast<int>(dtype)) + " of XLA";
  }
}

inline ffi::DataType wire(DType dtype) {
  return dtype == DType::kF32 ? ffi::DataType::F32 : dtype == DType::kBF16 ? ffi::DataType::BF16 : ffi::DataType::F16;
}

template <typename T>
constexpr ffi::DataType wire() {
  if constexpr (std::is_same_v<T, float>) return ffi::DataType::F32;
  if constexpr (std::is_same_v<T, int32_t>) return ffi::DataType::S32;
  if constexpr (std::is_same_v<T, uint8_t>) return ffi::DataType::PRED;  // a byte that holds a bool
}

class Call;

// An operand or a result. The axes before a row's own are rows, however many there are. What is not there answers as
// something empty would, and every pointer to it is null.
class Argument {
 public:
  bool given() const { return given_; }
  const void* data() const { return data_; }

  // Which of the dtypes that the kernels compute with.
  DType float_dtype() const;

  // The bytes of an element, of a float dtype of at most 4.
  int32_t float_bytes() const;

  // The number of rows, where a row has `own` axes.
  int64_t rows(size_t own) const;

  // The size of an axis, counted from the last one, which is 0.
  template <typename T>
  T size(size_t axis, const Range& range) const;

  // Its numbers, which are of one type, in so many rows whose own axes have these sizes. Rows of one number each may
  // have an axis for it.
  template <typename T>
  T* numbers(int64_t rows, std::initializer_list<int64_t> own) const {
    return static_cast<T*>(numbers(wire<T>(), rows, own));
  }
  void* numbers(DType dtype, int64_t rows, std::initializer_list<int64_t> own) const {
    return numbers(wire(dtype), rows, own);
  }
  void* numbers_like(const Argument& other, int64_t rows, std::initializer_list<int64_t> own) const {
    return numbers(other.dtype_, rows, own);
  }

  // Its memory, whatever its axes are; and how many elements it has.
  void* memory(ffi::DataType dtype) const {
    if (dtype_ != dtype) must_be(text(dtype));
    return dtype_ == dtype ? data_ : nullptr;
  }
  int64_t elements() const { return rows(0); }

  // The n of a table [n, size] that all rows share, which may come flattened; the lowest of the range if it is no such
  // table.
  template <typename T>
  T table(ffi::DataType dtype, int64_t size, const Range& range) const;

  // Whether it is one row [size] and not one for each of the rows.
  bool is_one_row_of(int64_t size) const { return sizes_.size() == 1 && sizes_[0] == size; }

  void must_be(const std::string& wanted) const;

 private:
  friend class Call;
  Argument(Call& call, const char* name) : call_(call), name_(name) {}
  Argument(Call& call, const char* name, ffi::AnyBuffer buffer);

  void* numbers(ffi::DataType dtype, int64_t rows, std::initializer_list<int64_t> own) const;
  int64_t axis(size_t from_last) const { return sizes_[sizes_.size() - 1 - from_last]; }

  Call& call_;
  const char* name_;
  bool given_ = false;
  ffi::DataType dtype_ = ffi::DataType::INVALID;
  ffi::AnyBuffer::Dimensions sizes_;
  void* data_ = nullptr;
};

class Call {
 public:
  Call(const char* target, ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes)
      : target_(target), operands_(operands), results_(results), attributes_(attributes) {}

  explicit Call(Declaration& declaration)
      : Call("", ffi::RemainingArgs(&kNoOperands, 0), ffi::RemainingRets(&kNoResults, 0),
             ffi::Dictionary(&kNoAttributes)) {
    declaration_ = &declaration;
  }

  Argument operand(const char* name);
  Argument optional_operand(const char* name);  // there if the attribute has_<name> says so
  Argument result(const char* name);
  Argument optional_result(const char* name);  // there if the call has one more result

  bool flag(std::string_view name) { return attribute<bool>(name, "bool"); }
  float number(const char* name) { return attribute<float>(name, "float32"); }

  // The lowest of the range if there is none.
  template <typename T>
  T integer(const char* name, const Range& range);

  // The value of the first `count` choices whose name the attribute has.
  template <typename T>
  T choice(const char* name, const Choice<T>* choices, size_t count);
  template <typename T, size_t kCount>
  T choice(const char* name, const Choice<T> (&choices)[kCount]) {
    return choice(name, choices, kCount);
  }

  // Nothing may be left over. Returns the first thing that was wrong.
  ffi::Error finish();

  void must_be(std::string_view name, const std::string& wanted, const std::string& got);

 private:
  friend class Argument;

  template <typename T>
  T attribute(std::string_view name, const char* type);
  const char* type_of(std::string_view name) const;

  static constexpr XLA_FFI_Args kNoOperands{};
  static constexpr XLA_FFI_Rets kNoResults{};
  static constexpr XLA_FFI_Attrs kNoAttributes{};

  const char* target_;
  ffi::RemainingArgs operands_;
  ffi::RemainingRets results_;
  ffi::Dictionary attributes_;
  Declaration* declaration_ = nullptr;
  size_t next_operand_ = 0;
  size_t next_result_ = 0;
  ffi::Error error_ = ffi::Error::Success();
};

// --- Argument

inline Argument::Argument(Call& call, const char* name, ffi::AnyBuffer buffer)
    : call_(call),
      name_(name),
      given_(true),
      dtype_(buffer.element_type()),
      sizes_(buffer.dimensions()),
      data_(buffer.untyped_data()) {
  // So few that no number of rows, elements or bytes overflows, not even where an axis is empty.
  constexpr int64_t kMostElements = int64_t{1} << 56;
  int64_t left = kMostElements;
  for (const int64_t size : sizes_) left = size < 0 ? 0 : left / std::max<int64_t>(size, 1);
  if (left > 0) return;
  must_be("of at most 2^56 elements");
  given_ = false;
  sizes_ = {};
}

inline void Argument::must_be(const std::string& wanted) const {
  if (!given_) return;  // said where it was found missing
  std::string got = text(dtype_) + " [";
  for (size_t i = 0; i < sizes_.size(); ++i) got += (i == 0 ? "" : ", ") + std::to_string(sizes_[i]);
  call_.must_be(name_, wanted, got + "]");
}

inline DType Argument::float_dtype() const {
  switch (dtype_) {
    case ffi::DataType::F32:
      return DType::kF32;
    case ffi::DataType::BF16:
      return DType::kBF16;
    case ffi::DataType::F16:
      return DType::kF16;
    default:
      must_be("float32, bfloat16 or float16");
      return DType::kF32;
  }
}

inline int32_t Argument::float_bytes() const {
  switch (dtype_) {
    case ffi::DataType::F32:
      return 4;
    case ffi::DataType::BF16:
    case ffi::DataType::F16:
      return 2;
    case ffi::DataType::F8E3M4:
    case ffi::DataType::F8E4M3:
    case ffi::DataType::F8E4M3B11FNUZ:
    case ffi::DataType::F8E4M3FN:
    case ffi::DataType::F8E4M3FNUZ:
    case ffi::DataType::F8E5M2:
    case ffi::DataType::F8E5M2FNUZ:
    case ffi::DataType::F8E8M0FNU:
      return 1;
    default:
      must_be("float32, bfloat16, float16 or a float of 8 bits");
      return 4;
  }
}

inline int64_t Argument::rows(size_t own) const {
  if (sizes_.size() < own) {
    must_be("of at least " + std::to_string(own) + " axes");
    return 0;
  }
  int64_t count = 1;
  for (size_t i = 0; i + own < sizes_.size(); ++i) count *= sizes_[i];
  return given_ ? count : 0;
}

template <typename T>
T Argument::size(size_t axis_from_last, const Range& range) const {
  if (sizes_.size() <= axis_from_last) {
    must_be("of at least " + std::to_string(axis_from_last + 1) + " axes");
    return static_cast<T>(range.low);
  }
  const int64_t size = axis(axis_from_last);
  if (holds(within<T>(range), size)) return static_cast<T>(size);
  const std::string which = axis_from_last == 0 ? "last" : "last but " + std::to_string(axis_from_last);
  must_be("of a size " + text(within<T>(range)) + " in its " + which + " axis");
  return static_cast<T>(range.low);
}

inline void* Argument::numbers(ffi::DataType dtype, int64_t rows, std::initializer_list<int64_t> own) const {
  if (!given_) return nullptr;
  const size_t rank = sizes_.size();
  bool fits = dtype_ == dtype && rank >= own.size() && this->rows(own.size()) == rows;
  for (size_t i = 0; fits && i < own.size(); ++i) fits = sizes_[rank - own.size() + i] == own.begin()[i];
  if (fits) return data_;
  std::string wanted = text(dtype) + " [...";
  for (const int64_t size : own) wanted += ", " + std::to_string(size);
  must_be(wanted + "] of " + std::to_string(rows) + " rows");
  return nullptr;
}

template <typename T>
T Argument::table(ffi::DataType dtype, int64_t size, const Range& range) const {
  const size_t rank = sizes_.size();
  if (dtype_ == dtype && ((rank == 2 && axis(0) == size) || (rank == 1 && axis(0) % size == 0))) {
    const int64_t n = rank == 2 ? axis(1) : axis(0) / size;
    if (holds(within<T>(range), n)) return static_cast<T>(n);
  }
  must_be(text(dtype) + " [n, " + std::to_string(size) + "], flattened or not, with n " + text(within<T>(range)));
  return static_cast<T>(range.low);
}

// --- Call

inline Argument Call::operand(const char* name) {
  if (declaration_ != nullptr) {
    declaration_->operands.emplace_back(name);
    return {*this, name};
  }
  const auto buffer = operands_.get<ffi::AnyBuffer>(next_operand_++);
  if (buffer.has_value()) return {*this, name, *buffer};
  must_be(name, "given", std::to_string(operands_.size()) + " operands");
  return {*this, name};
}

inline Argument Call::optional_operand(const char* name) {
  const bool given = flag("has_" + std::string(name));
  if (declaration_ != nullptr) declaration_->operands.push_back(std::string(name) + "?");
  return given ? operand(name) : Argument(*this, name);
}

inline Argument Call::result(const char* name) {
  if (declaration_ != nullptr) {
    declaration_->results.emplace_back(name);
    return {*this, name};
  }
  auto buffer = results_.get<ffi::AnyBuffer>(next_result_++);
  if (buffer.has_value()) return {*this, name, **buffer};
  must_be(name, "given", std::to_string(results_.size()) + " results");
  return {*this, name};
}

inline Argument Call::optional_result(const char* name) {
  if (declaration_ != nullptr) declaration_->results.push_back(std::string(name) + "?");
  return next_result_ < results_.size() ? result(name) : Argument(*this, name);
}

inline const char* Call::type_of(std::string_view name) const {
  if (!attributes_.contains(name)) return "none";
  if (attributes_.contains<bool>(name)) return "bool";
  if (attributes_.contains<int32_t>(name)) return "int32";
  if (attributes_.contains<int64_t>(name)) return "int64";
  if (attributes_.contains<float>(name)) return "float32";
  if (attributes_.contains<double>(name)) return "float64";
  if (attributes_.contains<std::string_view>(name)) return "string";
  return "another type";
}

template <typename T>
T Call::attribute(std::string_view name, const char* type) {
  if (declaration_ != nullptr) {
    declaration_->attributes.emplace_back(name, type);
    return T{};
  }
  const ffi::ErrorOr<T> value = attributes_.get<T>(name);
  if (value.has_value()) return *value;
  must_be(name, std::string("of type ") + type, type_of(name));
  return T{};
}

template <typename T>
T Call::integer(const char* name, const Range& range) {
  const auto value = attribute<int64_t>(name, "int64");
  if (holds(within<T>(range), value)) return static_cast<T>(value);
  must_be(name, text(within<T>(range)), std::to_string(value));
  return static_cast<T>(range.low);
}

template <typename T>
T Call::choice(const char* name, const Choice<T>* choices, size_t count) {
  const auto value = attribute<std::string_view>(name, "string");
  for (size_t i = 0; i < count; ++i) {
    if (value == choices[i].name) return choices[i].value;
  }
  std::string wanted;
  for (size_t i = 0; i < count; ++i) wanted += (i == 0 ? "" : " or ") + std::string(choices[i].name);
  must_be(name, wanted, std::string(value));
  return choices[0].value;
}

inline ffi::Error Call::finish() {
  if (next_operand_ < operands_.size()) {
    must_be("operands", std::to_string(next_operand_), std::to_string(operands_.size()));
  }
  if (next_result_ < results_.size()) {
    must_be("results", std::to_string(next_result_), std::to_string(results_.size()));
  }
  return error_;
}

inline void Call::must_be(std::string_view name, const std::string& wanted, const std::string& got) {
  if (error_.failure()) return;
  error_ = ffi::Error::InvalidArgument(std::string(kPrefix) + target_ + ": " + std::string(name) + " must be " +
                                       wanted + ", got " + got);
}

}  // namespace jax_router
