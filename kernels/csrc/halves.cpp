// A float32 sum kept as two halves of 16 bits: the upper ones are a bfloat16 tensor and become the rounded sum in place
// (see fastppo_kernels.native.halves).

#include <cstdint>
#include <cstring>

#include "threads.h"

extern "C" {

// total += addend
void fastppo_add_to_halves(int64_t n, const float* addend, uint16_t* upper, uint16_t* lower, int num_threads) {
    fastppo::parallel_for(n, 1, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            uint32_t bits = uint32_t{upper[i]} << 16 | lower[i];
            float total;
            std::memcpy(&total, &bits, sizeof total);
            total += addend[i];
            std::memcpy(&bits, &total, sizeof bits);
            upper[i] = static_cast<uint16_t>(bits >> 16);
            lower[i] = static_cast<uint16_t>(bits);
        }
    });
}

// upper = total in bfloat16, the nearest one, of two the even one; NaN stays NaN.
void fastppo_round_halves(int64_t n, uint16_t* upper, const uint16_t* lower, int num_threads) {
    fastppo::parallel_for(n, 1, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const uint32_t bits = uint32_t{upper[i]} << 16 | lower[i];
            const uint32_t rounded = (bits + 0x7fff + (upper[i] & 1)) >> 16;
            upper[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
        }
    });
}

}  // extern "C"
