// Calls the handlers with frames that XLA would make, that it would not make, and that nobody should. Built with
// sanitizers by tests/fuzz/CMakeLists.txt; `nox -s fuzz` builds and runs it.
//
//   fuzz [--seconds S] [--executions N] [--seed SEED] [--threads T] [--valid]
//
// Every execution is made of a seed of its own, the first one of SEED, and the next one of SEED + 1: so the one that
// failed can be had again with --seed and --executions 1. With --valid the calls are those that Python makes, without
// shortage of memory: for the tool that looks for races.
#include <sanitizer/common_interface_defs.h>

#include <atomic>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../../csrc/ffi/cpu_backend.h"
#include "calls.h"
#include "frames.h"
#include "shortage.h"

extern "C" const char* __asan_default_options() { return "handle_abort=1"; }

namespace fuzz {
namespace {

// --- A backend that computes nothing: it reads and writes all that an op may, as common/ops.h gives its sizes. The
// handlers of the CUDA module read their calls by the same code, so this is their half that runs on the host.

int64_t width(jax_router::DType dtype) { return dtype == jax_router::DType::kF32 ? 4 : 2; }

void look_at(const void* data, int64_t bytes) {
  if (data == nullptr) return;
  unsigned char sum = 0;
  for (int64_t i = 0; i < bytes; ++i) sum += static_cast<const unsigned char*>(data)[i];
  static std::atomic<unsigned char> sink;
  sink.store(sum, std::memory_order_relaxed);
}

void write_over(void* data, int64_t bytes) {
  if (data != nullptr) std::memset(data, 0, bytes);
}

void touch(const jax_router::HashRouter& op) {
  look_at(op.token_ids, 4 * op.rows);
  look_at(op.hash_lut, 4 * op.vocab_size * op.k);
  write_over(op.weights, 4 * op.rows * op.k);
  write_over(op.expert_ids, 4 * op.rows * op.k);
}

void touch(const jax_router::ActivationTopk& op) {
  const auto& [experts, k, scoring, groups] = op.selection;
  look_at(op.logits, width(op.dtype) * op.rows * experts);
  look_at(op.bias, 4 * (op.bias_stride == 0 ? experts : op.rows * experts));
  look_at(op.token_mask, op.rows);
  write_over(op.weights, 4 * op.rows * k);
  write_over(op.expert_ids, 4 * op.rows * k);
  write_over(op.chosen_logits, 4 * op.rows * k);
}

void touch(const jax_router::DenseRouter& op) {
  look_at(op.x, width(op.operand_dtype) * op.select.rows * op.hidden);
  look_at(op.weight, width(op.weight_dtype) * op.select.selection.experts * op.hidden);
  look_at(op.logit_bias, 4 * op.select.selection.experts);
  write_over(op.workspace.data, op.workspace.bytes);
  touch(op.select);
}

void touch(const jax_router::RouteAt& op) {
  look_at(op.logits, width(op.dtype) * op.rows * op.experts);
  look_at(op.token_ids, 4 * op.rows);
  look_at(op.expert_ids, 4 * op.k * (op.token_ids == nullptr ? op.rows : op.vocab_size));
  write_over(op.weights, 4 * op.rows * op.k);
  write_over(op.valid_ids, 4 * op.rows * op.k);
  write_over(op.chosen_logits, 4 * op.rows * op.k);
}

void touch(const jax_router::RouteCotangent& op) {
  look_at(op.grad_weights, 4 * op.rows * op.k);
  look_at(op.expert_ids, 4 * op.rows * op.k);
  look_at(op.residual, op.scoring.needs_whole_row() ? width(op.dtype) * op.rows * op.experts : 4 * op.rows * op.k);
  write_over(op.grad_logits, width(op.dtype) * op.rows * op.experts);
  write_over(op.grad_chosen, 4 * op.rows * op.k);
}

void touch(const jax_router::RoutedGradients& op) {
  look_at(op.grad_weights, 4 * op.rows * op.k);
  look_at(op.residual, 4 * op.rows * op.k);
  look_at(op.expert_ids, 4 * op.rows * op.k);
  look_at(op.x, 2 * op.rows * op.hidden);
  look_at(op.weight, int64_t{2} * op.experts * op.hidden);
  write_over(op.grad_x, 2 * op.rows * op.hidden);
  write_over(op.grad_weight, int64_t{2} * op.experts * op.hidden);
  write_over(op.workspace.data, op.workspace.bytes);
}

void touch(const jax_router::TopkSelect& op) {
  look_at(op.scores, width(op.dtype) * op.rows * op.length);
  look_at(op.lengths, 4 * op.rows);
  write_over(op.values, width(op.dtype) * op.rows * op.k);
  write_over(op.indices, 4 * op.rows * op.k);
}

void touch(const jax_router::ExpertDispatch& op) {
  look_at(op.expert_ids, 4 * op.batch * op.tokens * op.k);
  write_over(op.token_index, 4 * op.batch * jax_router::slots_of(op));
  write_over(op.slot, 4 * op.batch * op.tokens * op.k);
  write_over(op.group_sizes, 4 * op.batch * op.experts);
  write_over(op.workspace.data, op.workspace.bytes);
}

void touch(const jax_router::DispatchedRows& rows, const float* weights) {
  look_at(rows.token_index, 4 * rows.slot_rows());
  look_at(rows.slot, 4 * rows.token_rows() * rows.k);
  look_at(weights, 4 * rows.token_rows() * rows.k);
}

void touch(const jax_router::Permute& op) {
  touch(op.rows, op.weights);
  look_at(op.x, op.element_bytes * op.rows.token_rows() * op.rows.hidden);
  write_over(op.out, op.element_bytes * op.rows.slot_rows() * op.rows.hidden);
}

void touch(const jax_router::Combine& op) {
  touch(op.rows, op.weights);
  look_at(op.y, width(op.dtype) * op.rows.slot_rows() * op.rows.hidden);
  write_over(op.out, width(op.dtype) * op.rows.token_rows() * op.rows.hidden);
}

void touch(const jax_router::PermuteCotangent& op) {
  touch(op.rows, op.weights);
  look_at(op.grad, width(op.dtype) * op.rows.slot_rows() * op.rows.hidden);
  look_at(op.x, width(op.dtype) * op.rows.token_rows() * op.rows.hidden);
  write_over(op.grad_x, width(op.dtype) * op.rows.token_rows() * op.rows.hidden);
  write_over(op.grad_weights, 4 * op.rows.token_rows() * op.rows.k);
}

void touch(const jax_router::CombineCotangent& op) {
  touch(op.rows, op.weights);
  look_at(op.grad, width(op.dtype) * op.rows.token_rows() * op.rows.hidden);
  look_at(op.y, width(op.dtype) * op.rows.slot_rows() * op.rows.hidden);
  write_over(op.grad_y, width(op.dtype) * op.rows.slot_rows() * op.rows.hidden);
  write_over(op.grad_weights, 4 * op.rows.token_rows() * op.rows.k);
}

void touch(const jax_router::ExpertCounts& op) {
  look_at(op.expert_ids, 4 * op.batch * op.tokens * op.k);
  look_at(op.token_mask, op.batch * op.tokens);
  write_over(op.counts, 4 * op.batch * op.experts);
  write_over(op.workspace.data, op.workspace.bytes);
}

// Whether the memory of this thread's call is there to be touched.
thread_local bool memory_is_there = true;

struct Touch : jax_router::Cpu {
  template <typename Op>
  static constexpr bool kHas = true;

