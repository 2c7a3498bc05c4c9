// 2^x of vectors of float32, the only place in C++ where it is written. Internal linkage, as in simd.h.

#pragma once

#include "simd.h"

namespace {

// Adding kMagic rounds to an integer n, to nearest even, because the sum has an ulp of 1, and leaves n + 127 in the low
// bits of the sum: shifted left by 23 they are the float 2^n, and 0 for n = -127.
constexpr float kMagic = 12582912.0f + 127.0f;  // 1.5 * 2^23 + the exponent bias

// P_D(f) with 2^f = 1 + f P_D(f) for |f| <= 1/2: least maximum error of this form, coefficients rounded to float32. The
// relative error of 2^f is 1.2e-8 for D = 6, 1.0e-7 for 5 and 2.8e-6, far below an ulp of bfloat16, for 4.
template <int D>
FASTPPO_INLINE F exp2_polynomial(F f) {
    static_assert(D >= 4 && D <= 6, "no other degree was fitted");
    constexpr float c[3][6] = {
        {6.931241750717163e-1f, 2.402409762144089e-1f, 5.590643361210823e-2f, 9.582851082086563e-3f},
        {6.931470036506653e-1f, 2.402224391698837e-1f, 5.550732836127281e-2f, 9.671514853835106e-3f,
         1.326472731307149e-3f},
        {6.931471824645996e-1f, 2.402264624834061e-1f, 5.550333112478256e-2f, 9.618438780307770e-3f,
         1.339887385256589e-3f, 1.535336195956916e-4f},
    };
    F p = set(c[D - 4][D - 1]);
    for (int i = D - 2; i >= 0; --i) p = mul_add(p, f, set(c[D - 4][i]));
    return p;
}

// 2^(d k) for `least_exponent` <= d k <= 0 or so; 0 at the lower end. NaN stays NaN.
template <int D>
FASTPPO_INLINE F exp2_of(F d, F k) {
    const F r = mul_add(d, k, set(kMagic));
    const F f = mul_sub(d, k, sub(r, set(kMagic)));
    return mul(mul_add(exp2_polynomial<D>(f), f, set(1.0f)), exponent_bits(r));
}

}  // namespace
