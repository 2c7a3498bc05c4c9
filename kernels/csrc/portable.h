// What the kernels written as plain loops share: compilation for several instruction sets, bfloat16, sums over lanes.

#pragma once

#include <cstdint>
#include <cstring>

// A function marked so is compiled three times and the loader picks by the CPU's features (AVX-512, AVX2 with FMA,
// SSE2). What it calls must be FASTPPO_INLINE to be compiled along with it. Elsewhere there is one version.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTPPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTPPO_CLONES
#endif
#define FASTPPO_INLINE inline __attribute__((always_inline))

namespace fastppo {

constexpr int64_t kLanes = 64;  // sums run in so many lanes and fold in one order, whatever the width of a register

FASTPPO_INLINE float float_of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

FASTPPO_INLINE uint32_t bits_of_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

using bfloat16 = uint16_t;  // the upper half of a float32

FASTPPO_INLINE float to_float(float x) { return x; }
FASTPPO_INLINE float to_float(bfloat16 x) { return float_of_bits(uint32_t{x} << 16); }

FASTPPO_INLINE void assign(float& out, float x) { out = x; }
FASTPPO_INLINE void assign(bfloat16& out, float x) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t bits = bits_of_float(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out = static_cast<bfloat16>(x == x ? rounded : 0x7fc0);
}

// lanes[0] op lanes[1] op ..., pairwise; overwrites the lanes. Widths are constants, so that every level is a vector.
template <int64_t kWidth = kLanes, typename T, typename Op>
FASTPPO_INLINE T fold(T* lanes, Op op) {
    if constexpr (kWidth > 1) {
        for (int64_t i = 0; i < kWidth / 2; ++i) lanes[i] = op(lanes[i], lanes[i + kWidth / 2]);
        return fold<kWidth / 2>(lanes, op);
    }
    return lanes[0];
}

struct Add {
    template <typename T>
    FASTPPO_INLINE T operator()(T a, T b) const {
        return a + b;
    }
};

struct Larger {  // NaN on the left is kept, on the right it is lost
    FASTPPO_INLINE float operator()(float a, float b) const { return b > a ? b : a; }
};

}  // namespace fastppo