  template <typename Op>
  static jax_router::ffi::Error run(const Op& op, jax_router::ffi::ThreadPool) {
    if (memory_is_there) touch(op);
    return jax_router::ffi::Error::Success();
  }
};

struct Target {
  XLA_FFI_Handler* touch = nullptr;
  XLA_FFI_Handler* cpu = nullptr;
  jax_router::Declaration declaration;
};

std::map<std::string, Target> all_targets() {
  std::map<std::string, Target> targets;
  jax_router::for_each_target<Touch>([&](const char* name, XLA_FFI_Handler* handler, const auto& declaration) {
    register_handler(handler);
    targets[name].touch = handler;
    targets[name].declaration = declaration;
  });
  jax_router::for_each_target<jax_router::Cpu>([&](const char* name, XLA_FFI_Handler* handler, const auto&) {
    register_handler(handler);
    targets[name].cpu = handler;
  });
  return targets;
}

// --- What must hold

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// A call that Python makes has the attributes that are declared.
void check_valid(const Call& call, const jax_router::Declaration& declaration) {
  std::set<std::string> declared, made;
  for (const auto& attribute : declaration.attributes) declared.insert(attribute.first);
  for (const auto& attribute : call.attributes) made.insert(attribute.first);
  require(made == declared, "the calls made here have other attributes than the target declares");
}

// Nothing that it does not declare or is not told of, and all of the rest.
void check_accepted(const Call& call, const jax_router::Declaration& declaration) {
  const auto is_optional = [](const std::string& name) { return name.back() == '?'; };
  const auto is_told = [&](const std::string& name) {
    return std::get<bool>(call.attributes.at("has_" + name.substr(0, name.size() - 1)));
  };
  size_t operands = 0, results = 0;
  for (const std::string& name : declaration.operands) operands += !is_optional(name) || is_told(name);
  for (const std::string& name : declaration.results) results += !is_optional(name);
  require(call.operands.size() == operands, "accepted with too many or too few operands");
  require(call.results.size() >= results && call.results.size() <= declaration.results.size(),
          "accepted with too many or too few results");
  for (const auto& [name, type] : declaration.attributes) {
    const Value& value = call.attributes.at(name);
    require(type == (std::holds_alternative<bool>(value)      ? "bool"
                     : std::holds_alternative<int64_t>(value) ? "int64"
                     : std::holds_alternative<float>(value)   ? "float32"
                                                              : "string"),
            "accepted with another type of " + name);
  }
}

void check_refusal(const Call& call, const Outcome& outcome) {
  const auto has = [&](const std::string& text) { return outcome.message.find(text) != std::string::npos; };
  require(outcome.code == XLA_FFI_Error_Code_INVALID_ARGUMENT && has("jax_router." + call.target + ": ") &&
              has(" must be ") && has(", got "),
          "an error that does not say enough: " + outcome.message);
}

// Integers in [low, high); nothing that was left unwritten is.
void check_between(const XLA_FFI_Buffer& buffer, int64_t low, int64_t high) {
  int64_t count = 1;
  for (int64_t i = 0; i < buffer.rank; ++i) count *= buffer.dims[i];
  for (int64_t i = 0; i < count; ++i) {
    const int32_t number = static_cast<const int32_t*>(buffer.data)[i];
    require(number >= low && number < high, "a result out of bounds: " + std::to_string(number));
  }
}

void check_results(const Call& call, const Frame& frame) {
  const auto last = [](const Array& array, size_t axis) { return array.sizes[array.sizes.size() - 1 - axis]; };
  const auto result = [&](size_t index) -> const XLA_FFI_Buffer& { return frame.buffer(call.operands.size() + index); };
  if (call.target == "expert_dispatch") {
    const int64_t tokens = last(call.operands[0], 1), slots = last(call.results[0], 0);
    check_between(result(0), -1, tokens);
    check_between(result(1), -1, slots);
    check_between(result(2), 0, slots + 1);
  } else if (call.target == "expert_counts") {
    check_between(result(0), 0, last(call.operands[0], 0) * last(call.operands[0], 1) + 1);
  } else if (call.results.size() > 1 && call.results[1].dtype == XLA_FFI_DataType_S32 && call.target != "hash_router") {
    check_between(result(1), -1, last(call.operands[0], 0));  // ids
  }
}

// --- Executions

std::string text(const std::vector<Array>& arrays) {
  std::string result;
  for (const Array& array : arrays) {
    result += " " + jax_router::text(static_cast<jax_router::ffi::DataType>(array.dtype)) + "[";
    for (const int64_t size : array.sizes) result += " " + std::to_string(size);
    result += " ]";
  }
  return result;
}

enum class Kind { kValid, kShortOfMemory, kBeyondLimits, kChanged, kAny };

// The seed of the execution that began last, for the report of a sanitizer.
std::atomic<uint64_t> last_seed{0};

struct Counts {
  std::atomic<int64_t> executions{0}, accepted{0}, refused{0}, out_of_memory{0};
};

class Fuzzer {
 public:
  explicit Fuzzer(bool valid_alone) : valid_alone_(valid_alone), targets_(all_targets()), pool_(4) {
    for (const auto& target : targets_) names_.push_back(target.first);
  }

