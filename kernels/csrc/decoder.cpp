// One new token per sequence through the layers of a decoder: norm, attention, norm, gated activation, each added to what
// goes through them. The parts are the ops of the other files; in one call, since for few tokens calls are what takes time.

#include "ops.h"

extern "C" {

struct DecoderLayer {  // float32, contiguous; weights (outputs, inputs), biases and norms of heads may be null
    const float *input_norm, *q, *q_bias, *k, *k_bias, *v, *v_bias, *q_norm, *k_norm, *o, *o_bias;
    const float *inner_norm, *gate, *up, *down;
    float *keys, *values;  // as for fastppo_decode_attention
    int64_t window;
    float eps, head_eps, inner_eps, scale, cap;
};

struct DecoderStep {
    int64_t num_sequences, num_layers, hidden, heads, kv_heads, width, inner, row_stride, head_stride, span;
    const DecoderLayer* layers;
    const float *cos, *sin;    // (num_sequences, width)
    const int64_t* positions;  // (num_sequences,)
    float* x;                  // (num_sequences, hidden), what goes in and what comes out
    float* scratch;            // fastppo_decoder_scratch(...)
    int32_t isa, num_threads;
};

int64_t fastppo_decoder_scratch(const DecoderStep* s) {
    const int64_t row = s->hidden + 2 * s->heads * s->width + 2 * s->kv_heads * s->width + 2 * s->inner + s->heads;
    return s->num_sequences * row + s->num_threads * fastppo_decode_scratch(s->span, s->heads / s->kv_heads, s->width);
}

// Returns 0, having changed nothing but scratch, where a position is not in [0, span).
int fastppo_decoder_step(const DecoderStep* step) {
    const DecoderStep& s = *step;
    const int64_t n = s.num_sequences, D = s.width, wide = s.heads * D, narrow = s.kv_heads * D;
    float *normed = s.scratch, *q = normed + n * s.hidden, *out = q + n * wide, *k = out + n * wide, *v = k + n * narrow;
    float *gate = v + n * narrow, *up = gate + n * s.inner, *rates = up + n * s.inner, *rest = rates + n * s.heads;
    const auto norm = [&](int64_t rows, int64_t width, const float* x, const float* weight, float eps, float* made) {
        fastppo_rms_norm(rows, width, x, weight, eps, made, rates, s.isa, s.num_threads);
    };
    const auto times = [&](const float* x, int64_t inputs, const float* weight, int64_t outputs, const float* bias, float* made) {
        fastppo_matmul(
            n, outputs, inputs, 0, x, inputs, 1, 0, weight, 1, inputs, bias, 0, made, outputs, s.isa, s.num_threads);
    };
    const auto add = [&](const float* made) {  // the whole product, as the modules do: a sum's parts round at its own size
        for (int64_t i = 0; i < n * s.hidden; ++i) s.x[i] += made[i];
    };
    const auto turned = [&](float* x, int64_t heads, const float* weight, float eps) {
        if (weight) norm(n * heads, D, x, weight, eps, x);
        fastppo_rotate(n, heads, D, x, heads * D, D, s.cos, s.sin, 0, x, s.isa, s.num_threads);
    };
    for (int64_t i = 0; i < s.num_layers; ++i) {
        const DecoderLayer& layer = s.layers[i];
        norm(n, s.hidden, s.x, layer.input_norm, layer.eps, normed);
        times(normed, s.hidden, layer.q, wide, layer.q_bias, q);
        times(normed, s.hidden, layer.k, narrow, layer.k_bias, k);
        times(normed, s.hidden, layer.v, narrow, layer.v_bias, v);
        turned(q, s.heads, layer.q_norm, layer.head_eps);
        turned(k, s.kv_heads, layer.k_norm, layer.head_eps);
        const int legal = fastppo_decode_attention(
            n, s.kv_heads, s.heads / s.kv_heads, D, 0, q, k, v, layer.keys, layer.values, s.row_stride, s.head_stride,
            s.positions, s.span, layer.window, layer.scale, layer.cap, rest, out, s.isa, s.num_threads);
        if (!legal) return 0;
        times(out, wide, layer.o, s.hidden, layer.o_bias, normed);
        add(normed);
        norm(n, s.hidden, s.x, layer.inner_norm, layer.inner_eps, normed);
        times(normed, s.hidden, layer.gate, s.inner, nullptr, gate);
        times(normed, s.hidden, layer.up, s.inner, nullptr, up);
        fastppo_gated(n * s.inner, gate, up, gate, s.isa, s.num_threads);
        times(gate, s.inner, layer.down, s.hidden, nullptr, normed);
        add(normed);
    }
    return 1;
}

}  // extern "C"
