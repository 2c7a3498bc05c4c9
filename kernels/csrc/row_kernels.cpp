// The two sweeps over a row of logits, written once and compiled for every instruction set (CMakeLists.txt): FASTPPO_ROWS
// names the table of kernels this translation unit defines. Nothing here is inline across translation units.
//
// First sweep, block by block: maximum, then sum relative to the largest value so far. A block is read from memory once,
// because its second pass hits the L1 cache, and that pass fetches the next block meanwhile. Second sweep: the gradient,
// over the logits if wanted. The order of every operation depends on V alone, so a row's result depends on nothing but
// the row.

#include <cstddef>

#include "exp2.h"
#include "rows.h"
#include "simd.h"

using namespace fastppo;

namespace {

constexpr int kUnroll = 2;             // pairs in flight with sums of their own: an addition takes 3 to 4 cycles
constexpr int kStep = 2 * kUnroll * kLanes;
constexpr int kBlockBytes = 16 << 10;  // half of the smallest L1 cache
constexpr float kInfinity = __builtin_inff();

// tanh x = (e^2x - 1) / (e^2x + 1), with e^2x - 1 made without cancellation. 1 in float32 from |x| = 9.1 on.
FASTPPO_INLINE F tanh_of(F x) {
    const F k = set(2.8853900817779268f), bounded = max(set(-10.0f), min(set(10.0f), x));  // NaN stays NaN
    const F r = mul_add(bounded, k, set(kMagic));
    const F f = mul_sub(bounded, k, sub(r, set(kMagic)));
    const F p = exponent_bits(r);
    const F e = mul_add(p, mul(exp2_polynomial<6>(f), f), sub(p, set(1.0f)));
    return div(e, add(e, set(2.0f)));
}

template <bool CAP>
FASTPPO_INLINE F capped(F z, const Scale& scale, F& tanh) {
    if (!CAP) return z;
    tanh = tanh_of(mul(z, set(scale.inverse_softcap)));
    return mul(tanh, set(scale.softcap));
}

template <bool CAP>
FASTPPO_INLINE float capped(float z, const Scale& scale) {
    F tanh;
    return CAP ? largest(capped<CAP>(set(z), scale, tanh)) : z;
}

template <bool CAP>
FASTPPO_INLINE float shift_of(float max, const Scale& scale) {
    return CAP || max > -kInfinity ? capped<CAP>(max, scale) : 0.0f;  // -inf - -inf would be NaN
}

// What every element of a row needs: d = y(z) - shift, no less than makes 2^(d k) zero, and 2^(d k) itself.
template <int D, bool CAP>
struct Exponential {
    const Scale& scale;
    F shift, k, least;