  const Counts& counts() const { return counts_; }

  void execute(uint64_t seed) {
    last_seed = seed;
    Random random(seed);
    const Kind kind = valid_alone_ ? Kind::kValid : pick(random, kinds_);
    Call call = Calls(random, kind == Kind::kBeyondLimits).make(pick(random, names_));
    const Target& target = targets_.at(call.target);
    check_valid(call, target.declaration);
    if (kind == Kind::kAny) call = any_call(call, random);
    if (kind == Kind::kChanged) {
      for (int64_t changes = 1 + below(random, 3); changes > 0; --changes) change(call, random);
    }
    try {
      run(call, kind, target, random);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(call.target + " of" + text(call.operands) + " to" + text(call.results) + ": " +
                               error.what());
    }
    ++counts_.executions;
  }

 private:
  void run(const Call& call, Kind kind, const Target& target, Random& random) {
    memory_is_there = true;
    for (const auto* arrays : {&call.operands, &call.results}) {
      for (const Array& array : *arrays) memory_is_there = memory_is_there && bytes_of(array) >= 0;
    }
    // Where there is no pool, XLA's header makes a message of that, and cannot do without memory for it.
    const bool pool_is_there = kind == Kind::kShortOfMemory || chance(random, 95);
    const XLA_FFI_ExecutionContext context{&pool_, 1 + below(random, 4), pool_is_there};

    const Outcome read = Frame(call, random).run(target.touch, context);
    check(call, kind, read);
    if (target.cpu != nullptr && (memory_is_there || !read.success())) {
      Frame frame(call, random);
      if (kind == Kind::kShortOfMemory) allocations_left = below(random, 40);
      const Outcome computed = frame.run(target.cpu, context);
      allocations_left = -1;
      check(call, kind, computed);
      require(computed.success() == read.success() || computed.code == XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
              "one backend refuses what another takes: " + read.message + computed.message);
      if (computed.success()) check_results(call, frame);
    }
  }

