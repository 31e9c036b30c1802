// Vectors of the instruction set that the including file is compiled for (the compiler's vector extensions).
//
// Kernel files are compiled once per instruction set, so everything here lives in a namespace of that set's
// name: the linker must never merge two versions of one inline function. For the same reason these headers
// call no inline function of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "dtype.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef PIXNERD_ISA
#error "PIXNERD_ISA names the instruction set that this file is compiled for"
#endif

#define PIXNERD_INLINE inline __attribute__((always_inline))

namespace pixnerd::PIXNERD_ISA {

#if defined(PIXNERD_ISA_AVX512)
inline constexpr int kVectorBytes = 64;
#elif defined(PIXNERD_ISA_AVX2)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T, int Bytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
  // Loads and stores need not be aligned, and may alias other types.
  typedef T unaligned __attribute__((vector_size(Bytes), aligned(1), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
using VecI = typename VectorOf<std::int32_t>::type;
using VecU = typename VectorOf<std::uint32_t>::type;

// Lanes of a vector of T.
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
PIXNERD_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
PIXNERD_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
template <class T>
PIXNERD_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

#if defined(__clang__)
#define PIXNERD_SHUFFLE(a, b, I, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PIXNERD_SHUFFLE(a, b, I, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

#if defined(PIXNERD_ISA_AVX512_BF16)
// Two numbers in bfloat16, the first in the lower half.
using Pair = std::uint32_t;

// 32 numbers, rounded: pairs of neighbours, those of `low` first.
PIXNERD_INLINE Vec<Pair> pairs_of_neighbours(Vec<float> low, Vec<float> high) {
  return reinterpret_cast<Vec<Pair>>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
}
// The same, each number of `first` with that of `second` in its lane.
PIXNERD_INLINE Vec<Pair> pairs_of_lanes(Vec<float> first, Vec<float> second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return reinterpret_cast<Vec<Pair>>(
      _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(pairs_of_neighbours(first, second))));
}
#endif

// sum + a * b, or for pairs of numbers both products.
template <class T, class O>
PIXNERD_INLINE Vec<T> multiply_add(Vec<T> sum, Vec<O> a, Vec<O> b) {
#if defined(PIXNERD_ISA_AVX512_BF16)
  if constexpr (std::is_same_v<O, Pair>) {
    return reinterpret_cast<Vec<T>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                     reinterpret_cast<__m512bh>(b)));
  } else
#endif
    return sum + a * b;
}

// The sum of all lanes, as a tree.
template <class T>
PIXNERD_INLINE T sum(Vec<T> v) {
  T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// exp(x), relative error below 2 units in the last place. Arguments are clamped to where the result and its
// reciprocal are normal numbers: exp(x) saturates at about 2e-38 and 6e37. NaN stays NaN.
PIXNERD_INLINE Vec<float> exp(Vec<float> x) {
  x = x < -87.0f ? broadcast(-87.0f) : x;
  x = x > 87.0f ? broadcast(87.0f) : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
  const Vec<float> shifted = x * 1.44269504088896341f + 12582912.0f;
  const Vec<float> n = shifted - 12582912.0f;
  Vec<float> r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  // exp(r) on |r| <= ln(2) / 2: 1 + r + r^2 q(r), q fitted for the least maximum relative error, 3.1e-9.
  Vec<float> p = r * 1.38144649e-3f + 8.36878084e-3f;
  p = p * r + 4.16683927e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 4.99999940e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return reinterpret_cast<Vec<float>>(reinterpret_cast<VecU>(p) + (reinterpret_cast<VecU>(shifted) << 23));
}
PIXNERD_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// 1 / x for normal x whose reciprocal is normal. The hardware's estimate (14 or 12 bits) and one Newton step
// cost a third of a division and are within 2 units in the last place.
PIXNERD_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(PIXNERD_ISA_AVX512)
  const Vec<float> r = reinterpret_cast<Vec<float>>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return r * (2.0f - x * r);
#elif defined(PIXNERD_ISA_AVX2)
  const Vec<float> r = reinterpret_cast<Vec<float>>(_mm256_rcp_ps(reinterpret_cast<__m256>(x)));
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}
PIXNERD_INLINE Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

// s = 1 / (1 + exp(-x)) and its complement 1 - s, each accurate relative to itself: callers multiply them by powers
// of x. Where exp saturates they are 0 and 1, or 1 and 0.
template <class T>
PIXNERD_INLINE void sigmoid(Vec<T> x, Vec<T>& s, Vec<T>& complement) {
  constexpr T kLowest = sizeof(T) == 4 ? T(-87) : T(-708);
  const Vec<T> e = exp(-x);
  s = reciprocal(T(1) + e);
  complement = e * s;
  s = x < kLowest ? Vec<T>{} : s;
  complement = x < kLowest ? broadcast(T(1)) : complement;
  complement = x > -kLowest ? Vec<T>{} : complement;
}
// z * sigmoid(x) for x that grows with z. Below -87, where exp saturates, it is zero: z times 2e-38 would grow again.
template <class T>
PIXNERD_INLINE Vec<T> times_sigmoid(Vec<T> z, Vec<T> x) {
  constexpr T kLowest = sizeof(T) == 4 ? T(-87) : T(-708);
  const Vec<T> s = reciprocal(T(1) + exp(-x));
  return z * (x < kLowest ? Vec<T>{} : s);  // by multiplying, which makes NaN of an infinite z
}

