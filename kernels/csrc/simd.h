// One vector of float32, `F`, and what the kernels do with it, for the instruction set the file is compiled for.
// Everything built from it is in exp2.h, row_kernels.cpp and loops.cpp.
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

FASTPPO_INLINE float to_float(float x) { return x; }
FASTPPO_INLINE float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

FASTPPO_INLINE int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }

// max and min return their second argument where either is NaN.

#if defined(__AVX512F__)

using F = __m512;
FASTPPO_INLINE F load(const void* p) { return _mm512_loadu_ps(p); }
FASTPPO_INLINE void store(void* p, F x) { _mm512_storeu_ps(p, x); }
FASTPPO_INLINE F mul_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FASTPPO_INLINE F mul_sub(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
FASTPPO_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
FASTPPO_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }

#elif defined(__AVX2__)

using F = __m256;
FASTPPO_INLINE F load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
FASTPPO_INLINE void store(void* p, F x) { _mm256_storeu_ps(static_cast<float*>(p), x); }
FASTPPO_INLINE F mul_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
FASTPPO_INLINE F mul_sub(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
FASTPPO_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
FASTPPO_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }

#else  // vectors of GCC and clang: NEON on arm64, SSE2 on x86-64

typedef float F __attribute__((vector_size(16)));
FASTPPO_INLINE F load(const void* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
FASTPPO_INLINE void store(void* p, F x) { std::memcpy(p, &x, sizeof x); }
#if defined(__aarch64__)
FASTPPO_INLINE F mul_add(F a, F b, F c) { return vfmaq_f32(c, a, b); }
#else
FASTPPO_INLINE F mul_add(F a, F b, F c) { return a * b + c; }
#endif
FASTPPO_INLINE F mul_sub(F a, F b, F c) { return mul_add(a, b, -c); }
FASTPPO_INLINE F max(F a, F b) { return a > b ? a : b; }
FASTPPO_INLINE F min(F a, F b) { return a < b ? a : b; }

#endif

// What vectors of GCC and clang of any width can do. exponent_bits(r) shifts the bits of r left by 23.

constexpr int kLanes = sizeof(F) / sizeof(float);
typedef uint32_t Bits __attribute__((vector_size(sizeof(F))));

FASTPPO_INLINE F set(float x) { return x - F{}; }  // x + 0 would lose the sign of -0
FASTPPO_INLINE F add(F a, F b) { return a + b; }
FASTPPO_INLINE F sub(F a, F b) { return a - b; }
FASTPPO_INLINE F mul(F a, F b) { return a * b; }
FASTPPO_INLINE F div(F a, F b) { return a / b; }
FASTPPO_INLINE F exponent_bits(F r) { return (F)((Bits)r << 23); }

// Of bfloat16 memory a vector holds two elements in each 32-bit lane: `low_halves` and `high_halves` make floats of them
// without moving anything between lanes, and `join` puts two vectors of floats back, rounded to nearest even.

FASTPPO_INLINE F low_halves(F x) { return (F)((Bits)x << 16); }
FASTPPO_INLINE F high_halves(F x) { return (F)((Bits)x & 0xffff0000u); }

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

typedef uint16_t HalfBits __attribute__((vector_size(sizeof(F) / 2)));

FASTPPO_INLINE Bits rounded_bits(F x) {  // bfloat16 in the upper half of each lane, rubbish in the lower one
    const Bits bits = (Bits)x, up = bits + 0x7fff + ((bits >> 16) & 1);
    return x == x ? up : Bits{} + 0x7fc00000u;
}
FASTPPO_INLINE F join(F low, F high) { return (F)((rounded_bits(low) >> 16) | (rounded_bits(high) & 0xffff0000u)); }
FASTPPO_INLINE void store_rounded(BFloat16* p, F x) {
    const HalfBits halves = __builtin_convertvector(rounded_bits(x) >> 16, HalfBits);
    std::memcpy(p, &halves, sizeof halves);
}

#endif

FASTPPO_INLINE void store_rounded(float* p, F x) { store(p, x); }

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
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(x);
#else
    float lanes[kLanes];
    store(lanes, x);
    float m = lanes[0];
    for (int i = 1; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
    return m;
#endif
}
FASTPPO_INLINE float sum(F x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#else
    float lanes[kLanes], s = 0.0f;
    store(lanes, x);
    for (int i = 0; i < kLanes; ++i) s += lanes[i];
    return s;
#endif
}

FASTPPO_INLINE double total(F x) {
    float lanes[kLanes];
    store(lanes, x);
    double s = 0.0;
    for (int i = 0; i < kLanes; ++i) s += lanes[i];
    return s;
}

}  // namespace