  void check(const Call& call, Kind kind, const Outcome& outcome) {
    if (outcome.success()) {
      check_accepted(call, targets_.at(call.target).declaration);
      ++counts_.accepted;
    } else if (kind == Kind::kShortOfMemory && outcome.code == XLA_FFI_Error_Code_RESOURCE_EXHAUSTED) {
      ++counts_.out_of_memory;
    } else {
      require(kind != Kind::kValid && kind != Kind::kShortOfMemory, "refused, and should not be: " + outcome.message);
      check_refusal(call, outcome);
      ++counts_.refused;
    }
  }

  const bool valid_alone_;
  const std::map<std::string, Target> targets_;
  const std::vector<Kind> kinds_ = {Kind::kValid,        Kind::kValid,   Kind::kShortOfMemory,
                                    Kind::kBeyondLimits, Kind::kChanged, Kind::kChanged,
                                    Kind::kChanged,      Kind::kChanged, Kind::kAny};
  std::vector<std::string> names_;
  Pool pool_;
  Counts counts_;
};

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  double seconds = 30;
  int64_t executions = std::numeric_limits<int64_t>::max();
  uint64_t seed = std::random_device()();
  int threads = 1;
  bool valid_alone = false;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const bool has_value = i + 1 < argc;
    if (option == "--valid") {
      valid_alone = true;
    } else if (option == "--seconds" && has_value) {
      seconds = std::stod(argv[++i]);
    } else if (option == "--executions" && has_value) {
      executions = std::stoll(argv[++i]);
    } else if (option == "--seed" && has_value) {
      seed = std::stoull(argv[++i]);
    } else if (option == "--threads" && has_value) {
      threads = std::stoi(argv[++i]);
    } else {
      std::fprintf(stderr, "unknown option, or one without its value: %s\n", argv[i]);
      return 2;
    }
  }
  if (threads > 1 && !valid_alone) {
    std::fprintf(stderr, "--threads needs --valid: shortage of memory is that of all threads\n");
    return 2;
  }

  std::printf("seed %" PRIu64 ", %d threads\n", seed, threads);
  std::fflush(stdout);
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "--seed %" PRIu64 "\n", fuzz::last_seed.load()); });
  fuzz::Fuzzer fuzzer(valid_alone);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    for (int64_t i; !failed && (i = next++) < executions && std::chrono::steady_clock::now() < end;) {
      try {
        fuzzer.execute(seed + i);
      } catch (const std::exception& error) {
        failed = true;
        std::fprintf(stderr, "--seed %" PRIu64 ": %s\n", seed + i, error.what());
      }
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
  const fuzz::Counts& counts = fuzzer.counts();
  std::printf("%" PRId64 " executions: %" PRId64 " calls accepted, %" PRId64 " refused, %" PRId64 " out of memory\n",
              counts.executions.load(), counts.accepted.load(), counts.refused.load(), counts.out_of_memory.load());
  return failed ? 1 : 0;
}
