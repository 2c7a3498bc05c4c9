// One vector of float32, `F`, and what the row kernels do with it, for the instruction set the file is compiled for.
// Only operations that differ between instruction sets live here; everything built from them is in row_kernels.cpp.
// All of it has internal linkage: a function shared with other translation units could be the copy of the wrong one.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FASTPPO_INLINE static inline __attribute__((always_inline))

namespace {

struct BFloat16 {
    uint16_t bits;
};

// Of bfloat16 memory a vector holds two elements in each 32-bit lane: `low_halves` and `high_halves` make floats of them
// without moving anything between lanes, and `join` puts two vectors of floats back, rounded to nearest even.
//
// max and min return their second argument where either is NaN. exponent_bits(r) shifts the bits of r left by 23.

#if defined(__AVX512F__)

using F = __m512;
constexpr int kLanes = 16;

FASTPPO_INLINE F set(float x) { return _mm512_set1_ps(x); }
FASTPPO_INLINE F load(const void* p) { return _mm512_loadu_ps(p); }
FASTPPO_INLINE void store(void* p, F x) { _mm512_storeu_ps(p, x); }
FASTPPO_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
FASTPPO_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
FASTPPO_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
FASTPPO_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
FASTPPO_INLINE F mul_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FASTPPO_INLINE F mul_sub(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
FASTPPO_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
FASTPPO_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
FASTPPO_INLINE F exponent_bits(F r) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(r), 23)); }
FASTPPO_INLINE F low_halves(F x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
FASTPPO_INLINE F high_halves(F x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-0x10000)));
}
FASTPPO_INLINE __m512i rounded_bits(F x) {  // bfloat16 in the upper half of each lane, rubbish in the lower one
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_mask_set1_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), 0x7fc00000);
}
#if defined(__AVX512BF16__)
FASTPPO_INLINE F join(F low, F high) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // all of low, then all of high
    const __m512i order = _mm512_or_si512(  // 0, 16, 1, 17, ...
        _mm512_cvtepu16_epi32(_mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)),
        _mm512_slli_epi32(
            _mm512_cvtepu16_epi32(
                _mm256_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16)), 16));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves));
}
FASTPPO_INLINE void store_rounded(BFloat16* p, F x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    std::memcpy(p, &rounded, sizeof rounded);
}
#else
FASTPPO_INLINE F join(F low, F high) {
    const __m512i low_bits = _mm512_srli_epi32(rounded_bits(low), 16);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, low_bits, rounded_bits(high)));
}
FASTPPO_INLINE void store_rounded(BFloat16* p, F x) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(x), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
#endif

#elif defined(__AVX2__)

using F = __m256;
constexpr int kLanes = 8;

FASTPPO_INLINE F set(float x) { return _mm256_set1_ps(x); }
FASTPPO_INLINE F load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
FASTPPO_INLINE void store(void* p, F x) { _mm256_storeu_ps(static_cast<float*>(p), x); }
FASTPPO_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
FASTPPO_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
FASTPPO_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
FASTPPO_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
FASTPPO_INLINE F mul_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
FASTPPO_INLINE F mul_sub(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
FASTPPO_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
FASTPPO_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
FASTPPO_INLINE F exponent_bits(F r) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(r), 23)); }
FASTPPO_INLINE F low_halves(F x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
FASTPPO_INLINE F high_halves(F x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(-0x10000))); }
FASTPPO_INLINE __m256i rounded_bits(F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan);
}
FASTPPO_INLINE F join(F low, F high) {
    const __m256i low_bits = _mm256_srli_epi32(rounded_bits(low), 16);
    return _mm256_castsi256_ps(_mm256_blend_epi16(low_bits, rounded_bits(high), 0xaa));
}
FASTPPO_INLINE void store_rounded(BFloat16* p, F x) {
    const __m256i bits = _mm256_srli_epi32(rounded_bits(x), 16);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(halves));
}

#else  // vectors of GCC and clang: NEON on arm64, SSE2 on x86-64

typedef float F __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef uint16_t HalfBits __attribute__((vector_size(8)));
constexpr int kLanes = 4;

