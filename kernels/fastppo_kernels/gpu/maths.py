"""Device functions of the kernels over rows and tokens: exponentials, the soft-cap, and PPO's maths of one token.

Inside a row logarithms have base 2, because `exp2` is one instruction of the hardware and `exp` is not; what leaves a
kernel is in nats. Comparisons are written with `where`, not with min and max, wherever a NaN must stay one.
"""

# pyright: reportGeneralTypeIssues=false
# Triton's ranges are no Python iterators.

import triton
import triton.language as tl

from fastppo_kernels import reference
from fastppo_kernels.settings import KL_ESTIMATORS
from fastppo_kernels.table import PPO_COLUMNS

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.92596299e-8)  # log2(e) - float32(log2(e))
LN2 = tl.constexpr(0.6931471805599453)
EXPONENT_LIMIT = tl.constexpr(reference.EXPONENT_LIMIT)
NUM_COLUMNS = tl.constexpr(len(PPO_COLUMNS))
ESTIMATOR_CODES = {name: code for code, name in enumerate(KL_ESTIMATORS)}
K1, K2, K3, K1_PLUS, K3_PLUS = (tl.constexpr(ESTIMATOR_CODES[name]) for name in ("k1", "k2", "k3", "k1+", "k3+"))


@triton.jit
def exp(x):
    """e^x to about 2 ulp, |x| up to 80: what rounding x * log2(e) loses, 1e-6 at x = 20, is put back."""
    y = x * LOG2E
    lost = tl.fma(x, LOG2E, -y) + x * LOG2E_LOW
    return tl.exp2(y) * (lost * LN2 + 1.0)


@triton.jit
def tanh(x, rate, ACCURATE: tl.constexpr):
    """tanh(a x) with rate = -2 log2(e) a, a > 0: to 2 ulp if ACCURATE, else 3e-7 off at most.

    With e = exp(-2 |a x|) it is (1 - e) / (1 + e), where a squared reciprocal square root takes two instructions and
    a division ten. 1 - e cancels near 0: there a polynomial, fitted at the Chebyshev nodes of |a x| < 1/2, 2e-8 off.
    """
    u = tl.abs(x) * rate
    e = tl.exp2(u)
    r = tl.rsqrt(1.0 + e)
    magnitude = (1.0 - e) * (r * r)
    if ACCURATE:
        w = u * u
        q = w * 1.2365265e-06 + -3.1824089e-05
        q = q * w + 6.6625269e-04
        q = q * w + -1.3875918e-02
        q = q * w + 3.4657359e-01
        magnitude = tl.where(u > -1.4426950, -u * q, magnitude)
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def bounded(x):
    """x clamped to +-EXPONENT_LIMIT; NaN stays NaN."""
    return tl.where(x > EXPONENT_LIMIT, EXPONENT_LIMIT, tl.where(x < -EXPONENT_LIMIT, -EXPONENT_LIMIT, x))


@triton.jit
def scaled(coef, x):
    """coef * x, and 0 for the coefficient 0 whatever x is."""
    return tl.where(coef != 0.0, coef * x, 0.0)


@triton.jit
def expm1_and_k3(x):
    """(e^b - 1, e^b - 1 - x) with b = bounded(x): the slope and the value of k3(x) in reference.py.

    Below 1 the differences cancel: there the Taylor series of e^x - 1 - x runs to x^12 / 12!, 2e-10 off.
    """
    y = tl.where(tl.abs(x) < 1.0, x, 0.0)
    series = y * (1.0 / 12) + 1.0
    for n in tl.static_range(11, 2, -1):
        series = series * y * (1.0 / n) + 1.0
    small = 0.5 * y * y * series
    large = exp(bounded(x)) - 1.0
    near = tl.abs(x) < 1.0  # False for NaN, which goes the other way
    return tl.where(near, small + y, large), tl.where(near, small, large - x)


