// The inner loops of the ops that are not rows of a softmax's gradient, compiled for every instruction set (loops.cpp).

#pragma once

#include <cstdint>

#include "isa.h"

namespace fastppo {

constexpr int64_t kGroup = 64;  // sums run in so many lanes and fold in one order, whatever the width of a register
constexpr int64_t kBlock = 256;        // columns of a row of logits
constexpr int64_t kGaeBlock = 64;      // actions
constexpr int64_t kLooseEnd = 16;      // elements that are touched, not used, behind packed ones
constexpr int64_t kMomentsBlock = 1024;

struct Mass {
    double sum;
    int64_t count;
};

struct Step {  // what the recurrence of GAE carries back in time from the next action
    double value, advantage;
};

struct Moments {
    double count, mean, square;  // square: sum of the squared deviations from the mean
};

// Arrays of `void` hold the dtype that the function was chosen by.
struct Loops {
    // Of sampling. z and weights are float32 logits and what they weigh; scale is log2(e) / temperature.

    // n elements as float32.
    void (*widen[2])(const void* z, int64_t n, float* out);
    // Maximum of n columns (a multiple of kGroup; NaN counts as nothing) and the sum of 2^((z - maximum) * scale).
    float (*sweep)(const float* z, int64_t n, float scale, float* maximum);
    // 2^((z - origin) * scale)
    void (*exponentials)(const float* z, int64_t n, float origin, float scale, float* out);
    // Sum of the weights, and number, of the columns with z > cut. Lanes of float32 for a block, then double.
    Mass (*mass_above)(const float* z, const float* weights, int64_t n, float cut);
    // Indices of the columns with below < z <= above, rising; returns how many. `indices` holds n.
    int64_t (*indices_between)(const float* z, int64_t n, float below, float above, int32_t* indices);
    // Weight 0 and z -inf where z < cut, and behind column `tie` where z = cut.
    void (*drop)(float* z, float* weights, int64_t n, float cut, int64_t tie);

    // Of the critic's loss.

    float (*dot[2])(const void* x, const float* w, int64_t n);
    // dweight += slope * hidden and dhidden = slope * weight. hidden and dhidden may be the same memory.
    void (*spread[2])(float slope, const void* hidden, const float* weight, int64_t n, void* dhidden, double* dweight);
    // Sums of n <= kGroup columns of partials, whose rows lie `width` apart, from the first row to the last.
    void (*column_sums)(const double* partials, int64_t num_rows, int64_t width, int64_t n, float* out);

    // Of tables of 8 or 16 columns: sum, sum of squares and maximum (NaN if there is one) of n rows, a column each.
    void (*line_sums[2])(const float* table, int64_t n, double* sums);

    // Of sequences.

    // The x whose mask is set, next to each other; returns how many. `out` holds n + kLooseEnd.
    int64_t (*pack)(const float* x, const uint8_t* mask, int64_t n, float* out);
    // The reverse, 0 where the mask is not set. `x` can be read kLooseEnd past what was packed.
    void (*unpack)(const float* x, const uint8_t* mask, int64_t n, float* out);
    // n <= kGaeBlock actions in a row, all at once.
    void (*gae)(const float* rewards, const float* values, int64_t n, double gamma, double c, Step* next,
                float* advantages, float* returns);
    // Of n <= kMomentsBlock values; equal numbers have a square of exactly 0.
    Moments (*moments)(const float* values, const uint8_t* mask, int64_t n);
};

}  // namespace fastppo
