// Vectors of W floats for the instruction set in force, by the compilers' vector extensions.
// Included inside namespace svitt::SVITT_ISA.

#if defined(SVITT_LANES_16)
constexpr int W = 16;
#elif defined(SVITT_LANES_8)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

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

SVITT_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

SVITT_INLINE float hmax(vf v) {
  float m = v[0];
  for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
SVITT_INLINE float hsum(vf v) {
  // Pairwise, so that the order does not depend on how the compiler reduces.
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// Storage types: fp32, bf16 and fp16 as bit patterns, converted to fp32 while packing.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

SVITT_INLINE float to_float(float x) { return x; }
SVITT_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
SVITT_INLINE float to_float(fp16 x) {
  _Float16 h;
  std::memcpy(&h, &x, 2);
  return static_cast<float>(h);
}
SVITT_INLINE void from_float(float* p, float x) { *p = x; }
SVITT_INLINE void from_float(bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  p->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : rounded) >> 16);
}
SVITT_INLINE void from_float(fp16* p, float x) {
  const _Float16 h = static_cast<_Float16>(x);
  std::memcpy(p, &h, 2);
}

SVITT_INLINE vf load_wide(const float* p) { return load(p); }
SVITT_INLINE vf load_wide(const bf16* p) {
  const vi wide = __builtin_convertvector(load_as<vh>(p), vi) << 16;
  return reinterpret_cast<vf>(wide);
}
SVITT_INLINE vf load_wide(const fp16* p) {
#if defined(SVITT_LANES_16)
  return reinterpret_cast<vf>(_mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(p)));
#elif defined(SVITT_LANES_8)
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

/// 2^x to about 1 ulp for x <= 0; anything below 2^-126 becomes 2^-126, which no fp32 sum that holds a 1
/// can tell from 0.
SVITT_INLINE vf exp2_nonpositive(vf x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -126.0f ? splat(-126.0f) : x;
  const vf shifted = x + kMagic;
  const vf f = x - (shifted - kMagic);
  vf p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const vi exponent = reinterpret_cast<vi>(shifted) << 23;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + exponent);
}

template <int S>
SVITT_INLINE void swap_halves(vf* rows) {
  if constexpr (S < W) {
    vi low, high;
    for (int lane = 0; lane < W; ++lane) {
      low[lane] = (lane & S) ? W + lane - S : lane;
      high[lane] = (lane & S) ? W + lane : lane + S;
    }
    for (int i = 0; i < W; ++i) {
      if (i & S) continue;
      const vf a = rows[i], b = rows[i + S];
#if defined(__clang__)
      for (int lane = 0; lane < W; ++lane) {
        rows[i][lane] = (lane & S) ? b[lane - S] : a[lane];
        rows[i + S][lane] = (lane & S) ? b[lane] : a[lane + S];
      }
#else
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + S] = __builtin_shuffle(a, b, high);
#endif
    }
    swap_halves<2 * S>(rows);
  }
}
/// Transpose W vectors of W in place, log2(W) butterflies.
SVITT_INLINE void transpose(vf* rows) { swap_halves<1>(rows); }
