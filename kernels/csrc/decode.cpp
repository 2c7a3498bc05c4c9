// Attention of one new token per sequence to the keys and values before it, which lie in rows of memory.

#include <algorithm>
#include <cstring>

#include "attention.h"
#include "ops.h"
#include "threads.h"

extern "C" {

// float32 of scratch for each thread, where sequences are up to `span` long.
int64_t fastppo_decode_scratch(int64_t span, int64_t group, int64_t width) {
    return group * (fastppo::padded(span) + 2 * fastppo::padded(width));
}

// Writes k and v to keys and values at [i, :, positions[i]], then out_i from the positions up to there. A sequence's
// numbers depend on nothing but itself. Returns 0, having done nothing, where a position is not in [0, span).
int fastppo_decode_attention(
    int64_t num_sequences,
    int64_t kv_heads,
    int64_t group,             // query heads that share a head of keys
    int64_t width,             // elements of a head
    int dtype,                 // of q, k, v, keys, values, out
    const void* q,             // (n, kv_heads * group, width)
    const void* k,             // (n, kv_heads, width)
    const void* v,
    void* keys,                // (rows, kv_heads, positions, width), rows and heads row_stride and head_stride apart
    void* values,
    int64_t row_stride,
    int64_t head_stride,
    const int64_t* positions,  // (n,), each less than `span`
    int64_t span,
    int64_t window,            // positions that are looked at
    float scale,
    float cap,                 // <= 0: none
    float* scratch,            // (num_threads, fastppo_decode_scratch(...))
    void* out,                 // (n, kv_heads * group, width)
    int isa,
    int num_threads
) {
    using namespace fastppo;
    if (std::any_of(positions, positions + num_sequences, [&](int64_t p) { return p < 0 || p >= span; })) return 0;
    const Attention& kernels = *instruction_set(isa).attention;
    const int64_t size = dtype == kFloat32 ? 4 : 2, head_bytes = width * size;
    const int64_t per_thread = fastppo_decode_scratch(span, group, width);
    parallel_for(num_sequences * kv_heads, 2 * group * span * width / 16, num_threads, [&](int worker, int64_t begin, int64_t end) {
        float* scores = scratch + worker * per_thread;
        float* floats = scores + group * padded(span);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / kv_heads, head = i % kv_heads, position = positions[row];
            const int64_t first = std::max<int64_t>(position + 1 - window, 0);
            const int64_t at = (row * row_stride + head * head_stride) * size;
            char *own_keys = static_cast<char*>(keys) + at, *own_values = static_cast<char*>(values) + at;
            std::memcpy(own_keys + position * head_bytes, static_cast<const char*>(k) + i * head_bytes, head_bytes);
            std::memcpy(own_values + position * head_bytes, static_cast<const char*>(v) + i * head_bytes, head_bytes);
            kernels.attend[dtype](
                static_cast<const char*>(q) + i * group * head_bytes, own_keys + first * head_bytes,
                own_values + first * head_bytes, position + 1 - first, group, width, scale, cap, scores, floats,
                static_cast<char*>(out) + i * group * head_bytes);
        }
    });
    return 1;
}

}  // extern "C"
