// The table of attention.h: FASTPPO_ATTENTION names the one that this translation unit defines (CMakeLists.txt).
//
// Keys and values are read once each, as pairs of vectors (simd.h): all queries of a group meet a vector while it is in
// registers or in the first cache.

#include "attention.h"

#include "exp2.h"
#include "simd.h"

using namespace fastppo;

namespace {

constexpr int64_t kPair = 2 * kLanes;
constexpr int64_t kTile = 32;  // keys that stay in the first cache while every query meets them
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

template <typename T>
FASTPPO_INLINE Pair load_tail(const T* p, int64_t count) {  // 0 past the end
    T elements[kPair] = {};
    std::memcpy(elements, p, count * sizeof(T));
    return load_pair(elements);
}

template <typename T>
FASTPPO_INLINE Pair load_some(const T* p, int64_t count) {
    return count >= kPair ? load_pair(p) : load_tail(p, count);
}

// scores[t] = q . keys[t] for kKeys keys; q as pairs of floats.
template <typename T, int kKeys>
FASTPPO_INLINE void dots(const float* q, const T* keys, int64_t width, float* scores) {
    F sums[kKeys] = {};
    int64_t d = 0;
    for (; d + kPair <= width; d += kPair) {
        const F a = load(q + d), b = load(q + d + kLanes);
        for (int t = 0; t < kKeys; ++t) {
            const Pair k = load_pair(keys + t * width + d);
            sums[t] = mul_add(b, k.b, mul_add(a, k.a, sums[t]));
        }
    }
    if (d < width) {
        const F a = load(q + d), b = load(q + d + kLanes);
        for (int t = 0; t < kKeys; ++t) {
            const Pair k = load_tail(keys + t * width + d, width - d);
            sums[t] = mul_add(b, k.b, mul_add(a, k.a, sums[t]));
        }
    }
    for (int t = 0; t < kKeys; ++t) scores[t] = sum(sums[t]);
}

// Scores become weights of sum 1, 0 from n on.
void softmax(float* scores, int64_t n, float scale, float cap) {
    if (cap > 0.0f)
        for (int64_t t = 0; t < n; ++t) scores[t] = cap * __builtin_tanhf(scores[t] * scale / cap) / scale;
    const int64_t end = (n + kLanes - 1) / kLanes * kLanes;
    for (int64_t t = n; t < end; ++t) scores[t] = -kInfinity;
    F top = set(-kInfinity);
    for (int64_t t = 0; t < end; t += kLanes) top = max(load(scores + t), top);
    const F origin = set(largest(top)), rate = set(scale * kLog2E), lowest = set(-127.0f / (scale * kLog2E));
    F mass = set(0.0f);
    for (int64_t t = 0; t < end; t += kLanes) {
        const F weight = exp2_of<6>(max(lowest, sub(load(scores + t), origin)), rate);
        store(scores + t, weight);
        mass = add(mass, weight);
    }
    const F share = div(set(1.0f), set(sum(mass)));
    for (int64_t t = 0; t < end; t += kLanes) store(scores + t, mul(load(scores + t), share));
}

// out[0..kPairs * kPair) += sum_t weights[t] values[t], for a tile of keys.
template <typename T, int kPairs>
FASTPPO_INLINE void mix(const float* weights, const T* values, int64_t n, int64_t width, float* out) {
    F a[kPairs], b[kPairs];
    for (int i = 0; i < kPairs; ++i) a[i] = load(out + i * kPair), b[i] = load(out + i * kPair + kLanes);
    for (int64_t t = 0; t < n; ++t) {
        const F w = set(weights[t]);
        for (int i = 0; i < kPairs; ++i) {
            const Pair v = load_pair(values + t * width + i * kPair);
            a[i] = mul_add(w, v.a, a[i]), b[i] = mul_add(w, v.b, b[i]);
        }
    }
    for (int i = 0; i < kPairs; ++i) store(out + i * kPair, a[i]), store(out + i * kPair + kLanes, b[i]);
}

template <typename T>
FASTPPO_INLINE void mix_tail(const float* weights, const T* values, int64_t n, int64_t width, int64_t count, float* out) {
    F a = load(out), b = load(out + kLanes);
    for (int64_t t = 0; t < n; ++t) {
        const F w = set(weights[t]);
        const Pair v = load_tail(values + t * width, count);
        a = mul_add(w, v.a, a), b = mul_add(w, v.b, b);
    }
    store(out, a), store(out + kLanes, b);
}

template <typename T>
void attend(
    const void* given_q, const void* given_keys, const void* given_values, int64_t n, int64_t group, int64_t width,
    float scale, float cap, float* scores, float* floats, void* given_out
) {
    const T *q = static_cast<const T*>(given_q), *keys = static_cast<const T*>(given_keys);
    const T* values = static_cast<const T*>(given_values);
    const int64_t pitch = padded(width), length = padded(n);
    float *wide_q = floats, *sums = floats + group * pitch;
    for (int64_t g = 0; g < group; ++g)
        for (int64_t d = 0; d < width; d += kPair) {
            const Pair x = load_some(q + g * width + d, width - d);
            store(wide_q + g * pitch + d, x.a), store(wide_q + g * pitch + d + kLanes, x.b);
            store(sums + g * pitch + d, set(0.0f)), store(sums + g * pitch + d + kLanes, set(0.0f));
        }
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t end = least(begin + kTile, n);
        for (int64_t g = 0; g < group; ++g) {
            int64_t t = begin;
            float* line = scores + g * length;
            for (; t + 4 <= end; t += 4) dots<T, 4>(wide_q + g * pitch, keys + t * width, width, line + t);
            for (; t < end; ++t) dots<T, 1>(wide_q + g * pitch, keys + t * width, width, line + t);
        }
    }
    for (int64_t g = 0; g < group; ++g) softmax(scores + g * length, n, scale, cap);
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int64_t count = least(kTile, n - begin);
        const T* tile = values + begin * width;
        for (int64_t g = 0; g < group; ++g) {
            const float* weights = scores + g * length + begin;
            float* line = sums + g * pitch;
            int64_t d = 0;
            for (; d + 2 * kPair <= width; d += 2 * kPair) mix<T, 2>(weights, tile + d, count, width, line + d);
            for (; d + kPair <= width; d += kPair) mix<T, 1>(weights, tile + d, count, width, line + d);
            if (d < width) mix_tail(weights, tile + d, count, width, width - d, line + d);
        }
    }
    for (int64_t g = 0; g < group; ++g)
        for (int64_t d = 0; d < width; d += kPair) {
            T elements[kPair];
            const float* line = sums + g * pitch + d;
            store_pair(T{}, elements, {load(line), load(line + kLanes)});
            std::memcpy(static_cast<T*>(given_out) + g * width + d, elements, least(kPair, width - d) * sizeof(T));
        }
}

}  // namespace

namespace fastppo {

extern const Attention FASTPPO_ATTENTION;
const Attention FASTPPO_ATTENTION = {{attend<float>, attend<BFloat16>}};

}  // namespace fastppo
