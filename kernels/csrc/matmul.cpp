// Products of matrices: float32 results of float32 or bfloat16 operands.

#include "matmul.h"

#include <algorithm>

#include "ops.h"
#include "threads.h"

namespace {

constexpr int64_t kTileColumns = 256;

}  // namespace

extern "C" {

// c = a b + bias, or with `accumulate` c += a b + bias; a (M, K), b (K, N), c (M, N) with columns side by side, bias (N,)
// or null. Any distances between the rows and columns of a and b. How c is cut into tiles changes no bit.
void fastppo_matmul(
    int64_t M, int64_t N, int64_t K, int a_dtype, const void* a, int64_t a_row, int64_t a_column, int b_dtype, const void* b,
    int64_t b_row, int64_t b_column, const float* bias, int accumulate, float* c, int64_t c_row, int isa, int num_threads
) {
    using namespace fastppo;
    if (M == 0 || N == 0) return;
    const Matmul& kernels = *instruction_set(isa).matmul;
    const int64_t least_rows = 32, least_columns = 2 * kernels.step;
    const auto rounded = [&](int64_t n) { return (n + kernels.step - 1) / kernels.step * kernels.step; };
    int64_t rows = std::min(M, kTileRows), columns = std::min(rounded(N), kTileColumns);
    const auto tiles = [&] { return ((M + rows - 1) / rows) * ((N + columns - 1) / columns); };
    while (tiles() < num_threads && (rows > least_rows || columns > least_columns)) {
        if (rows > least_rows && (rows >= columns || columns <= least_columns))
            rows = std::max(least_rows, rows / 2);
        else
            columns = std::max(least_columns, rounded(columns / 2));
    }
    const int64_t across = (N + columns - 1) / columns;
    const auto part = [](const void* data, int dtype, int64_t at) {
        return static_cast<const void*>(static_cast<const char*>(data) + at * (dtype == kFloat32 ? 4 : 2));
    };
    parallel_for(tiles(), rows * columns * K / 8, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t m = i / across * rows, n = i % across * columns;
            kernels.tile(
                {part(a, a_dtype, m * a_row), a_row, a_column, static_cast<Dtype>(a_dtype)},
                {part(b, b_dtype, n * b_column), b_row, b_column, static_cast<Dtype>(b_dtype)}, bias ? bias + n : nullptr,
                std::min(rows, M - m), std::min(columns, N - n), K, accumulate, c + m * c_row + n, c_row);
        }
    });
}

}  // extern "C"
