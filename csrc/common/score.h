// Score functions and their derivatives, once for CUDA and CPU. Everything here is branch-free, so that a compiler can
// vectorise a loop over it, and within a few ulp of the exact value for every f32 input.
//
//   sqrtsoftplus(x) = sqrt(max(x, 0) + log1p(exp(-|x|)))
//   sigmoid(x)      = 1 / (1 + exp(-x))
//
// With h = exp(-|x| / 2), u = h * h and P(u) = log1p(u) / u, sqrtsoftplus is h * sqrt(P(u)) for x < 0 and
// sqrt(x + u * P(u)) for x >= 0: no cancellation, no zero before exp(x / 2) itself underflows, no overflow.
#pragma once

#include <cmath>

#include "macros.h"
#include "ops.h"
#include "order.h"

namespace jax_router {

JR_HOST_DEVICE float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// exp(factor * x) for a product <= 0 and a factor that is a power of two; NaN stays NaN.
JR_HOST_DEVICE float exp_nonpositive(float x, float factor = 1.0f) {
#ifdef __CUDA_ARCH__
  // 2^n * 2^r with n = floor(x * log2(e)), as in the compiler's expf, but the factor costs nothing.
  const float saturated = __saturatef(__fmaf_rn(x, factor * 0.005724980030208826f, 0.5f));
  const float shifted = __fmaf_rd(saturated, 252.0f, 12582913.0f);
  const float n = __fadd_rn(shifted, -12583039.0f);
  const float r = __fmaf_rn(x, factor * 1.9259630e-08f, __fmaf_rn(x, factor * 1.44269502f, -n));
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(r));
  return __fmul_rn(power, bits_float(float_bits(shifted) << 23));
#else
  x *= factor;
  // exp(x) = 2^n * exp(r), |r| <= ln(2) / 2, with a degree 6 minimax polynomial (relative error 2e-9) for exp(r). 2^n
  // is applied in two factors because n goes below the exponent of the smallest normal number.
  const float clamped = x < -104.0f ? -104.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 0.0013836845755577087f;
  p = p * r + 0.008374815806746483f;
  p = p * r + 0.04166822507977486f;
  p = p * r + 0.16666419804096222f;
  p = p * r + 0.49999991059303284f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(float_bits(shifted)) - static_cast<int32_t>(0x4B400000);
  const int32_t half = exponent >> 1;
  const float scale1 = bits_float(static_cast<uint32_t>(half + 127) << 23);
  const float scale2 = bits_float(static_cast<uint32_t>(exponent - half + 127) << 23);
  const float result = p * scale1 * scale2;
  return x != x ? x : result;
#endif
}

// For x >= 2^-126.
JR_HOST_DEVICE float fast_sqrt(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::sqrt(x);
#endif
}

JR_HOST_DEVICE float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// log1p(u) / u for u in [0, 1]: degree 9 minimax polynomial, relative error 5e-9.
JR_HOST_DEVICE float log1p_over_u(float u) {
  float p = -0.0032440118957310915f;
  p = multiply_add(p, u, 0.019851399585604668f);
  p = multiply_add(p, u, -0.05695941299200058f);
  p = multiply_add(p, u, 0.10603641718626022f);
  p = multiply_add(p, u, -0.1530558466911316f);
  p = multiply_add(p, u, 0.19675935804843903f);
  p = multiply_add(p, u, -0.24954132735729218f);
  p = multiply_add(p, u, 0.3332996368408203f);
  p = multiply_add(p, u, -0.4999990165233612f);
  return multiply_add(p, u, 1.0f);
}

JR_HOST_DEVICE float sqrtsoftplus(float x) {
  const float h = exp_nonpositive(fabsf(x), -0.5f);
  const float u = h * h;
  const float p = log1p_over_u(u);
  const float root = fast_sqrt(x < 0.0f ? p : multiply_add(u, p, x));
  return x < 0.0f ? h * root : root;
}

// sigmoid(x) / (2 sqrtsoftplus(x)), without the quotient of two underflowing numbers.
JR_HOST_DEVICE float sqrtsoftplus_derivative(float x) {
  const float h = exp_nonpositive(fabsf(x), -0.5f);
  const float u = h * h;
  const float p = log1p_over_u(u);
  const float root = fast_sqrt(x < 0.0f ? p : multiply_add(u, p, x));
  return divide(x < 0.0f ? h : 1.0f, 2.0f * (1.0f + u) * root);
}

// a / b for b in [1, 2], within an ulp.
JR_HOST_DEVICE float divide_by_1_to_2(float a, float b) {
#ifdef __CUDA_ARCH__
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  const float quotient = __fmul_rn(a, reciprocal);
  return __fmaf_rn(__fmaf_rn(-b, quotient, a), reciprocal, quotient);
#else
  return a / b;
#endif
}

JR_HOST_DEVICE float sigmoid(float x) {
  const float e = exp_nonpositive(fabsf(x), -1.0f);
  return divide_by_1_to_2(x < 0.0f ? e : 1.0f, 1.0f + e);
}

JR_HOST_DEVICE float sigmoid_derivative(float x) {
  const float e = exp_nonpositive(fabsf(x), -1.0f);
  return divide(e, (1.0f + e) * (1.0f + e));
}

// Score functions of one logit. Softmax is not: its numerator exp(x - maximum) is.
template <ScoreFn kScoreFn>
JR_HOST_DEVICE float pointwise_score(float x) {
  if constexpr (kScoreFn == ScoreFn::kSqrtSoftplus) return sqrtsoftplus(x);
  if constexpr (kScoreFn == ScoreFn::kSigmoid) return sigmoid(x);
  return x;
}

template <ScoreFn kScoreFn>
JR_HOST_DEVICE float pointwise_derivative(float x) {
  if constexpr (kScoreFn == ScoreFn::kSqrtSoftplus) return sqrtsoftplus_derivative(x);
  if constexpr (kScoreFn == ScoreFn::kSigmoid) return sigmoid_derivative(x);
  return 1.0f;
}

// The number that softmax subtracts. Finite for a row of -inf, so that its scores are 0 and not NaN.
JR_HOST_DEVICE float softmax_shift(float maximum) {
  constexpr float kLowest = -3.402823466e38f;
  return maximum < kLowest ? kLowest : maximum;
}

// What scores that add up to `sum` are divided by: not by 0, so that scores of 0 stay 0.
JR_HOST_DEVICE float nonzero_divisor(float sum) { return sum == 0.0f ? 1.0f : sum; }

// What renormalisation divides chosen scores by, from their sum.
JR_HOST_DEVICE float renormalize_divisor(const Scoring& scoring, float sum) {
  return nonzero_divisor(scoring.score_fn == ScoreFn::kSoftmax ? sum : sum + scoring.eps);
}

}  // namespace jax_router
