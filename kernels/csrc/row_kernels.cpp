// The two sweeps over a row of logits, written once and compiled for every instruction set (CMakeLists.txt): FASTPPO_ISA
// names the table of kernels this translation unit defines. Nothing here is inline across translation units.
//
// First sweep, block by block: maximum, then sum of 2^t relative to the largest value so far. A block is read from
// memory once, because its second pass hits the L1 cache. Second sweep: the gradient, over the logits if wanted. The
// order of every operation depends on V alone, so a row's result depends on nothing but the row.

#include "rows.h"
#include "simd.h"

using namespace fastppo;

namespace {

constexpr int kUnroll = 4;             // independent accumulators: the latency of an addition is 3 to 4 cycles
constexpr int kBlockBytes = 16 << 10;  // half of the smallest L1 cache
constexpr float kInfinity = __builtin_inff();

// 2^f - 1 for |f| <= 1/2, relative error of 2^f below 1.2e-8 before rounding: least maximum error of the form
// f * P5(f), coefficients rounded to float32.
FASTPPO_INLINE F exp2_minus_1(F f) {
    F p = set(1.5353361956775188e-4f);
    p = fma(p, f, set(1.3398873852565885e-3f));
    p = fma(p, f, set(9.618436917662620e-3f));
    p = fma(p, f, set(5.5503331124782562e-2f));
    p = fma(p, f, set(2.4022646248340607e-1f));
    p = fma(p, f, set(6.9314718246459961e-1f));
    return mul(p, f);
}

// 2^(d * k) for d * k <= 0, 0 for -inf and below 2^-125.5; NaN stays NaN.
FASTPPO_INLINE F exp2_of(F d, F k) {
    const F r = fma(d, k, set(kMagic));
    const F n = sub(r, set(kMagic));
    const F f = fma(d, k, sub(set(0.0f), n));
    return mul_unless_below(r, set(kSmallest), add(exp2_minus_1(f), set(1.0f)), power(r));
}

// tanh x = (e^2x - 1) / (e^2x + 1), with e^2x - 1 made without cancellation. 1 in float32 from |x| = 9.1 on.
FASTPPO_INLINE F tanh_of(F x) {
    const F k = set(2.8853900817779268f), bounded = max(set(-10.0f), min(set(10.0f), x));  // NaN stays NaN
    const F r = fma(bounded, k, set(kMagic));
    const F f = fma(bounded, k, sub(set(kMagic), r));
    const F p = power(r);
    const F e = fma(p, exp2_minus_1(f), sub(p, set(1.0f)));
    return div(e, add(e, set(2.0f)));
}

template <bool CAP>
FASTPPO_INLINE F capped(F z, const Scale& scale, F& tanh) {
    if (!CAP) return z;
    tanh = tanh_of(mul(z, set(scale.inverse_softcap)));
    return mul(tanh, set(scale.softcap));
}

template <bool CAP>
FASTPPO_INLINE float shift_of(float max, const Scale& scale) {
    F tanh;
    if (CAP) return largest(capped<CAP>(set(max), scale, tanh));
    return max > -kInfinity ? max : 0.0f;  // -inf - -inf would be NaN
}

template <class In>
FASTPPO_INLINE float largest_of(const In* z, int64_t count, float so_far) {
    F m[kUnroll];
    for (int u = 0; u < kUnroll; ++u) m[u] = set(so_far);
    int64_t j = 0;
    for (; j + kUnroll * kLanes <= count; j += kUnroll * kLanes)
        for (int u = 0; u < kUnroll; ++u) m[u] = max(m[u], load(z + j + u * kLanes));
    for (; j + kLanes <= count; j += kLanes) m[0] = max(m[0], load(z + j));
    if (j < count) m[0] = max(m[0], load_first(z + j, static_cast<int>(count - j), so_far));
    return largest(max(max(m[0], m[1]), max(m[2], m[3])));
}

template <bool ENTROPY, bool CAP>
FASTPPO_INLINE F exponential(F z, F shift, const Scale& scale, F& t) {
    F tanh;
    const F d = sub(capped<CAP>(z, scale, tanh), shift), k = set(scale.log2_scale);
    if (ENTROPY) t = max(set(-127.0f), mul(d, k));  // finite where 2^t is 0, so that t 2^t is 0 too
    return exp2_of(d, k);
}

template <class In, bool ENTROPY, bool CAP>
RowSums sum_sweep(const void* logits, int64_t vocab_size, const Scale& scale) {
    const In* row = static_cast<const In*>(logits);
    const int64_t block = kBlockBytes / sizeof(In);
    float max_so_far = -kInfinity;
    RowSums out = {shift_of<CAP>(max_so_far, scale), 0.0, 0.0};
    for (int64_t begin = 0; begin < vocab_size; begin += block) {
        const In* z = row + begin;
        const int64_t count = vocab_size - begin < block ? vocab_size - begin : block;
        const float block_max = largest_of(z, count, max_so_far);
        if (block_max != max_so_far) {
            const float shift = shift_of<CAP>(block_max, scale);
            if (CAP || max_so_far > -kInfinity) {  // else both sums are 0, or NaN for ever
                const double step = (static_cast<double>(out.shift) - shift) * scale.log2_scale;
                const double factor = __builtin_exp2(step);
                out.weighted_sum = factor * (out.weighted_sum + step * out.sum);
                out.sum *= factor;
            }
            max_so_far = block_max;
            out.shift = shift;
        }
        const F shift = set(out.shift);
        F s[kUnroll], a[kUnroll], t = shift;
        for (int u = 0; u < kUnroll; ++u) s[u] = a[u] = set(0.0f);
        int64_t j = 0;
        for (; j + kUnroll * kLanes <= count; j += kUnroll * kLanes) {
            for (int u = 0; u < kUnroll; ++u) {
                const F e = exponential<ENTROPY, CAP>(load(z + j + u * kLanes), shift, scale, t);
                s[u] = add(s[u], e);
                if (ENTROPY) a[u] = fma(e, t, a[u]);
            }
        }
        for (; j < count; j += kLanes) {
            const int rest = static_cast<int>(count - j);
            const F x = rest < kLanes ? load_first(z + j, rest, max_so_far) : load(z + j);
            F e = exponential<ENTROPY, CAP>(x, shift, scale, t);
            if (rest < kLanes) e = keep_first(e, rest);
            s[0] = add(s[0], e);
            if (ENTROPY) a[0] = fma(e, t, a[0]);
        }
        out.sum += total(add(add(s[0], s[1]), add(s[2], s[3])));
        if (ENTROPY) out.weighted_sum += total(add(add(a[0], a[1]), add(a[2], a[3])));
    }
    return out;
}

template <bool ENTROPY, bool CAP>
FASTPPO_INLINE F gradient_of(F z, F shift, F constant, F slope, const Scale& scale) {
    F tanh, t = shift;
    const F d = sub(capped<CAP>(z, scale, tanh), shift), k = set(scale.log2_scale);
    if (ENTROPY) t = max(set(-127.0f), mul(d, k));
    const F e = exp2_of(d, k);
    F g = mul(e, ENTROPY ? fma(slope, t, constant) : constant);
    if (CAP) g = mul(g, sub(set(1.0f), mul(tanh, tanh)));
    return g;
}

// dlogits may lie over logits: at the same addresses, or bfloat16 from the first byte of a float32 row on. Element j of
// dlogits then lies on or before element j of logits, which was read already, and never on one still to be read: the
// sweep must run forwards.
template <class In, class Out, bool ENTROPY, bool CAP>
void gradient_sweep(const void* logits, void* dlogits, int64_t vocab_size, const Scale& scale, const Gradient& given) {
    const In* z = static_cast<const In*>(logits);
    Out* out = static_cast<Out*>(dlogits);
    const F shift = set(given.shift), constant = set(given.constant), slope = set(given.slope);
    int64_t j = 0;
    for (; j + kUnroll * kLanes <= vocab_size; j += kUnroll * kLanes) {
        F x[kUnroll];
        for (int u = 0; u < kUnroll; ++u) x[u] = load(z + j + u * kLanes);
        for (int u = 0; u < kUnroll; ++u)
            store(out + j + u * kLanes, gradient_of<ENTROPY, CAP>(x[u], shift, constant, slope, scale));
    }
    for (; j < vocab_size; j += kLanes) {
        const int64_t rest = vocab_size - j;
        const int count = rest < kLanes ? static_cast<int>(rest) : kLanes;
        const F x = load_first(z + j, count, given.shift);
        store_first(out + j, count, gradient_of<ENTROPY, CAP>(x, shift, constant, slope, scale));
    }
}

}  // namespace

#define SUMS(In) {{sum_sweep<In, false, false>, sum_sweep<In, false, true>}, \
                  {sum_sweep<In, true, false>, sum_sweep<In, true, true>}}
#define GRADIENTS(In, Out) {{gradient_sweep<In, Out, false, false>, gradient_sweep<In, Out, false, true>}, \
                            {gradient_sweep<In, Out, true, false>, gradient_sweep<In, Out, true, true>}}

namespace fastppo {

extern const RowKernels FASTPPO_ISA;
const RowKernels FASTPPO_ISA = {
    {SUMS(float), SUMS(BFloat16)},
    {{GRADIENTS(float, float), GRADIENTS(float, BFloat16)}, {GRADIENTS(BFloat16, float), GRADIENTS(BFloat16, BFloat16)}},
};

}  // namespace fastppo
