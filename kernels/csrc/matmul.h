// A tile of a matrix product, compiled for every instruction set (matmul_kernels.cpp).

#pragma once

#include <cstdint>

#include "isa.h"

namespace fastppo {

constexpr int64_t kTileRows = 256;  // at most, of one call: a block of the first operand stays in the second cache

struct Operand {
    const void* data;
    int64_t row;     // elements from one row to the next
    int64_t column;
    Dtype dtype;
};

struct Matmul {
    int64_t step;  // columns of a tile are best a multiple of it
    // c = a b + bias, or c += a b + bias: a (rows, depth), b (depth, columns), c float32 with rows c_row apart, bias
    // (columns,) or null, rows <= kTileRows. An element is the sum of its products in order, in float32, in blocks of a
    // length that is the same everywhere: its bits depend on its row of a and its column of b alone.
    void (*tile)(
        Operand a, Operand b, const float* bias, int64_t rows, int64_t columns, int64_t depth, bool accumulate, float* c,
        int64_t c_row);
};

}  // namespace fastppo
