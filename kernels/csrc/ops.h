// Ops that other ops are made of; what they do stands with their definitions.

#pragma once

#include <cstdint>

extern "C" {

void fastppo_rms_norm(
    int64_t num_rows, int64_t width, const float* x, const float* weight, float eps, float* out, float* rates, int isa,
    int num_threads);

void fastppo_gated(int64_t n, const float* gate, const float* up, float* out, int isa, int num_threads);

void fastppo_rotate(
    int64_t tokens, int64_t heads, int64_t width, const float* x, int64_t x_row, int64_t x_head, const float* cos,
    const float* sin, int back, float* out, int isa, int num_threads);

void fastppo_matmul(
    int64_t M, int64_t N, int64_t K, int a_dtype, const void* a, int64_t a_row, int64_t a_column, int b_dtype, const void* b,
    int64_t b_row, int64_t b_column, const float* bias, int accumulate, float* c, int64_t c_row, int isa, int num_threads);

int64_t fastppo_decode_scratch(int64_t span, int64_t group, int64_t width);

int fastppo_decode_attention(
    int64_t num_sequences, int64_t kv_heads, int64_t group, int64_t width, int dtype, const void* q, const void* k,
    const void* v, void* keys, void* values, int64_t row_stride, int64_t head_stride, const int64_t* positions,
    int64_t span, int64_t window, float scale, float cap, float* scratch, void* out, int isa, int num_threads);

}  // extern "C"
