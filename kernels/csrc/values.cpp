// The critic's loss, per row, from values or from hidden states and a value head. Letters: R rows, H hidden.

#include <algorithm>
#include <cstdint>

#include "portable.h"

namespace fastppo {
namespace {

constexpr int64_t kColumns = 8;     // table.VALUE_COLUMNS
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

template <typename T>
FASTPPO_INLINE float dot(const T* x, const float* w, int64_t n) {
    float lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] += to_float(x[j + i]) * w[j + i];
    for (int64_t i = 0; j + i < n; ++i) lanes[i] += to_float(x[j + i]) * w[j + i];
    return fold(lanes, Add());
}

FASTPPO_CLONES float dot_of(const float* x, const float* w, int64_t n) { return dot(x, w, n); }
FASTPPO_CLONES float dot_of(const bfloat16* x, const float* w, int64_t n) { return dot(x, w, n); }

// dweight += slope * hidden and dhidden = slope * weight. hidden and dhidden may be the same memory.
template <typename T>
FASTPPO_INLINE void spread(float slope, const T* hidden, const float* weight, int64_t n, T* dhidden, double* dweight) {
    for (int64_t j = 0; j < n; ++j) dweight[j] += double{slope} * to_float(hidden[j]);
    for (int64_t j = 0; j < n; ++j) assign(dhidden[j], slope * weight[j]);
}

FASTPPO_CLONES void spread_of(float s, const float* h, const float* w, int64_t n, float* dh, double* dw) {
    spread(s, h, w, n, dh, dw);
}
FASTPPO_CLONES void spread_of(float s, const bfloat16* h, const float* w, int64_t n, bfloat16* dh, double* dw) {
    spread(s, h, w, n, dh, dw);
}

struct Linear {
    int64_t num_rows, width;
    const float *weight, *old_values, *returns, *weights;
    double bias, clip;
    int64_t hidden_stride, dhidden_stride;
    double* partials;
    float* table;
};

// Rows first .. last - 1, whose weight gradients go to one line of partials.
template <typename T>
void chunk_of_rows(const Linear& x, const T* hidden, T* dhidden, int64_t first, int64_t last) {
    double* partial = dhidden ? x.partials + first / kChunkRows * x.width : nullptr;
    if (partial) std::fill(partial, partial + x.width, 0.0);
    for (int64_t r = first; r < last; ++r) {
        float* line = x.table + r * kColumns;
        T* out = dhidden ? dhidden + r * x.dhidden_stride : nullptr;
        if (x.weights[r] == 0.0f) {
            std::fill(line, line + kColumns, 0.0f);
            if (out) std::fill(out, out + x.width, T{0});
            continue;
        }
        const T* row = hidden + r * x.hidden_stride;
        const double value = x.bias + dot_of(row, x.weight, x.width);
        const float slope = value_row(value, {x.old_values[r], x.returns[r], x.weights[r], x.clip}, line);
        if (out) spread_of(slope, row, x.weight, x.width, out, partial);
    }
}

template <typename T>
void linear_value_rows(const Linear& x, const void* hidden, void* dhidden, int num_threads) {
    const int64_t num_chunks = (x.num_rows + kChunkRows - 1) / kChunkRows;
#ifdef _OPENMP
#pragma omp parallel for num_threads(num_threads) schedule(static)
#else
    (void)num_threads;
#endif
    for (int64_t c = 0; c < num_chunks; ++c) {
        const int64_t first = c * kChunkRows, last = std::min(first + kChunkRows, x.num_rows);
        chunk_of_rows(x, static_cast<const T*>(hidden), static_cast<T*>(dhidden), first, last);
    }
}

// Column sums of the partials, in the order of the chunks.
FASTPPO_CLONES void sum_of_partials(const double* partials, int64_t num_chunks, int64_t width, float* dweight) {
    for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t n = std::min(kLanes, width - j);
        double sums[kLanes] = {};
        for (int64_t c = 0; c < num_chunks; ++c)
            for (int64_t i = 0; i < n; ++i) sums[i] += partials[c * width + j + i];
        for (int64_t i = 0; i < n; ++i) dweight[j + i] = static_cast<float>(sums[i]);
    }
}

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
    float* table              // (R, 8)
) {
    using namespace fastppo;
    for (int64_t r = 0; r < num_rows; ++r) {
        float* line = table + r * kColumns;
        if (weights[r] == 0.0f)
            std::fill(line, line + kColumns, 0.0f);
        else
            value_row(values[r], {old_values[r], returns[r], weights[r], clip}, line);
    }
}

// The table of the values hidden @ weight + bias and, unless dhidden is null, the gradients of the sum of its losses.
// Rows of hidden are read once. Same numbers for every num_threads.
void fastppo_linear_value_rows(
    int64_t num_rows,
    int64_t width,            // H
    int is_bfloat16,          // hidden and dhidden are bfloat16, else float32
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
    int num_threads
) {
    using namespace fastppo;
    const Linear x{num_rows, width, weight,        old_values,     returns,  weights,
                   bias,     clip,  hidden_stride, dhidden_stride, partials, table};
    if (is_bfloat16)
        linear_value_rows<bfloat16>(x, hidden, dhidden, num_threads);
    else
        linear_value_rows<float>(x, hidden, dhidden, num_threads);
    if (dweight) sum_of_partials(partials, (num_rows + kChunkRows - 1) / kChunkRows, width, dweight);
}

}  // extern "C"
