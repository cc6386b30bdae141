// Vectors of W floats for the instruction set in force, by the compilers' vector extensions.
#pragma once

#include "dtype.h"
#include "isa.h"

SVITT_KERNELS_BEGIN

constexpr int W = SVITT_LANES;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2e = 1.4426950408889634f;

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

SVITT_INLINE vf splat(float x) { return x - vf{}; }

template <class V, class T>
SVITT_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SVITT_INLINE vf load(const float* p) { return load_as<vf>(p); }
SVITT_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

#if SVITT_LANES == 16
SVITT_INLINE vf vmax(vf a, vf b) {
  return reinterpret_cast<vf>(_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b));
}
#elif SVITT_LANES == 8
SVITT_INLINE vf vmax(vf a, vf b) {
  return reinterpret_cast<vf>(_mm256_max_ps((__m256)a, (__m256)b));
}
#else
SVITT_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
#endif

SVITT_INLINE vi lane_numbers() {
  vi lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes;
}

/// a b + c, rounded once where the processor can; of an expression the compiler decides.
SVITT_INLINE vf multiply_add(vf a, vf b, vf c) {
#if SVITT_LANES == 16
  return reinterpret_cast<vf>(_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c));
#elif SVITT_LANES == 8
  return reinterpret_cast<vf>(_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c));
#else
  return a * b + c;
#endif
}

/// Whether a comparison holds in any lane.
SVITT_INLINE bool any_lane(vi lanes) {
#if SVITT_LANES == 16
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif SVITT_LANES == 8
  return _mm256_testz_si256((__m256i)lanes, (__m256i)lanes) == 0;
#else
  int32_t any = 0;
  for (int i = 0; i < W; ++i) any |= lanes[i];
  return any != 0;
#endif
}

/// Lanes of a, then of b, in the order of `from`.
SVITT_INLINE vf shuffle(vf a, vf b, vi from) {
#if defined(__clang__)
  vf result;
  for (int i = 0; i < W; ++i) result[i] = from[i] < W ? a[from[i]] : b[from[i] - W];
  return result;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

/// Reduce the lanes pairwise, in an order that does not depend on the compiler.
SVITT_INLINE float hmax(vf v) {
  for (int half = W / 2; half > 0; half /= 2) v = vmax(v, shuffle(v, v, lane_numbers() ^ half));
  return v[0];
}
SVITT_INLINE float hsum(vf v) {
  for (int half = W / 2; half > 0; half /= 2) v += shuffle(v, v, lane_numbers() ^ half);
  return v[0];
}

// Storage types: fp32, bf16 and fp16 as bit patterns, converted to fp32 while packing.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

/// Calls `visit` with some value of the storage type.
template <class Visit>
SVITT_INLINE void with_type(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::f32: return visit(float{});
    case Dtype::bf16: return visit(bf16{});
    case Dtype::f16: return visit(fp16{});
  }
}

SVITT_INLINE float to_float(float x) { return x; }
SVITT_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// fp16 by bits: not every compiler has the type, and F16C is not in every instruction set. The
// product renormalises subnormals; infinities and NaN keep their all-ones exponent.
SVITT_INLINE float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &rest, 4);
  f *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (rest >= 0x0f800000) bits |= 0x7f800000;
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}
SVITT_INLINE void from_float(float* p, float x) { *p = x; }
SVITT_INLINE void from_float(bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  p->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : rounded) >> 16);
}
SVITT_INLINE void from_float(fp16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits >= 0x47800000) {  // 65536 and above, infinities, NaN
    half = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded digits at the end
    float f;
    std::memcpy(&f, &bits, 4);
    f += 0.5f;
    std::memcpy(&half, &f, 4);
    half -= 0x3f000000;
  } else {
    half = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13;
  }
  p->bits = static_cast<uint16_t>(half | sign);
}

SVITT_INLINE vf load_wide(const float* p) { return load(p); }
SVITT_INLINE vf load_wide(const bf16* p) {
  const vi wide = __builtin_convertvector(load_as<vh>(p), vi) << 16;
  return reinterpret_cast<vf>(wide);
}
SVITT_INLINE vf load_wide(const fp16* p) {
#if SVITT_LANES == 16
  return reinterpret_cast<vf>(_mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(p)));
#elif SVITT_LANES == 8
  return reinterpret_cast<vf>(_mm256_cvtph_ps(load_as<__m128i>(p)));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

/// W values of which the first n exist, the others 0; never reads past them.
template <class T>
SVITT_INLINE vf load_some(const T* p, int n) {
  if (n >= W) return load_wide(p);
  vf v{};
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}

/// exp(x) for x <= 0, good to 2e-7. Where the processor does not reduce ranges by itself, it stays
/// near 1e-38 below -87, which no sum that holds a 1 can tell from 0.
SVITT_INLINE vf exp_nonpositive(vf x) {
#if SVITT_LANES == 16
  constexpr int kFloor = 1;
  const __m512 t = reinterpret_cast<__m512>(x * kLog2e);
  const vf f = reinterpret_cast<vf>(_mm512_maskz_reduce_ps(0xffff, t, kFloor));  // t - floor(t)
  vf p = splat(0.0018775764619931579f) * f + 0.008989340625703335f;
  p = p * f + 0.05582631751894951f;
  p = p * f + 0.24015361070632935f;
  p = p * f + 0.6931530833244324f;
  p = p * f + 0.9999999403953552f;
  return reinterpret_cast<vf>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), t));
#else
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = vmax(splat(-87.0f), x);            // in this order a NaN stays one
  const vf shifted = x * kLog2e + kMagic;
  const vf f = x * kLog2e - (shifted - kMagic);
  vf p = splat(0.001327647129073739f) * f + 0.009675540961325169f;
  p = p * f + 0.05550713092088699f;
  p = p * f + 0.24022120237350464f;
  p = p * f + 0.6931469440460205f;
  p = p * f + 1.0000001192092896f;
  const vi exponent = reinterpret_cast<vi>(shifted) << 23;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + exponent);
#endif
}

/// log(1 + e) for e in [0, 1], good to 2e-7.
SVITT_INLINE vf log1p_unit(vf e) {
  vf p = splat(-0.0031760570127516985f) * e + 0.019542528316378593f;
  p = p * e - 0.05637361481785774f;
  p = p * e + 0.10543623566627502f;
  p = p * e - 0.1526966691017151f;
  p = p * e + 0.1966327428817749f;
  p = p * e - 0.24951615929603577f;
  p = p * e + 0.33329710364341736f;
  p = p * e - 0.49999892711639404f;
  p = p * e + 1.0f;
  return p * e;
}

template <int S>
SVITT_INLINE void swap_halves(vf* rows) {
  if constexpr (S < W) {
    vi low, high;
    for (int lane = 0; lane < W; ++lane) {
      low[lane] = (lane & S) ? W + lane - S : lane;
      high[lane] = (lane & S) ? W + lane : lane + S;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & S) continue;
      const vf a = rows[i], b = rows[i + S];
      rows[i] = shuffle(a, b, low);
      rows[i + S] = shuffle(a, b, high);
    }
    swap_halves<2 * S>(rows);
  }
}
/// Transpose W vectors of W in place, log2(W) butterflies.
SVITT_INLINE void transpose(vf* rows) { swap_halves<1>(rows); }

SVITT_KERNELS_END
