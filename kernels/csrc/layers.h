// Norms, gated activations and rotary positions with their gradients, compiled for every instruction set
// (layers_kernels.cpp). All arrays are float32, rows one after the other unless a distance is given.

#pragma once

#include <cstdint>

#include "isa.h"

namespace fastppo {

constexpr int64_t kNormRows = 128;  // whose weight gradients are added up by one thread

struct Layers {
    // out = weight x / sqrt(mean(x^2) + eps) by row; rates: what x is multiplied by.
    void (*norm)(const float* x, const float* weight, int64_t rows, int64_t width, float eps, float* out, float* rates);
    // dweight: of these rows.
    void (*norm_backward)(
        const float* dout, const float* x, const float* weight, const float* rates, int64_t rows, int64_t width, float* dx,
        float* dweight);
    // out = gate / (1 + exp(-gate)) up
    void (*gated)(const float* gate, const float* up, int64_t n, float* out);
    void (*gated_backward)(const float* dout, const float* gate, const float* up, int64_t n, float* dgate, float* dup);
    // Of each head (a, b) = two halves, cos and sin (c, d) and (s, t) likewise: (a c - b s, b d + a t), or back, its
    // transpose: (a c + b t, b d - a s). Tokens of x are x_row and heads x_head apart.
    void (*rotate)(
        const float* x, int64_t x_row, int64_t x_head, const float* cos, const float* sin, int64_t rows, int64_t heads,
        int64_t width, bool back, float* out);
};

}  // namespace fastppo