    FASTPPO_INLINE Exponential make(const Scale& scale, float shift) {
        return {scale, set(shift), set(scale.log2_scale), set(-127.0f / scale.log2_scale)};
    }
    inline __attribute__((always_inline)) F operator()(F z, F& d, F& tanh) const {
        d = max(least, sub(capped<CAP>(z, scale, tanh), shift));
        return exp2_of<D>(d, k);
    }
};

template <class In>
FASTPPO_INLINE float largest_of(const In* z, int64_t count, float so_far) {
    F m[kUnroll], n[kUnroll];
    for (int u = 0; u < kUnroll; ++u) m[u] = n[u] = set(so_far);
    int64_t j = 0;
    for (; j + kStep <= count; j += kStep) {
        for (int u = 0; u < kUnroll; ++u) {
            const Pair x = load_pair(z + j + u * 2 * kLanes);
            m[u] = max(m[u], x.a);
            n[u] = max(n[u], x.b);
        }
    }
    for (; j < count; j += kLanes)
        m[0] = max(m[0], load_first(z + j, count - j < kLanes ? static_cast<int>(count - j) : kLanes, so_far));
    return largest(max(max(m[0], m[1]), max(n[0], n[1])));
}

template <class In, bool ENTROPY, bool CAP>
RowSums sum_sweep(const void* logits, int64_t vocab_size, int64_t target, const Scale& scale) {
    const In* row = static_cast<const In*>(logits);
    const int64_t block = kBlockBytes / sizeof(In);
    float max_so_far = -kInfinity;
    const float target_logit = largest(load_first(row + target, 1, -kInfinity));
    RowSums out = {shift_of<CAP>(max_so_far, scale), capped<CAP>(target_logit, scale), 0.0, 0.0};
    for (int64_t begin = 0; begin < vocab_size; begin += block) {
        const In* z = row + begin;
        const int64_t count = vocab_size - begin < block ? vocab_size - begin : block;
        const float block_max = largest_of(z, count, max_so_far);
        if (block_max != max_so_far) {
            const float shift = shift_of<CAP>(block_max, scale);
            if (CAP || max_so_far > -kInfinity) {  // else both sums are 0, or NaN for ever
                const double step = static_cast<double>(out.shift) - shift;
                const double factor = __builtin_exp2(step * scale.log2_scale);
                out.weighted_sum = factor * (out.weighted_sum + step * out.sum);
                out.sum *= factor;
            }
            max_so_far = block_max;
            out.shift = shift;
        }
        const auto exponential = Exponential<5, CAP>::make(scale, out.shift);
        F s[2 * kUnroll], a[2 * kUnroll], d, tanh;
        for (int u = 0; u < 2 * kUnroll; ++u) s[u] = a[u] = set(0.0f);
        int64_t j = 0;
        for (; j + kStep <= count; j += kStep) {
            for (int u = 0; u < kUnroll; ++u) {
                const In* here = z + j + u * 2 * kLanes;
                const Pair x = load_pair(here);
                const F e = exponential(x.a, d, tanh);
                s[2 * u] = add(s[2 * u], e);
                if (ENTROPY) a[2 * u] = mul_add(e, d, a[2 * u]);
                const F f = exponential(x.b, d, tanh);
                s[2 * u + 1] = add(s[2 * u + 1], f);
                if (ENTROPY) a[2 * u + 1] = mul_add(f, d, a[2 * u + 1]);
                for (size_t byte = 0; byte < sizeof(In) * 2 * kLanes; byte += 64)
                    __builtin_prefetch(reinterpret_cast<const char*>(here + block) + byte);
            }
        }
        for (; j < count; j += kLanes) {
            const int rest = count - j < kLanes ? static_cast<int>(count - j) : kLanes;
            const F e = keep_first(exponential(load_first(z + j, rest, max_so_far), d, tanh), rest);
            s[0] = add(s[0], e);
            if (ENTROPY) a[0] = mul_add(e, d, a[0]);
        }
        out.sum += total(add(add(s[0], s[1]), add(s[2], s[3])));
        if (ENTROPY) out.weighted_sum += total(add(add(a[0], a[1]), add(a[2], a[3])));
    }
    return out;
}

// dlogits may lie over logits: at the same addresses, or bfloat16 from the first byte of a float32 row on. Element j of
// dlogits then lies on or before element j of logits, which was read already, and never on one still to be read: the
// sweep must run forwards.
template <class In, class Out, bool ENTROPY, bool CAP>
void gradient_sweep(const void* logits, void* dlogits, int64_t vocab_size, const Scale& scale, const Gradient& given) {
    const In* z = static_cast<const In*>(logits);
    Out* out = static_cast<Out*>(dlogits);
    const auto exponential = Exponential<sizeof(Out) == 2 ? 4 : 6, CAP>::make(scale, given.shift);
    const F constant = set(given.constant), slope = set(given.slope);
    const auto gradient = [&](F x) __attribute__((always_inline)) {
        F d, tanh;
        const F e = exponential(x, d, tanh);
        const F g = mul(e, ENTROPY ? mul_add(slope, d, constant) : constant);
        return CAP ? mul(g, sub(set(1.0f), mul(tanh, tanh))) : g;
    };
    int64_t j = 0;
    for (; j + kStep <= vocab_size; j += kStep) {
        Pair x[kUnroll];
        for (int u = 0; u < kUnroll; ++u) x[u] = load_pair(z + j + u * 2 * kLanes);
        for (int u = 0; u < kUnroll; ++u) store_pair(In{}, out + j + u * 2 * kLanes, {gradient(x[u].a), gradient(x[u].b)});
    }
    for (; j < vocab_size; j += kLanes) {
        const int rest = vocab_size - j < kLanes ? static_cast<int>(vocab_size - j) : kLanes;
        store_first(out + j, rest, gradient(load_first(z + j, rest, given.shift)));
    }
    store_first(out + given.target, 1, set(given.at_target));
}

}  // namespace

#define SUMS(In) {{sum_sweep<In, false, false>, sum_sweep<In, false, true>}, \
                  {sum_sweep<In, true, false>, sum_sweep<In, true, true>}}
#define GRADIENTS(In, Out) {{gradient_sweep<In, Out, false, false>, gradient_sweep<In, Out, false, true>}, \
                            {gradient_sweep<In, Out, true, false>, gradient_sweep<In, Out, true, true>}}

namespace fastppo {

extern const RowKernels FASTPPO_ROWS;
const RowKernels FASTPPO_ROWS = {
    {SUMS(float), SUMS(BFloat16)},
    {{GRADIENTS(float, float), GRADIENTS(float, BFloat16)}, {GRADIENTS(BFloat16, float), GRADIENTS(BFloat16, BFloat16)}},
};

}  // namespace fastppo
