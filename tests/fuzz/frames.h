// Calls as plain values, the frames that XLA would make of them, and as much of XLA as a handler needs to run.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "shortage.h"
#include "xla/ffi/api/ffi.h"

namespace fuzz {

using Random = std::mt19937_64;

inline int64_t below(Random& random, int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }
inline bool chance(Random& random, int percent) { return below(random, 100) < percent; }
template <typename T>
const T& pick(Random& random, const std::vector<T>& values) {
  return values[below(random, static_cast<int64_t>(values.size()))];
}

struct Array {
  XLA_FFI_DataType dtype;
  std::vector<int64_t> sizes;
  int64_t bound = 8;  // integers lie about [0, bound)
};

struct NoScalar {};  // an attribute that is an array
using Value = std::variant<bool, int32_t, int64_t, float, double, std::string, NoScalar>;

struct Call {
  std::string target;
  std::vector<Array> operands;
  std::vector<Array> results;
  std::map<std::string, Value> attributes;  // by name in order, as in XLA's frames
};

inline int64_t width(XLA_FFI_DataType dtype) {
  switch (dtype) {
    case XLA_FFI_DataType_PRED:
    case XLA_FFI_DataType_S8:
    case XLA_FFI_DataType_U8:
    case XLA_FFI_DataType_F8E4M3FN:
      return 1;
    case XLA_FFI_DataType_S16:
    case XLA_FFI_DataType_U16:
    case XLA_FFI_DataType_F16:
    case XLA_FFI_DataType_BF16:
      return 2;
    case XLA_FFI_DataType_S64:
    case XLA_FFI_DataType_U64:
    case XLA_FFI_DataType_F64:
    case XLA_FFI_DataType_C64:
      return 8;
    default:
      return 4;
  }
}

// The bytes of an array, or -1 if it is larger than a test should be, or impossible.
inline int64_t bytes_of(const Array& array) {
  constexpr int64_t kMost = 1 << 22;
  int64_t bytes = width(array.dtype);
  for (const int64_t size : array.sizes) {
    if (size < 0) return -1;
    if (size == 0) return 0;
  }
  for (const int64_t size : array.sizes) {
    if (size > kMost / bytes) return -1;
    bytes *= size;
  }
  return bytes;
}

// What a result holds before it is written: no id, slot or count.
constexpr unsigned char kPoison = 0xAB;

// Exactly as many bytes as an array has, so that a sanitizer sees the first one beyond.
class Memory {
 public:
  Memory(const Array& array, bool is_result, Random& random) {
    const int64_t bytes = bytes_of(array);
    if (bytes < 0) {
      data_ = reinterpret_cast<void*>(uintptr_t{64});  // to be refused without a look
      return;
    }
    if (bytes == 0 && chance(random, 50)) return;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
    owned_.reset(memory);
    data_ = memory;
    if (is_result) {
      std::memset(memory, kPoison, bytes);
    } else {
      fill(array, memory, bytes, random);
    }
  }

  void* data() const { return data_; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  static void fill(const Array& array, void* memory, int64_t bytes, Random& random) {
    if (array.dtype == XLA_FFI_DataType_S32) {
      auto* const numbers = static_cast<int32_t*>(memory);
      for (int64_t i = 0; i < bytes / 4; ++i) {
        const bool wild = chance(random, 5);
        numbers[i] = static_cast<int32_t>(wild ? random() : below(random, array.bound + 2) - 1);
      }
    } else if (array.dtype == XLA_FFI_DataType_F32 && chance(random, 80)) {
      auto* const numbers = static_cast<float*>(memory);
      for (int64_t i = 0; i < bytes / 4; ++i) numbers[i] = static_cast<float>(below(random, 2001) - 1000) / 64.0f;
    } else {
      auto* const values = static_cast<unsigned char*>(memory);  // any bits: NaN, infinities, masks of 2
      for (int64_t i = 0; i < bytes; ++i) values[i] = static_cast<unsigned char>(random());
    }
  }

  std::unique_ptr<void, Free> owned_;
  void* data_ = nullptr;
};

// --- XLA

// Tasks run in turn on a few threads that all calls share.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) {
      threads_.emplace_back([this] { work(); });
    }
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      done_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void schedule(XLA_FFI_Task* task, void* data) {
    const Plenty plenty;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.emplace_back(task, data);
    }
    changed_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return done_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const auto [task, data] = tasks_.front();
      tasks_.pop_front();
      lock.unlock();
      task(data);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<XLA_FFI_Task*, void*>> tasks_;
  bool done_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace fuzz

struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

struct XLA_FFI_ExecutionContext {
  fuzz::Pool* pool;
  int64_t threads;     // what the pool says that it has
  bool pool_is_there;  // else it schedules nothing
};

namespace fuzz {

inline const XLA_FFI_Api& api() {
  static const XLA_FFI_Api api = [] {
    XLA_FFI_Api api{};
    api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api.api_version.major_version = XLA_FFI_API_MAJOR;
    api.api_version.minor_version = XLA_FFI_API_MINOR;
    api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
      const Plenty plenty;
      return new XLA_FFI_Error{args->errc, args->message};
    };
    api.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
      args->message = args->error->message.c_str();
    };
    api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
    api.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
      *args->num_threads = args->ctx->threads;
      return nullptr;
    };
    api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
      if (!args->ctx->pool_is_there) return new XLA_FFI_Error{XLA_FFI_Error_Code_UNAVAILABLE, "no pool"};
      args->ctx->pool->schedule(args->task, args->data);
      return nullptr;
    };
    return api;
  }();
  return api;
}

