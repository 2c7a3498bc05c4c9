// Norms, gated activations and rotary positions of a decoder's layers, and their gradients.

#include "layers.h"

#include <algorithm>

#include "ops.h"
#include "threads.h"

extern "C" {

void fastppo_rms_norm(
    int64_t num_rows, int64_t width, const float* x, const float* weight, float eps, float* out, float* rates, int isa,
    int num_threads
) {
    using namespace fastppo;
    const Layers& kernels = *instruction_set(isa).layers;
    parallel_for(num_rows, width, num_threads, [&](int, int64_t begin, int64_t end) {
        kernels.norm(x + begin * width, weight, end - begin, width, eps, out + begin * width, rates + begin);
    });
}

int64_t fastppo_norm_parts(int64_t num_rows) { return (num_rows + fastppo::kNormRows - 1) / fastppo::kNormRows; }

void fastppo_rms_norm_backward(
    int64_t num_rows, int64_t width, const float* dout, const float* x, const float* weight, const float* rates, float* dx,
    float* dweights,  // (fastppo_norm_parts(num_rows), width): their sum is the gradient
    int isa, int num_threads
) {
    using namespace fastppo;
    const Layers& kernels = *instruction_set(isa).layers;
    parallel_for(fastppo_norm_parts(num_rows), kNormRows * width, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            const int64_t first = part * kNormRows, at = first * width;
            kernels.norm_backward(
                dout + at, x + at, weight, rates + first, std::min(kNormRows, num_rows - first), width, dx + at,
                dweights + part * width);
        }
    });
}

void fastppo_gated(int64_t n, const float* gate, const float* up, float* out, int isa, int num_threads) {
    using namespace fastppo;
    const Layers& kernels = *instruction_set(isa).layers;
    parallel_for(n, 1, num_threads, [&](int, int64_t begin, int64_t end) {
        kernels.gated(gate + begin, up + begin, end - begin, out + begin);
    });
}

void fastppo_gated_backward(
    int64_t n, const float* dout, const float* gate, const float* up, float* dgate, float* dup, int isa, int num_threads
) {
    using namespace fastppo;
    const Layers& kernels = *instruction_set(isa).layers;
    parallel_for(n, 1, num_threads, [&](int, int64_t begin, int64_t end) {
        kernels.gated_backward(dout + begin, gate + begin, up + begin, end - begin, dgate + begin, dup + begin);
    });
}

// out (tokens, heads, width); cos and sin (tokens, width).
void fastppo_rotate(
    int64_t tokens, int64_t heads, int64_t width, const float* x, int64_t x_row, int64_t x_head, const float* cos,
    const float* sin, int back, float* out, int isa, int num_threads
) {
    using namespace fastppo;
    const Layers& kernels = *instruction_set(isa).layers;
    parallel_for(tokens, heads * width, num_threads, [&](int, int64_t begin, int64_t end) {
        kernels.rotate(
            x + begin * x_row, x_row, x_head, cos + begin * width, sin + begin * width, end - begin, heads, width, back,
            out + begin * heads * width);
    });
}

}  // extern "C"
