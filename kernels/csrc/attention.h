// One head of attention over rows of keys and values, compiled for every instruction set (attention.cpp).

#pragma once

#include <cstdint>

#include "isa.h"

namespace fastppo {

struct Attention {
    // out_g = softmax(cap(scale q_g . K)) V for `group` queries of `width` elements over n >= 1 keys. Arrays of `void` hold
    // the dtype that the function was chosen by; cap <= 0: none. `scores` is scratch of (group, padded(n)) float32, and
    // `floats` of 2 * group * padded(width).
    void (*attend[2])(
        const void* q, const void* keys, const void* values, int64_t n, int64_t group, int64_t width, float scale,
        float cap, float* scores, float* floats, void* out);
};

constexpr int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

}  // namespace fastppo
