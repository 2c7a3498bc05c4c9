// Causal attention within one sequence and its gradients, compiled for every instruction set (packed_kernels.cpp).

#pragma once

#include <cstdint>

#include "isa.h"

namespace fastppo {

constexpr int64_t kBlockQueries = 32, kBlockKeys = 256;  // of the backward pass

// Queries begin..end of one sequence and the `group` heads that share a head of keys; all arrays are of that sequence and
// start at its first token and at the first of those heads. A row of an array and the next one are `*_row` floats apart,
// heads of q, out and their gradients `*_head`. `width` is a multiple of 16.
struct Sequence {
    const float *q, *k, *v;
    int64_t q_row, q_head, k_row, v_row;
    float *out;  // out and its gradient are contiguous: rows `out_row` apart, heads `width`
    float *origins, *shares;
    int64_t out_row, origins_head;
    const float* dout;
    float *dq, *dk, *dv;  // dq as out; rows of dk and dv are dk_row apart
    int64_t dk_row;
    int64_t length, group, width, window;
    float scale;
};

struct Packed {
    // out_i = softmax(scale q_i . K) V over the `window` keys up to i. Kept for the gradients: the largest score before it
    // is scaled (origins_i), and 1 / sum of exponentials of the distances to it (shares_i). Their logarithm in one number
    // would err by an ulp of the score, which is much where scores are large.
    void (*forward)(const Sequence& s, int64_t begin, int64_t end, float* scratch);
    void (*backward)(const Sequence& s, float* scratch);  // of the whole sequence; dk and dv are added to
};

}  // namespace fastppo