// What XLA asks a handler when it is registered, before any call.
inline void register_handler(XLA_FFI_Handler* handler) {
  XLA_FFI_Metadata metadata{};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  metadata.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension{};
  extension.extension_base = {XLA_FFI_Metadata_Extension_STRUCT_SIZE, XLA_FFI_Extension_Metadata, nullptr};
  extension.metadata = &metadata;
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.extension_start = &extension.extension_base;
  frame.api = &api();
  if (handler(&frame) != nullptr) std::abort();
}

struct Outcome {
  XLA_FFI_Error_Code code;
  std::string message;
  bool success() const { return code == XLA_FFI_Error_Code_OK; }
};

// A call with its memory, as XLA hands it to a handler.
class Frame {
 public:
  Frame(const Call& call, Random& random) {
    for (const Array& array : call.operands) add(array, false, random);
    for (const Array& array : call.results) add(array, true, random);
    arguments_.reserve(buffers_.size());
    for (XLA_FFI_Buffer& buffer : buffers_) arguments_.push_back(&buffer);
    arg_types_.assign(call.operands.size(), XLA_FFI_ArgType_BUFFER);
    ret_types_.assign(call.results.size(), XLA_FFI_RetType_BUFFER);
    for (const auto& [name, value] : call.attributes) {
      names_.push_back({name.data(), name.size()});
      std::visit([this](const auto& value) { add_attribute(value); }, value);
    }
    for (XLA_FFI_ByteSpan& name : names_) name_pointers_.push_back(&name);

    frame_.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame_.api = &api();
    frame_.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame_.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(call.operands.size()), arg_types_.data(),
                   arguments_.data()};
    frame_.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(call.results.size()), ret_types_.data(),
                   arguments_.data() + call.operands.size()};
    frame_.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,
                    nullptr,
                    static_cast<int64_t>(call.attributes.size()),
                    attribute_types_.data(),
                    name_pointers_.data(),
                    attributes_.data()};
  }

  Outcome run(XLA_FFI_Handler* handler, XLA_FFI_ExecutionContext context) {
    frame_.ctx = &context;
    const std::unique_ptr<XLA_FFI_Error> error(handler(&frame_));
    return error ? Outcome{error->code, error->message} : Outcome{XLA_FFI_Error_Code_OK, ""};
  }

  // Of an operand, or behind all operands a result.
  const XLA_FFI_Buffer& buffer(size_t index) const { return buffers_[index]; }

 private:
  void add(const Array& array, bool is_result, Random& random) {
    memory_.emplace_back(array, is_result, random);
    buffers_.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, array.dtype, memory_.back().data(),
                        static_cast<int64_t>(array.sizes.size()), const_cast<int64_t*>(array.sizes.data())});
  }

  template <typename T>
  void add_attribute(const T& value) {
    constexpr auto dtype = std::is_same_v<T, bool>      ? XLA_FFI_DataType_PRED
                           : std::is_same_v<T, int32_t> ? XLA_FFI_DataType_S32
                           : std::is_same_v<T, int64_t> ? XLA_FFI_DataType_S64
                           : std::is_same_v<T, float>   ? XLA_FFI_DataType_F32
                                                        : XLA_FFI_DataType_F64;
    attribute_types_.push_back(XLA_FFI_AttrType_SCALAR);
    attributes_.push_back(&scalars_.emplace_back(XLA_FFI_Scalar{dtype, const_cast<T*>(&value)}));
  }
  void add_attribute(const std::string& value) {
    attribute_types_.push_back(XLA_FFI_AttrType_STRING);
    attributes_.push_back(&strings_.emplace_back(XLA_FFI_ByteSpan{value.data(), value.size()}));
  }
  void add_attribute(const NoScalar&) {
    static int32_t numbers[] = {1, 2, 3};
    static XLA_FFI_Array array{XLA_FFI_DataType_S32, std::size(numbers), numbers};
    attribute_types_.push_back(XLA_FFI_AttrType_ARRAY);
    attributes_.push_back(&array);
  }

  std::deque<Memory> memory_;
  std::deque<XLA_FFI_Buffer> buffers_;
  std::vector<void*> arguments_;
  std::vector<XLA_FFI_ArgType> arg_types_;
  std::vector<XLA_FFI_RetType> ret_types_;
  std::deque<XLA_FFI_ByteSpan> names_;
  std::deque<XLA_FFI_Scalar> scalars_;
  std::deque<XLA_FFI_ByteSpan> strings_;
  std::vector<XLA_FFI_ByteSpan*> name_pointers_;
  std::vector<XLA_FFI_AttrType> attribute_types_;
  std::vector<void*> attributes_;
  XLA_FFI_CallFrame frame_{};
};

}  // namespace fuzz