FASTPPO_INLINE F set(float x) { return F{x, x, x, x}; }
FASTPPO_INLINE F load(const void* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
FASTPPO_INLINE void store(void* p, F x) { std::memcpy(p, &x, sizeof x); }
FASTPPO_INLINE F add(F a, F b) { return a + b; }
FASTPPO_INLINE F sub(F a, F b) { return a - b; }
FASTPPO_INLINE F mul(F a, F b) { return a * b; }
FASTPPO_INLINE F div(F a, F b) { return a / b; }
#if defined(__aarch64__)
FASTPPO_INLINE F mul_add(F a, F b, F c) { return vfmaq_f32(c, a, b); }
#else
FASTPPO_INLINE F mul_add(F a, F b, F c) { return a * b + c; }
#endif
FASTPPO_INLINE F mul_sub(F a, F b, F c) { return mul_add(a, b, -c); }
FASTPPO_INLINE F max(F a, F b) { return a > b ? a : b; }
FASTPPO_INLINE F min(F a, F b) { return a < b ? a : b; }
FASTPPO_INLINE F exponent_bits(F r) { return (F)((Bits)r << 23); }
FASTPPO_INLINE F low_halves(F x) { return (F)((Bits)x << 16); }
FASTPPO_INLINE F high_halves(F x) { return (F)((Bits)x & 0xffff0000u); }
FASTPPO_INLINE Bits rounded_bits(F x) {
    const Bits bits = (Bits)x, nan = (Bits)(x != x);
    return (nan & 0x7fc00000u) | (~nan & (bits + 0x7fff + ((bits >> 16) & 1)));
}
FASTPPO_INLINE F join(F low, F high) { return (F)((rounded_bits(low) >> 16) | (rounded_bits(high) & 0xffff0000u)); }
FASTPPO_INLINE void store_rounded(BFloat16* p, F x) {
    const HalfBits halves = __builtin_convertvector(rounded_bits(x) >> 16, HalfBits);
    std::memcpy(p, &halves, sizeof halves);
}

#endif

// Two vectors of consecutive elements: of float32 one after the other, of bfloat16 the even ones and the odd ones.
struct Pair {
    F a, b;
};

FASTPPO_INLINE Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
FASTPPO_INLINE Pair load_pair(const BFloat16* p) {
    const F both = load(p);
    return {low_halves(both), high_halves(both)};
}

// Stores a pair in the order of the type it was loaded from, which the first argument names.
FASTPPO_INLINE void store_pair(float, float* p, Pair x) { store(p, x.a), store(p + kLanes, x.b); }
FASTPPO_INLINE void store_pair(float, BFloat16* p, Pair x) { store_rounded(p, x.a), store_rounded(p + kLanes, x.b); }
FASTPPO_INLINE void store_pair(BFloat16, BFloat16* p, Pair x) { store(p, join(x.a, x.b)); }
FASTPPO_INLINE void store_pair(BFloat16, float* p, Pair x) {
    float a[kLanes], b[kLanes];
    store(a, x.a), store(b, x.b);
    for (int i = 0; i < kLanes; ++i) p[2 * i] = a[i], p[2 * i + 1] = b[i];
}

// The ends of rows, less than a vector long.

FASTPPO_INLINE F load_first(const float* p, int count, float fill) {  // `fill` in the lanes from count on
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? p[i] : fill;
    return load(lanes);
}
FASTPPO_INLINE F load_first(const BFloat16* p, int count, float fill) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t bits = i < count ? uint32_t{p[i].bits} << 16 : 0;
        std::memcpy(lanes + i, &bits, sizeof bits);
        if (i >= count) lanes[i] = fill;
    }
    return load(lanes);
}
FASTPPO_INLINE void store_first(float* p, int count, F x) {
    float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < count; ++i) p[i] = lanes[i];
}
FASTPPO_INLINE void store_first(BFloat16* p, int count, F x) {
    BFloat16 lanes[kLanes];
    store_rounded(lanes, x);
    for (int i = 0; i < count; ++i) p[i] = lanes[i];
}
FASTPPO_INLINE F keep_first(F x, int count) {  // 0 in the lanes from count on
    float lanes[kLanes] = {};
    store_first(lanes, count, x);
    return load(lanes);
}

FASTPPO_INLINE float largest(F x) {
    float lanes[kLanes];
    store(lanes, x);
    float m = lanes[0];
    for (int i = 1; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
    return m;
}
FASTPPO_INLINE double total(F x) {
    float lanes[kLanes];
    store(lanes, x);
    double s = 0.0;
    for (int i = 0; i < kLanes; ++i) s += lanes[i];
    return s;
}

}  // namespace
