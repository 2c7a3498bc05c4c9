// The critic's loss, per row, from values or from hidden states and a value head. Letters: R rows, H hidden.

#include <algorithm>
#include <cstring>

#include "loops.h"
#include "threads.h"

namespace fastppo {
namespace {

constexpr int64_t kColumns = 8;      // table.VALUE_COLUMNS
constexpr int64_t kRowElements = 32;  // elements of hidden that take as long as a line of the table
constexpr int64_t kChunkRows = 128;  // rows whose weight gradients a thread adds up; chunks add up in their order

struct ValueRow {
    double old_value, target, weight, clip;  // clip < 0: none
};

// One line of the table, in double until it is stored; returns d loss / d value as the table holds it.
//
//   loss = weight * 0.5 * max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)
float value_row(double value, const ValueRow& row, float* line) {
    const double error = value - row.target;
    double worst = error * error, slope = error;
    bool clipped = false;
    if (row.clip >= 0.0) {
        const double moved = value - row.old_value;
        const double bounded = moved < -row.clip ? -row.clip : moved > row.clip ? row.clip : moved;
        const double other = row.old_value + bounded - row.target;
        clipped = other * other > worst;
        if (clipped) worst = other * other, slope = moved == bounded ? other : 0.0;
    }
    const double columns[kColumns] = {
        0.5 * row.weight * worst, value, error * error, clipped ? 1.0 : 0.0, row.target, row.weight * slope, 1.0, 0.0};
    for (int64_t i = 0; i < kColumns; ++i) line[i] = static_cast<float>(columns[i]);
    return line[5];
}

struct Linear {
    const Loops& loops;
    Dtype dtype;  // of hidden and dhidden
    int64_t num_rows, width;
    const char* hidden;
    char* dhidden;  // null: no gradient
    int64_t hidden_stride, dhidden_stride;
    const float *weight, *old_values, *returns, *weights;
    double bias, clip;
    double* partials;
    float* table;

    // Rows of chunk c, whose weight gradients go to line c of partials.
    void chunk(int64_t c) const {
        double* partial = dhidden ? partials + c * width : nullptr;
        if (partial) std::fill(partial, partial + width, 0.0);
        for (int64_t r = c * kChunkRows; r < std::min((c + 1) * kChunkRows, num_rows); ++r) row(r, partial);
    }

    void row(int64_t r, double* partial) const {
        const int64_t size = dtype == kFloat32 ? 4 : 2;
        float* line = table + r * kColumns;
        char* out = dhidden ? dhidden + r * dhidden_stride * size : nullptr;
        if (weights[r] == 0.0f) {
            std::fill(line, line + kColumns, 0.0f);
            if (out) std::memset(out, 0, width * size);
            return;
        }
        const char* given = hidden + r * hidden_stride * size;
        const double value = bias + loops.dot[dtype](given, weight, width);
        const float slope = value_row(value, {old_values[r], returns[r], weights[r], clip}, line);
        if (out) loops.spread[dtype](slope, given, weight, width, out, partial);
    }
};

}  // namespace
}  // namespace fastppo

extern "C" {

// The table of R values; a row of weight 0 is a line of zeros whatever its inputs hold.
void fastppo_value_rows(
    int64_t num_rows,
    const float* values,      // (R,)
    const float* old_values,  // (R,)
    const float* returns,     // (R,)
    const float* weights,     // (R,)
    double clip,              // < 0: none
    float* table,             // (R, 8)
    int num_threads
) {
    using namespace fastppo;
    parallel_for(num_rows, kRowElements, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            float* line = table + r * kColumns;
            if (weights[r] == 0.0f)
                std::fill(line, line + kColumns, 0.0f);
            else
                value_row(values[r], {old_values[r], returns[r], weights[r], clip}, line);
        }
    });
}

// The table of the values hidden @ weight + bias and, unless dhidden is null, the gradients of the sum of its losses.
// Rows of hidden are read once. Same numbers for every num_threads.
void fastppo_linear_value_rows(
    int64_t num_rows,
    int64_t width,            // H
    int dtype,                // of hidden and dhidden
    const void* hidden,       // (R, H), rows hidden_stride elements apart
    int64_t hidden_stride,
    const float* weight,      // (H,)
    double bias,
    const float* old_values,  // (R,)
    const float* returns,     // (R,)
    const float* weights,     // (R,); hidden is not read where it is 0
    double clip,              // < 0: none
    void* dhidden,            // (R, H), rows dhidden_stride elements apart; null: no gradient. May be hidden itself
    int64_t dhidden_stride,
    double* partials,         // (ceil(R / 128), H) scratch, used with dhidden
    float* dweight,           // (H,), null if dhidden is (a dhidden without rows is null too)
    float* table,             // (R, 8)
    int isa,
    int num_threads
) {
    using namespace fastppo;
    const Loops& loops = *instruction_set(isa).loops;
    const Linear x{loops, static_cast<Dtype>(dtype), num_rows, width, static_cast<const char*>(hidden),
                   static_cast<char*>(dhidden), hidden_stride, dhidden_stride, weight, old_values, returns, weights,
                   bias, clip, partials, table};
    const int64_t num_chunks = (num_rows + kChunkRows - 1) / kChunkRows;
    parallel_for(num_chunks, kChunkRows * width, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) x.chunk(c);
    });
    if (!dweight) return;
    const int64_t num_groups = (width + kGroup - 1) / kGroup;
    parallel_for(num_groups, num_chunks * kGroup, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t j = begin * kGroup; j < std::min(end * kGroup, width); j += kGroup)
            loops.column_sums(partials + j, num_chunks, width, std::min(kGroup, width - j), dweight + j);
    });
}

}  // extern "C"
