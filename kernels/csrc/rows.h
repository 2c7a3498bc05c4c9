// The row ops: the C ABI structs (mirrored in native/rows.py) and the table of kernels that every instruction set fills.
// Letters: R rows, V vocabulary.

#pragma once

#include <cstdint>

#include "isa.h"

namespace fastppo {

// A batch of rows. log p = log_softmax(softcap * tanh(z / softcap) / temperature) of every row of logits.
struct Batch {
    const void* logits;        // (R, V)
    void* dlogits;             // (R, V) or null: no gradient wanted; may lie over logits, see gradient_sweep
    const int64_t* targets;    // (R,)
    int64_t num_rows;
    int64_t vocab_size;
    int64_t logits_stride;     // elements from row to row
    int64_t dlogits_stride;
    double temperature;        // > 0
    double softcap;            // > 0, or 0: none
    Dtype logits_dtype;
    Dtype dlogits_dtype;
    int32_t entropy;           // 1: entropy wanted
    int32_t num_threads;       // at most this many
    int32_t isa;               // of isa.h
};

// Constants of the objective, (R,) each; null where there are none.
struct PPORows {
    const float* old_logprobs;
    const float* advantages;
    const float* weights;
    const float* ref_logprobs;
    const float* is_weights;
    const float* sampler_logprobs;
};

struct PPOSettings {
    double clip_low;
    double clip_high;
    double dual_clip;          // > 1, or infinity: none
    double kl_coef;
    double entropy_coef;
    double old_kl_coef;
    int32_t kl_estimator;      // 1, 2, 3: k1, k2, k3
    int32_t straight_through;  // 1: with the gradient of k2
};

// How a raw logit z becomes e proportional to its probability: y(z) = z or softcap * tanh(z / softcap), d = y(z) - shift,
// e = 2^(d * log2_scale).
struct Scale {
    float log2_scale;          // log2(e) / temperature
    float softcap;             // 0: none
    float inverse_softcap;
};

// First sweep over a row, relative to its maximum: sum e and sum d e (0 unless asked for) over the row.
struct RowSums {
    float shift;               // y(max z); 0 where every z is -inf
    float target;              // y of the target, in the same arithmetic
    double sum;
    double weighted_sum;
};

// Second sweep: dlogits_j = e_j (constant + slope d_j) (dy/dz)_j, but at_target in the column of the target.
struct Gradient {
    float shift;
    float constant;
    float slope;
    float at_target;
    int64_t target;
};

using SumSweep = RowSums (*)(const void* logits, int64_t vocab_size, int64_t target, const Scale&);
using GradientSweep = void (*)(const void* logits, void* dlogits, int64_t vocab_size, const Scale&, const Gradient&);

// Indices: dtype of logits, (dtype of dlogits,) entropy wanted, soft-cap wanted.
struct RowKernels {
    SumSweep sum[2][2][2];
    GradientSweep gradient[2][2][2][2];
};

}  // namespace fastppo