template <class T>
PIXNERD_INLINE T square_root(T x) {
  if constexpr (sizeof(T) == 4) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

// Scalar conversions. The half types are stored as their bits.
PIXNERD_INLINE float from_bits(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
PIXNERD_INLINE std::uint32_t to_bits(float value) { return __builtin_bit_cast(std::uint32_t, value); }

PIXNERD_INLINE float bfloat16_to_float(std::uint16_t h) { return from_bits(static_cast<std::uint32_t>(h) << 16); }
PIXNERD_INLINE std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

PIXNERD_INLINE float float16_to_float(std::uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u)
    return from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13) | (rest > 0x7c00u ? 0x400000u : 0u));
  // Scaling by 2^112 moves the exponent's bias from 15 to 127, for subnormal numbers too.
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
#endif
}
PIXNERD_INLINE std::uint16_t float_to_float16(float value) {
#if defined(__F16C__)
  return static_cast<std::uint16_t>(_cvtss_sh(value, 0));
#else
  const std::uint32_t bits = to_bits(value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the value in units of 2^-24, rounded to even, in the low mantissa bits.
    return static_cast<std::uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000u));
  }
  return static_cast<std::uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
#endif
}

// One vector of floats from and to 16-bit elements.
typedef VectorOf<std::uint16_t, kVectorBytes / 2>::unaligned HalfBits;

PIXNERD_INLINE Vec<float> load_bfloat16(const std::uint16_t* p) {
  const auto bits = __builtin_convertvector(*reinterpret_cast<const HalfBits*>(p), VecU);
  return reinterpret_cast<Vec<float>>(bits << 16);
}
PIXNERD_INLINE void store_bfloat16(std::uint16_t* p, Vec<float> v) {
  const VecU bits = reinterpret_cast<VecU>(v);
  VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = (bits & 0x7fffffffu) > 0x7f800000u ? VecU{} + 0x7fc0u : rounded;
  *reinterpret_cast<HalfBits*>(p) = __builtin_convertvector(rounded, VectorOf<std::uint16_t, kVectorBytes / 2>::type);
}
PIXNERD_INLINE Vec<float> load_float16(const std::uint16_t* p) {
#if defined(PIXNERD_ISA_AVX512)
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(PIXNERD_ISA_AVX2)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = float16_to_float(p[i]);
  return v;
#endif
}
PIXNERD_INLINE void store_float16(std::uint16_t* p, Vec<float> v) {
#if defined(PIXNERD_ISA_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(PIXNERD_ISA_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = float_to_float16(v[i]);
#endif
}

// How stored elements (double, float, or the bits of a 16-bit type) become numbers and back.
template <class T>
struct Native {
  using Stored = T;
  PIXNERD_INLINE static Vec<T> load_vector(const T* p) { return load<T>(p); }
  PIXNERD_INLINE static void store_vector(T* p, Vec<T> v) { store<T>(p, v); }
  PIXNERD_INLINE static T get(const T* p) { return *p; }
  PIXNERD_INLINE static void put(T* p, T v) { *p = v; }
};
struct BFloat16 {
  using Stored = std::uint16_t;
  PIXNERD_INLINE static Vec<float> load_vector(const Stored* p) { return load_bfloat16(p); }
  PIXNERD_INLINE static void store_vector(Stored* p, Vec<float> v) { store_bfloat16(p, v); }
  PIXNERD_INLINE static float get(const Stored* p) { return bfloat16_to_float(*p); }
  PIXNERD_INLINE static void put(Stored* p, float v) { *p = float_to_bfloat16(v); }
};
struct Float16 {
  using Stored = std::uint16_t;
  PIXNERD_INLINE static Vec<float> load_vector(const Stored* p) { return load_float16(p); }
  PIXNERD_INLINE static void store_vector(Stored* p, Vec<float> v) { store_float16(p, v); }
  PIXNERD_INLINE static float get(const Stored* p) { return float16_to_float(*p); }
  PIXNERD_INLINE static void put(Stored* p, float v) { *p = float_to_float16(v); }
};

// The first `count` elements of a vector, fewer than all: what lies behind them is neither read nor written. Those of
// a loaded vector are zero.
template <class T, class Storage>
PIXNERD_INLINE Vec<T> load_first(Storage, const typename Storage::Stored* p, int count) {
#if defined(PIXNERD_ISA_AVX512)
  const auto mask = (1u << count) - 1;
  if constexpr (sizeof(*p) == 8) {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
  } else if constexpr (sizeof(*p) == 4) {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  } else {
    alignas(32) typename Storage::Stored whole[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(whole), _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
    return Storage::load_vector(whole);
  }
#else
  Vec<T> v{};
  for (int i = 0; i < count; ++i) v[i] = Storage::get(p + i);
  return v;
#endif
}
template <class T, class Storage>
PIXNERD_INLINE void store_first(Storage, typename Storage::Stored* p, int count, Vec<T> v) {
#if defined(PIXNERD_ISA_AVX512)
  const auto mask = (1u << count) - 1;
  if constexpr (sizeof(*p) == 8) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), reinterpret_cast<__m512d>(v));
  } else if constexpr (sizeof(*p) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), reinterpret_cast<__m512>(v));
  } else {
    alignas(32) typename Storage::Stored whole[16];
    Storage::store_vector(whole, v);
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask),
                             _mm256_load_si256(reinterpret_cast<const __m256i*>(whole)));
  }
#else
  for (int i = 0; i < count; ++i) Storage::put(p + i, v[i]);
#endif
}

// Call function(Storage{}) for the storage that dtype names; T is the type computed in.
template <class T, class Function>
PIXNERD_INLINE void with_storage(DType dtype, Function&& function) {
  if constexpr (sizeof(T) == 8) {
    function(Native<double>{});
  } else {
    switch (dtype) {
      case DType::kBFloat16:
        return function(BFloat16{});
      case DType::kFloat16:
        return function(Float16{});
      default:
        return function(Native<float>{});
    }
  }
}

}  // namespace pixnerd::PIXNERD_ISA