@triton.jit
def kl_penalty(logprob, ref_logprob, ESTIMATOR: tl.constexpr):
    """(value, slope) of the named estimate of KL(policy || reference), and (k1, k3) for the statistics."""
    k1 = logprob - ref_logprob
    expm1, k3 = expm1_and_k3(-k1)
    value, slope = k3, -expm1
    if ESTIMATOR == K1:
        value, slope = k1, tl.full(k1.shape, 1.0, tl.float32)
    if ESTIMATOR == K2:
        value, slope = 0.5 * k1 * k1, k1
    if ESTIMATOR == K1_PLUS:  # straight-through: the gradient of k2
        value, slope = k1, k1
    if ESTIMATOR == K3_PLUS:
        slope = k1
    return value, slope, k1, k3


@triton.jit
def ppo_token(
    logprob,  # float32, any shape, as is every tensor here
    entropy,  # 0 where it was not asked for
    old_logprob,  # `logprob` itself where there is none: ratio 1, slope that of the log-prob
    advantage,
    weight,
    ref_logprob,  # or None
    is_weight,  # or None
    sampler_logprob,  # or None
    settings,  # (clip_low, clip_high, dual_clip, kl_coef, old_kl_coef, entropy_coef); +inf switches a clip off
    ESTIMATOR: tl.constexpr,
):
    """The columns of PPO_COLUMNS, in their order, of live tokens: `reference.ppo_token_terms` and its derivative.

    What has the coefficient 0 is no part of the objective, even where it is infinite or NaN: a log-prob of -inf under
    the reference, given for the statistics alone, must not end the run.
    """
    clip_low, clip_high, dual_clip, kl_coef, old_kl_coef, entropy_coef = settings
    zero = tl.zeros_like(logprob)
    log_ratio = logprob - old_logprob
    ratio = exp(bounded(log_ratio))
    outside = (log_ratio > EXPONENT_LIMIT) | (log_ratio < -EXPONENT_LIMIT)  # a NaN is not: it stays in the slope
    low, high = 1.0 - clip_low, 1.0 + clip_high
    unclipped = -advantage * ratio
    pessimistic = -advantage * tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    clipped = pessimistic > unclipped
    policy = tl.where(clipped, pessimistic, unclipped)
    slope = tl.where(clipped | outside, 0.0, unclipped)
    bound = -dual_clip * advantage
    dual_clipped = (advantage < 0.0) & (policy > bound)
    policy, slope = tl.where(dual_clipped, bound, policy), tl.where(dual_clipped, 0.0, slope)
    if is_weight is not None:
        policy, slope = is_weight * policy, is_weight * slope
    old_slope, old_k3 = expm1_and_k3(log_ratio)
    kl, ref_k1, ref_k3 = zero, zero, zero
    slope += scaled(old_kl_coef, old_slope)
    if ref_logprob is not None:
        kl, kl_slope, ref_k1, ref_k3 = kl_penalty(logprob, ref_logprob, ESTIMATOR)
        kl, slope = scaled(kl_coef, kl), slope + scaled(kl_coef, kl_slope)
    gap = zero
    if sampler_logprob is not None:
        gap = tl.abs(logprob - sampler_logprob)
    return (
        weight * (policy + kl + scaled(old_kl_coef, old_k3) - scaled(entropy_coef, entropy)),
        weight * policy,
        weight * kl,
        logprob,
        entropy,
        ratio,
        log_ratio,
        old_k3,
        (clipped & (advantage < 0.0)).to(tl.float32),
        (clipped & (advantage > 0.0)).to(tl.float32),
        dual_clipped.to(tl.float32),
        ref_k1,
        ref_k3,
        gap,
        weight * slope,
        zero + 1.0,
    )


@triton.jit
def table_lines(column, live, terms):
    """`terms` side by side: term i stands where column == i, and 0 everywhere in a token that is not live."""
    lines = tl.where(column == 0, terms[0], 0.0)
    for i in tl.static_range(1, NUM_COLUMNS):
        lines = tl.where(column == i, terms[i], lines)
    return tl.where(live, lines, 0.0)
