// One vector of float32, `F`, and what the row kernels do with it, for the instruction set the file is compiled for.
// Only operations that differ between instruction sets live here; everything built from them is in row_kernels.cpp.
// All of it has internal linkage: a function shared with other translation units could be the copy of the wrong one.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define FASTPPO_INLINE static inline __attribute__((always_inline))

namespace {

struct BFloat16 {
    uint16_t bits;
};

// exp2_of needs round-to-integer and 2^n of the same float; adding kMagic does both. r = t + kMagic has an ulp of 1, so
// it holds t rounded to nearest even, and its low mantissa bits are n + 127: shifted left by 23 they are the float 2^n.
constexpr float kMagic = 12582912.0f + 127.0f;  // 1.5 * 2^23 + the exponent bias
constexpr float kSmallest = kMagic - 125.0f;    // below n = -125 a product with 2^n could be subnormal: flushed to 0

#if defined(__AVX512F__)

using F = __m512;
constexpr int kLanes = 16;

FASTPPO_INLINE F set(float x) { return _mm512_set1_ps(x); }
FASTPPO_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
FASTPPO_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
FASTPPO_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
FASTPPO_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
FASTPPO_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
FASTPPO_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
FASTPPO_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FASTPPO_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
FASTPPO_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }  // b where either is NaN
FASTPPO_INLINE F power(F r) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(r), 23)); }
FASTPPO_INLINE F mul_unless_below(F r, F limit, F a, F b) {  // a * b, 0 where r < limit; NaN is not below
    return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(r, limit, _CMP_NLT_UQ), a, b);
}
FASTPPO_INLINE F load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FASTPPO_INLINE void store(BFloat16* p, F x) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    std::memcpy(p, &rounded, sizeof rounded);
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_set1_epi32(_mm512_srli_epi32(up, 16), nan, 0x7fc0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#endif
}

#elif defined(__AVX2__)

using F = __m256;
constexpr int kLanes = 8;

FASTPPO_INLINE F set(float x) { return _mm256_set1_ps(x); }
FASTPPO_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
FASTPPO_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
FASTPPO_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
FASTPPO_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
FASTPPO_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
FASTPPO_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
FASTPPO_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
FASTPPO_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
FASTPPO_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
FASTPPO_INLINE F power(F r) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(r), 23)); }
FASTPPO_INLINE F mul_unless_below(F r, F limit, F a, F b) {
    return _mm256_and_ps(_mm256_cmp_ps(r, limit, _CMP_NLT_UQ), _mm256_mul_ps(a, b));
}
FASTPPO_INLINE F load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FASTPPO_INLINE void store(BFloat16* p, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#else  // vectors of GCC and clang: NEON on arm64, SSE2 on x86-64

typedef float F __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));
typedef uint16_t HalfBits __attribute__((vector_size(8)));
constexpr int kLanes = 4;

FASTPPO_INLINE F select(Bits mask, F a, F b) { return (F)((mask & (Bits)a) | (~mask & (Bits)b)); }
FASTPPO_INLINE F set(float x) { return F{x, x, x, x}; }
FASTPPO_INLINE F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
FASTPPO_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
FASTPPO_INLINE F add(F a, F b) { return a + b; }
FASTPPO_INLINE F sub(F a, F b) { return a - b; }
FASTPPO_INLINE F mul(F a, F b) { return a * b; }
FASTPPO_INLINE F div(F a, F b) { return a / b; }
FASTPPO_INLINE F fma(F a, F b, F c) { return a * b + c; }  // one instruction where the target has it
FASTPPO_INLINE F max(F a, F b) { return select(a > b, a, b); }
FASTPPO_INLINE F min(F a, F b) { return select(a < b, a, b); }
FASTPPO_INLINE F power(F r) { return (F)((Bits)r << 23); }
FASTPPO_INLINE F mul_unless_below(F r, F limit, F a, F b) { return (F)(~(r < limit) & (Bits)(a * b)); }
FASTPPO_INLINE F load(const BFloat16* p) {
    HalfBits bits;
    std::memcpy(&bits, p, sizeof bits);
    return (F)(__builtin_convertvector(bits, Bits) << 16);
}
FASTPPO_INLINE void store(BFloat16* p, F x) {
    const Bits bits = (Bits)x, nan = (x != x);
    const Bits rounded = (Bits)(bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const HalfBits half = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), HalfBits);
    std::memcpy(p, &half, sizeof half);
}

#endif

template <class Element>
FASTPPO_INLINE F load_first(const Element* p, int count, float fill) {  // `fill` in the lanes from count on
    float lanes[kLanes];
    Element elements[kLanes] = {};
    std::memcpy(elements, p, count * sizeof(Element));
    store(lanes, load(elements));
    for (int i = count; i < kLanes; ++i) lanes[i] = fill;
    return load(lanes);
}

template <class Element>
FASTPPO_INLINE void store_first(Element* p, int count, F x) {
    Element elements[kLanes];
    store(elements, x);
    std::memcpy(p, elements, count * sizeof(Element));
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
