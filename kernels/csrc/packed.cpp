// Causal attention within sequences that lie one after the other, and its gradients.

#include "packed.h"

#include <algorithm>

#include "threads.h"

namespace {

using namespace fastppo;

constexpr int64_t kQueries = 256;  // of a piece of the forward pass, which depends on nothing but them and the keys before

}  // namespace

extern "C" {

// Tokens of the longest sequence; -1 where cu_seqlens does not rise from 0 to num_tokens.
int64_t fastppo_packed_longest(int64_t num_sequences, const int32_t* cu_seqlens, int64_t num_tokens) {
    int64_t longest = cu_seqlens[0] == 0 && cu_seqlens[num_sequences] == num_tokens ? 0 : -1;
    for (int64_t b = 0; b < num_sequences && longest >= 0; ++b) {
        const int64_t length = int64_t{cu_seqlens[b + 1]} - cu_seqlens[b];
        longest = length < 0 ? -1 : std::max(longest, length);
    }
    return longest;
}

// float32 of scratch for each thread, where sequences are up to `longest` long.
int64_t fastppo_packed_scratch(int64_t longest, int64_t width) {
    const int64_t padded = (longest + 63) / 64 * 64;
    return 2 * padded * width + std::max<int64_t>(8 * padded, 2 * kBlockQueries * kBlockKeys);
}

// Rows of arrays are *_row floats apart, heads *_head; those of out, dout, dq (heads) and dk, dv (kv_heads) lie one after
// the other. The forward pass writes out and what it keeps (2, heads, tokens), the backward pass dq, dk and dv.
void fastppo_packed_attention(
    int64_t num_sequences,
    const int32_t* cu_seqlens,
    int64_t heads,
    int64_t kv_heads,
    int64_t width,   // of a head, a multiple of 16
    int64_t window,  // keys that a query looks at
    float scale,
    const float* q, int64_t q_row, int64_t q_head,
    const float* k, int64_t k_row, int64_t k_head,
    const float* v, int64_t v_row, int64_t v_head,
    float* out,
    float* origins,
    const float* dout,  // null: forward
    float* dq, float* dk, float* dv,
    int64_t longest,
    float* scratch,  // (num_threads, fastppo_packed_scratch(...))
    int isa,
    int num_threads
) {
    const Packed& kernels = *instruction_set(isa).packed;
    const int64_t tokens = cu_seqlens[num_sequences], group = heads / kv_heads, per_thread = fastppo_packed_scratch(longest, width);
    const int64_t row = heads * width, kv_row = kv_heads * width, units = num_sequences * kv_heads;
    const int64_t count = dout ? units : units * ((longest + kQueries - 1) / kQueries);
    const int64_t elements = count ? tokens * longest * row / 8 / count : 1;  // 16 multiply-adds take as long as one
    parallel_for(count, elements, num_threads, [&](int worker, int64_t first, int64_t last) {
        for (int64_t at = first; at < last; ++at) {
            const int64_t b = at % units / kv_heads, h = at % kv_heads, n = cu_seqlens[b], length = cu_seqlens[b + 1] - n;
            const int64_t own = n * row + h * group * width, kv = n * kv_row + h * width;
            const int64_t at_head = h * group * tokens + n;
            Sequence s = {
                q + n * q_row + h * group * q_head, k + n * k_row + h * k_head, v + n * v_row + h * v_head,
                q_row, q_head, k_row, v_row, out + own, origins + at_head, origins + heads * tokens + at_head, row, tokens,
                nullptr, nullptr, nullptr, nullptr, kv_row, length, group, width, window, scale};
            if (dout) {
                s.dout = dout + own, s.dq = dq + own, s.dk = dk + kv, s.dv = dv + kv;
                kernels.backward(s, scratch + worker * per_thread);
            } else {
                const int64_t begin = (count - 1 - at) / units * kQueries;  // those that see the most keys first
                if (begin < length) kernels.forward(s, begin, std::min(begin + kQueries, length), scratch + worker * per_thread);
            }
        }
    });
}

}  // extern "C"
