// One struct an op: its sizes, operands, results and options. The FFI handlers fill them, the CUDA and CPU kernels read
// them, and nothing else passes between the two: every argument list of the native code is written here and only here.
//
// Rows are tokens, flattened over all leading axes; matrices are dense and row-major. A pointer that an op calls
// optional is null when the operand was not given or the result is not wanted. The mathematics is in
// jax_router/reference.py.
#pragma once

#include <cstdint>

#include "macros.h"

namespace jax_router {

// Above these the reference implementation takes over; Python reads them from the native modules.
constexpr int kMaxExperts = 4096;
constexpr int kMaxTopK = 64;

enum class DType : int32_t { kF32, kBF16, kF16 };

// kIdentity, s(x) = x, makes the derivative kernels of the router serve plain top-k too.
enum class ScoreFn : int32_t { kSqrtSoftplus, kSigmoid, kSoftmax, kIdentity };

enum class GroupScore : int32_t { kTop2Sum, kMax };

// weights = s(chosen logits), divided by their sum + eps if renormalize, times scale. The softmax over the chosen
// logits sums to 1 and has no use for eps.
struct Scoring {
  ScoreFn score_fn;
  bool renormalize;
  float scale;
  float eps;
  // Softmax without renormalisation is the one score that depends on the logits that were not chosen.
  constexpr bool needs_whole_row() const { return score_fn == ScoreFn::kSoftmax && !renormalize; }
};

struct Groups {
  int32_t num_groups;  // 1: no groups
  int32_t top_groups;
  GroupScore score;
};

// Which of a token's experts are chosen, and how their logits become weights.
struct Selection {
  int32_t experts;
  int32_t k;
  Scoring scoring;
  Groups groups;
};

// Memory that a kernel may use as it likes while it runs, aligned to 16 bytes, with any content. A result of the call,
// so that XLA plans it as it does the others: what an allocator hands out while a CUDA graph is recorded may belong to
// somebody else when the graph runs.
struct Workspace {
  void* data = nullptr;
  int64_t bytes = INT64_MAX;  // how many there are; where nobody has said, as many as are asked for
};

struct HashRouter {
  int64_t rows;
  int64_t vocab_size;
  int32_t k;
  const int32_t* token_ids;  // [rows]
  const int32_t* hash_lut;   // [vocab_size, k]
  float* weights;            // [rows, k]
  int32_t* expert_ids;       // [rows, k]
  float scale;
};

struct ActivationTopk {
  int64_t rows;
  DType dtype;
  Selection selection;
  const void* logits;         // [rows, experts]
  const float* bias;          // optional; row r starts at bias + r * bias_stride
  int64_t bias_stride;        // 0: one bias for all rows; experts: one a row
  const uint8_t* token_mask;  // optional, [rows]: see is_masked
  float* weights;             // [rows, k]
  int32_t* expert_ids;        // [rows, k]
  float* chosen_logits;       // optional, [rows, k]: what the derivative needs (0 where the id is -1)
};

// Whether a row has no experts. A bool is the lowest bit of its byte, as in XLA's select: an array made of another
// one's memory may hold any bytes.
JR_HOST_DEVICE bool is_masked(const ActivationTopk& op, int64_t row) {
  return op.token_mask != nullptr && (op.token_mask[row] & 1) == 0;
}

struct RouteAt {
  int64_t rows;
  int32_t experts;
  int32_t k;
  DType dtype;
  const void* logits;         // [rows, experts]
  const int32_t* expert_ids;  // [rows, k], any values; with token_ids a table [vocab_size, k]
  const int32_t* token_ids;   // optional, [rows]
  int64_t vocab_size;
  float* weights;        // [rows, k]
  int32_t* valid_ids;    // [rows, k]: the id, or -1 where it is outside [0, experts)
  float* chosen_logits;  // optional, [rows, k], 0 where the id is outside
  Scoring scoring;
};

// Where the ids of a row begin, or null if its token id is outside the table.
JR_HOST_DEVICE const int32_t* ids_of_row(const RouteAt& op, int64_t row) {
  if (op.token_ids == nullptr) return op.expert_ids + row * op.k;
  const int32_t token_id = op.token_ids[row];
  return token_id >= 0 && token_id < op.vocab_size ? op.expert_ids + int64_t{token_id} * op.k : nullptr;
}

// route_at with the ids of a table: a hash layer whose weights are scores.
struct ScoredHashRouter : RouteAt {};

// The pullback of weights(logits) at fixed ids: a dense [rows, experts] gradient, written once, zero where not chosen.
// Equal ids in a row add up. ids outside [0, experts) contribute nothing.
struct RouteCotangent {
  int64_t rows;
  int32_t experts;  // any size: topk_select's row length comes through here too
  int32_t k;
  DType dtype;                // of residual (if it is the logits) and of grad_logits
  const float* grad_weights;  // [rows, k]
  const void* residual;       // null for kIdentity; else the f32 chosen logits [rows, k], or the logits
                              // [rows, experts] if scoring.needs_whole_row()
  const int32_t* expert_ids;  // [rows, k]
  void* grad_logits;          // [rows, experts], dtype; [rows, experts, 2] in bf16 if in_parts
  float* grad_chosen;         // optional, [rows, k]: that of each choice, 0 where its id is outside
  bool in_parts;              // numbers in f32 as two parts that add up to them, the larger first; not if
                              // scoring.needs_whole_row()
  Scoring scoring;
};

// route_cotangent for matrix products in bf16 with the dense gradient, and for sums over the choices alone.
struct RoutedCotangent : RouteCotangent {};

// What the products with that dense gradient g are, without g itself: g @ weight and g^T @ x, all in bf16.
struct RoutedGradients {
  int64_t rows;
  int32_t experts;
  int32_t k;
  int32_t hidden;
  const float* grad_weights;  // these three as in RouteCotangent
  const float* residual;
  const int32_t* expert_ids;
  Scoring scoring;
  const void* x;       // [rows, hidden]
  const void* weight;  // [experts, hidden]
  void* grad_x;        // [rows, hidden]
  void* grad_weight;   // [experts, hidden]
  Workspace workspace;
};

struct TopkSelect {
  int64_t rows;
  int64_t length;  // of a row
  int64_t k;
  DType dtype;
  const void* scores;      // [rows, length]
  const int32_t* lengths;  // optional, [rows]
  void* values;            // [rows, k], dtype
  int32_t* indices;        // [rows, k]
  bool sorted;             // best first, else by ascending index
};

struct ExpertDispatch {
  int64_t batch;   // independent sorts
  int64_t tokens;  // of one
  int32_t k;
  int32_t experts;
  const int32_t* expert_ids;  // [batch, tokens, k], any values
  int32_t* token_index;       // [batch, slots_of(op)], -1 in slots without a choice
  int32_t* slot;              // [batch, tokens, k], -1 where a choice has none
  int32_t* group_sizes;       // [batch, experts], multiples of align
  Workspace workspace;
  int32_t align = 1;             // groups begin at its multiples
  int32_t capacity = INT32_MAX;  // choices of a group, at most
};

// The slots of one sort: the smallest multiple of align that suffices whatever the ids are. Most are needed where every
// group has a choice, which opens the first `align` slots of it, and the other choices open as many more as they can.
JR_HOST_DEVICE int64_t slots_of(const ExpertDispatch& op) {
  const int64_t choices = op.tokens * op.k;
  const int64_t groups = op.capacity == 0 ? 0 : choices < op.experts ? choices : op.experts;
  const int64_t by_choices = (choices - groups) / op.align;
  const int64_t by_capacity = groups * ((op.capacity - int64_t{1}) / op.align);
  return groups == 0 ? 0 : op.align * (groups + (by_choices < by_capacity ? by_choices : by_capacity));
}

// How often each expert was chosen. Ids outside [0, experts) and the ids of masked tokens count nowhere.
struct ExpertCounts {
  int64_t batch;   // independent problems
  int64_t tokens;  // of one
  int32_t k;
  int32_t experts;
  const int32_t* expert_ids;  // [batch, tokens, k], any values
  const uint8_t* token_mask;  // optional, [batch, tokens]: the lowest bit of a byte counts, as in is_masked
  int32_t* counts;            // [batch, experts]
  Workspace workspace;
};

// Which choice of a token lies in which slot, of independent problems. All ids may have any values.
struct DispatchedRows {
  int64_t batch;
  int64_t tokens;  // of one problem
  int64_t slots;   // of one problem
  int32_t k;
  int64_t hidden;              // elements of a row
  const int32_t* token_index;  // [batch, slots]
  const int32_t* slot;         // [batch, tokens, k]
  JR_DEVICE_TOO constexpr int64_t token_rows() const { return batch * tokens; }
  JR_DEVICE_TOO constexpr int64_t slot_rows() const { return batch * slots; }
};

// Whether the choice of a token is in a slot, which also says so. Numbers are within one problem.
JR_HOST_DEVICE bool lies_in(const DispatchedRows& rows, int64_t problem, int64_t token, int32_t slot) {
  return slot >= 0 && slot < rows.slots && rows.token_index[problem * rows.slots + slot] == token;
}

// Whether a slot, numbered over all problems, is in use: a choice of its token is in it.
JR_HOST_DEVICE bool is_in_use(const DispatchedRows& rows, int64_t slot_row) {
  const int64_t problem = rows.batch == 1 ? 0 : slot_row / rows.slots;
  const int64_t token = rows.token_index[slot_row];
  if (token < 0 || token >= rows.tokens) return false;
  const int32_t* slots = rows.slot + (problem * rows.tokens + token) * rows.k;
  bool found = false;
  for (int32_t j = 0; j < rows.k; ++j) found |= slots[j] == slot_row - problem * rows.slots;
  return found;
}

// The row of its token in each slot that is in use, and zeros in the others.
struct Permute {
  DispatchedRows rows;
  int32_t element_bytes;  // 1, 2 or 4
  DType dtype;            // with weights
  const void* x;          // [batch, tokens, hidden]
  const float* weights;   // optional, [batch, tokens, k]: rows are multiplied by the weight of their choice
  void* out;              // [batch, slots, hidden]
};

// The sum of the rows of its slots for each token, in the order of its choices.
struct Combine {
  DispatchedRows rows;
  DType dtype;
  const void* y;         // [batch, slots, hidden]
  const float* weights;  // optional, [batch, tokens, k]
  void* out;             // [batch, tokens, hidden]
};

// Both cotangents of a weighted permute: combine(grad, weights), and the products of the rows of x and grad.
struct PermuteCotangent {
  DispatchedRows rows;
  DType dtype;
  const void* grad;      // [batch, slots, hidden]
  const void* x;         // [batch, tokens, hidden]
  const float* weights;  // [batch, tokens, k]
  void* grad_x;          // [batch, tokens, hidden]
  float* grad_weights;   // [batch, tokens, k], 0 where a choice has no slot
};

// Both cotangents of a weighted combine: permute(grad, weights), and the products of the rows of grad and y.
struct CombineCotangent {
  DispatchedRows rows;
  DType dtype;
  const void* grad;      // [batch, tokens, hidden]
  const void* y;         // [batch, slots, hidden]
  const float* weights;  // [batch, tokens, k]
  void* grad_y;          // [batch, slots, hidden]
  float* grad_weights;   // [batch, tokens, k], 0 where a choice has no slot
};

// logits = x @ weight^T (+ logit_bias) in f32, and ActivationTopk on them.
struct DenseRouter {
  DType operand_dtype;  // of x
  DType weight_dtype;   // that of x, or f32
  int32_t hidden;
  const void* x;            // [rows, hidden]
  const void* weight;       // [experts, hidden]
  const float* logit_bias;  // optional, [experts]
  ActivationTopk select;    // all the rest; its logits stay null
  Workspace workspace;
};

}  // namespace jax_router
