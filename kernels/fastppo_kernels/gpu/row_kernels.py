"""The Triton kernel over rows of logits: log-probability, entropy, the whole PPO objective and its gradient.

    z = softcap * tanh(x / softcap) / T      log p_y = z_y - log sum_v exp z_v      H = -sum_v p_v log p_v
    d/dx_v = (g ([v = y] - p_v) - h p_v (log p_v + H)) (1 - tanh^2) / T             for d log p_y = g and dH = h

One sweep over the row makes its statistics, a second one its gradient. The first keeps a running (maximum, sum,
entropy sum) in one lane per thread, so a column costs little more than one exponential (a maximum per column costs
two), and crosses lanes once, at the end. Blocks that lie inside the row carry no mask: their loads and stores stay 16
bytes wide whatever the vocabulary size, as long as rows start at multiples of 16 bytes.

A program holds a row, or one of SLICES slices of it when rows are few. Lanes are reduced within a slice first and then
over slices, in both cases, so that the numbers of a row do not depend on how many rows there are. They may differ by
rounding between rows that start at multiples of 16 bytes and rows that do not, whose lanes are laid out otherwise.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# What `@triton.jit` compiles is not Python's type system: constants pick branches, and ranges are no iterators.

import triton
import triton.language as tl

from fastppo_kernels.gpu.maths import LN2, NUM_COLUMNS, ppo_token, table_lines, tanh

EMPTY = tl.constexpr(-8.5e37)  # reference point of a lane that saw nothing: finite, so differences are no NaN
FAR = tl.constexpr(-200.0)  # a power of two that is 0 in float32: 0 * FAR is 0 where 0 * -inf is NaN
DLOGPROB = tl.constexpr(14)  # column of the table


@triton.jit
def _capped(x, softcap_rate, SOFTCAP: tl.constexpr, ACCURATE: tl.constexpr = True):
    y = x.to(tl.float32)
    return tanh(y, softcap_rate, ACCURATE) if SOFTCAP else y


@triton.jit
def _halves(x):
    x = tl.reshape(x, [2, x.shape[0] // 2, x.shape[1], x.shape[2]])
    return tl.split(tl.permute(x, [1, 2, 3, 0]))


@triton.jit
def _chained(x, y, total):
    """total + the sum of x * y over the first axis, one multiply-add after the other."""
    if x.shape[0] == 1:
        return tl.fma(x, y, total)
    else:
        x0, x1 = _halves(x)
        y0, y1 = _halves(y)
        return _chained(x1, y1, _chained(x0, y0, total))


@triton.jit
def _sum_of_products(x, y):
    """Sum of x * y, (REPS, LANES, LANE), over the first and last axis.

    `tl.sum` adds pairs of products, 3 instructions for 2 columns where a chain takes 2. Eight float32 reps chained
    would not fit 64 registers, which is what the assembler grants some of the kernels.
    """
    if x.shape[0] <= 4:
        x = _chained(x, y, tl.zeros([1, x.shape[1], x.shape[2]], tl.float32))
    else:
        x *= y
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _add_block(y, c, s, a, scale, LANE: tl.constexpr, ENTROPY: tl.constexpr):
    """Adds a (REPS, WIDTH) block to the lanes: s = sum 2^d, a = sum 2^d d with d = y * scale - c.

    c is the lane's maximum of y * scale, rounded; the fused multiply-add rounds d once, so that a common offset of the
    logits costs no accuracy however large it is. `a` is relative to c as well: the entropy never cancels against it.
    """
    y = tl.reshape(y, [y.shape[0], y.shape[1] // LANE, LANE])
    new = tl.maximum(c, tl.max(tl.max(y, axis=2), axis=0) * scale)
    fall = c - new
    shrink = tl.exp2(fall)
    d = tl.fma(y, scale, -new[None, :, None])
    e = tl.exp2(d)
    if ENTROPY:
        a = shrink * tl.fma(fall, s, a) + _sum_of_products(e, tl.maximum(d, FAR))
    s = tl.fma(s, shrink, tl.sum(tl.sum(e, axis=2), axis=0))
    return new, s, a


@triton.jit
def _merged(c, s, a, AXIS: tl.constexpr):
    """Lanes (c, s, a) merged along AXIS, the last one."""
    top = tl.max(c, axis=AXIS)
    d = c - tl.expand_dims(top, AXIS)
    shrink = tl.exp2(d)
    return top, tl.sum(s * shrink, axis=AXIS), tl.sum(shrink * tl.fma(d, s, a), axis=AXIS)


@triton.jit
def _tail(x_row, n_cols, cols, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """(block, mask, offsets) of what the full blocks leave over.

    Read up to the next multiple of 16 bytes, which the aligned row start keeps inside the allocation's last 16 bytes:
    the mask then has one value per 16 bytes and the loads stay wide.
    """
    offs = n_cols // BLOCK * BLOCK + cols
    x = tl.load(x_row + offs, mask=offs < (n_cols + UNIT - 1) // UNIT * UNIT, other=-float("inf"))
    return x, offs < n_cols, offs


@triton.jit
def _statistics(
    x_row, n_cols, cols, scale, softcap_rate, EVICT: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr, LANE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Lanes (c, s, a), (WIDTH / LANE,) each, of this program's columns."""
    c = tl.full([cols.shape[1] // LANE], EMPTY, tl.float32)
    s = tl.zeros([cols.shape[1] // LANE], tl.float32)
    a = tl.zeros([cols.shape[1] // LANE], tl.float32)
    n_full = n_cols // BLOCK * BLOCK
    block = x_row + cols  # carried by the loop: the layout then follows this load alone, LANE columns to a thread
    for _ in tl.range(0, n_full, BLOCK, num_stages=STAGES):
        y = _capped(tl.load(block, eviction_policy=EVICT), softcap_rate, SOFTCAP)
        block += BLOCK
        c, s, a = _add_block(y, c, s, a, scale, LANE, ENTROPY)
    if n_full < n_cols:
        x, inside, offs = _tail(x_row, n_cols, cols, UNIT, BLOCK)
        y = tl.where(inside, _capped(x, softcap_rate, SOFTCAP), -float("inf"))
        c, s, a = _add_block(y, c, s, a, scale, LANE, ENTROPY)
    return c, s, a


@triton.jit
def _softmax_slope(
    x, c, scale, softcap_rate, c0, c1, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Gradient at columns x without the target's own term: 2^d (c0 + c1 d), times the slope of the soft-cap."""
    y = _capped(x, softcap_rate, SOFTCAP, DTYPE.primitive_bitwidth == 32)  # 2 bytes cannot tell
    d = tl.fma(y, scale, -c)
    dx = tl.exp2(d)
    if ENTROPY:
        dx *= tl.fma(tl.maximum(d, FAR), c1, c0)
    else:
        dx *= c0
    if SOFTCAP:
        dx *= 1.0 - y * y
    return dx


@triton.jit
def _arrived(x):
    """True whatever the block x holds, but a value: no thread has it before every thread has its part of x."""
    return tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0) <= 1


@triton.jit
def _gradient(
    x_row, dx_row, n_cols, cols, c, scale, softcap_rate, c0, c1, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
    OVERLAP: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes `_softmax_slope` of this program's columns.

    In place, dx column j lies on x column j, which the same block has read. With OVERLAP a 2-byte dx lies on a 4-byte
    x: dx column j covers half of x column j // 2. The stores of block b (columns bB to (b+1)B) then touch x columns
    below (b+1)B/2 <= max(bB, B/2): in blocks up to b - 1, or in block 0 for b = 0. Ahead of them comes a barrier, and
    ahead of that every thread has used its columns of block b - 1, to store them; so no store meets a column that is
    still to be read. Block 0, and the tail if it is the first block, are stored over themselves: a barrier does not
    say that loads ahead of it have arrived, on AMD they may be under way. So the tail's stores wait for `_arrived`; for
    block 0 the compiler waits ahead of the first barrier, to load block 1, and the gate sees to it that it does.
    """
    n_full = n_cols // BLOCK * BLOCK
    DTYPE: tl.constexpr = dx_row.dtype.element_ty
    if OVERLAP:  # a pipeline through shared memory admits no barrier of ours: one block ahead, in registers
        ahead = tl.load(x_row + cols, mask=cols < n_full, other=0.0, eviction_policy="evict_first")
        for start in range(0, n_full, BLOCK):
            x = ahead
            following = start + BLOCK
            ahead = tl.load(
                x_row + following + cols, mask=cols < n_full - following, other=0.0, eviction_policy="evict_first"
            )
            tl.debug_barrier()
            dx = _softmax_slope(x, c, scale, softcap_rate, c0, c1, ENTROPY, SOFTCAP, DTYPE)
            tl.store(dx_row + start + cols, dx.to(DTYPE))
    else:
        x_at, dx_at = x_row, dx_row
        for _ in tl.range(0, n_full, BLOCK, num_stages=STAGES):
            x = tl.load(x_at + cols, eviction_policy="evict_first")
            dx = _softmax_slope(x, c, scale, softcap_rate, c0, c1, ENTROPY, SOFTCAP, DTYPE)
            tl.store(dx_at + cols, dx.to(DTYPE))
            x_at += BLOCK
            dx_at += BLOCK
    if n_full < n_cols:
        x, inside, offs = _tail(x_row, n_cols, cols, UNIT, BLOCK)
        if OVERLAP:
            inside = inside & _arrived(x)
        dx = _softmax_slope(x, c, scale, softcap_rate, c0, c1, ENTROPY, SOFTCAP, DTYPE)
        tl.store(dx_row + offs, dx.to(DTYPE), mask=inside)


@triton.jit
def _write_zeros(dx_row, n_cols, cols, BLOCK: tl.constexpr):
    for start in range(0, n_cols, BLOCK):
        offs = start + cols
        tl.store(dx_row + offs, tl.zeros(cols.shape, dx_row.dtype.element_ty), mask=offs < n_cols)


@triton.jit
def _exists(column, n_cols):
    """Asked again wherever it matters: an answer kept through a sweep costs it registers."""
    return (column >= 0) & (column < n_cols)


@triton.jit
def _load_or_none(ptr, row):
    if ptr is None:
        return None
    else:
        return tl.load(ptr + row)


@triton.jit(do_not_specialize=["x_units", "dx_units"])
def rows_kernel(
    x_ptr,  # (R, V) logits, rows of x_units * X_UNIT elements
    dx_ptr,  # (R, V) their gradient, or None; may be x_ptr
    targets_ptr,  # (R,) int64; one outside [0, n_cols) makes NaN of its row, unless the row is dead
    partials_ptr,  # (R, SLICES, 4) float32: c, s, a of a slice and the target's logit; None if PART is "whole"
    table_ptr,  # (R, 16) float32, or None: the PPO objective, of the seven (R,) float32 vectors that follow
    weights_ptr, advantages_ptr, old_ptr, ref_ptr, is_ptr, sampler_ptr,
    logprobs_ptr,  # (R,) float32, or None: only log-probs
    entropy_ptr,  # (R,) float32, or None
    dlogprobs_ptr,  # (R,) float32, or None: only the gradient, of these given slopes
    dentropy_ptr,  # (R,) float32, or None
    x_units, dx_units, n_cols,
    scale,  # log2(e) * softcap / T, or log2(e) / T without a soft-cap
    softcap_rate,  # -2 log2(e) / softcap
    inv_temperature,
    clip_low, clip_high, dual_clip, kl_coef, old_kl_coef, entropy_coef,
    ESTIMATOR: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, OVERLAP: tl.constexpr,
    X_UNIT: tl.constexpr, DX_UNIT: tl.constexpr, LANE: tl.constexpr, REPS: tl.constexpr, ROW: tl.constexpr,
    SLICES: tl.constexpr, STAGES: tl.constexpr,
    PART: tl.constexpr,  # "whole"; or "statistics" of a slice, then the "gradient" of a slice or the "result"
):  # fmt: skip
    BLOCK: tl.constexpr = REPS * ROW
    NUM_PARTS: tl.constexpr = SLICES if PART == "statistics" or PART == "gradient" else 1
    WIDTH: tl.constexpr = ROW // NUM_PARTS
    row = (tl.program_id(0) // NUM_PARTS).to(tl.int64)
    part = tl.program_id(0) % NUM_PARTS
    cols = tl.arange(0, REPS)[:, None] * ROW + part * WIDTH + tl.arange(0, WIDTH)[None, :]
    x_row = x_ptr + row * x_units * X_UNIT

    # Slopes of the result with respect to log-prob and entropy, where they are given; and rows that do not count.
    weight = _load_or_none(weights_ptr, row)
    g = _load_or_none(dlogprobs_ptr, row)
    h = _load_or_none(dentropy_ptr, row)
    dead = False
    if table_ptr is not None:
        dead = weight == 0.0
    if dlogprobs_ptr is not None:
        dead = g == 0.0
        if dentropy_ptr is not None:
            dead = dead & (h == 0.0)
    column = tl.arange(0, NUM_COLUMNS)
    if dead:
        if PART != "statistics":
            if table_ptr is not None:
                tl.store(table_ptr + row * NUM_COLUMNS + column, tl.zeros([NUM_COLUMNS], tl.float32))
            if dx_ptr is not None:
                _write_zeros(dx_ptr + row * dx_units * DX_UNIT, n_cols, cols, BLOCK)
        return

    target = tl.load(targets_ptr + row)
    if PART == "whole" or PART == "statistics":
        EVICT: tl.constexpr = "evict_first" if dx_ptr is None and PART == "whole" else "evict_last"
        c, s, a = _statistics(
            x_row, n_cols, cols, scale, softcap_rate, EVICT, ENTROPY, SOFTCAP, X_UNIT, LANE, BLOCK, STAGES
        )
        HERE: tl.constexpr = SLICES // NUM_PARTS
        c = tl.reshape(c, [HERE, WIDTH // LANE // HERE])
        c, s, a = _merged(c, tl.reshape(s, c.shape), tl.reshape(a, c.shape), 1)
        x_target = tl.load(x_row + target, mask=_exists(target, n_cols), other=float("nan")).to(tl.float32)
    line = partials_ptr + (row * SLICES + part) * 4 if partials_ptr is not None else None
    if PART == "statistics":
        first = tl.arange(0, 1)
        tl.store(line + first, c)
        tl.store(line + 1 + first, s)
        tl.store(line + 2 + first, a)
        tl.store(line + 3, x_target)
        return
    if PART == "gradient" or PART == "result":
        lines = partials_ptr + (row * SLICES + tl.arange(0, SLICES)) * 4
        c, s, a = tl.load(lines), tl.load(lines + 1), tl.load(lines + 2)
        x_target = tl.load(partials_ptr + row * SLICES * 4 + 3)
    c, s, a = _merged(c, s, a, 0)

    y_target = _capped(x_target, softcap_rate, SOFTCAP)
    d_target = tl.fma(y_target, scale, -c)
    log2_s = tl.log2(s)
    logprob = (d_target - log2_s) * LN2
    entropy = (log2_s - a / s) * LN2 if ENTROPY else tl.zeros_like(logprob)
    if table_ptr is not None:
        old = logprob
        if old_ptr is not None:
            old = tl.load(old_ptr + row)
        terms = ppo_token(
            logprob, entropy, old, tl.load(advantages_ptr + row), weight, _load_or_none(ref_ptr, row),
            _load_or_none(is_ptr, row), _load_or_none(sampler_ptr, row),
            (clip_low, clip_high, dual_clip, kl_coef, old_kl_coef, entropy_coef), ESTIMATOR,
        )  # fmt: skip
        if part == 0:
            tl.store(table_ptr + row * NUM_COLUMNS + column, table_lines(column, True, terms))
        g = terms[DLOGPROB]
        h = -entropy_coef * weight
    if logprobs_ptr is not None:
        tl.store(logprobs_ptr + row, logprob)
        if ENTROPY:
            tl.store(entropy_ptr + row, entropy)
    if dx_ptr is not None:
        # -(g + h H) p - h p log p, with p = 2^d / s and log2 p = d - log2 s
        g = tl.where(_exists(target, n_cols), g, float("nan")) * inv_temperature
        c0, c1 = -g / s, tl.zeros_like(g)
        if ENTROPY:
            h = h * inv_temperature
            c1 = -h * LN2 / s
            c0 = -(g + h * (entropy - log2_s * LN2)) / s
        dx_row = dx_ptr + row * dx_units * DX_UNIT
        tl.debug_barrier()  # every thread has read the target's logit, and nothing has been written yet
        _gradient(
            x_row, dx_row, n_cols, cols, c, scale, softcap_rate, c0, c1,
            ENTROPY, SOFTCAP, OVERLAP, X_UNIT, BLOCK, STAGES,
        )  # fmt: skip
        tl.debug_barrier()  # the sweep has written the target's column; once more, with its own term
        at_target = tl.exp2(d_target) * tl.fma(tl.maximum(d_target, FAR), c1, c0) + g
        if SOFTCAP:
            at_target *= 1.0 - y_target * y_target
        mine = _exists(target, n_cols) & (target % ROW // WIDTH == part)
        tl.store(dx_row + target, at_target.to(dx_ptr.dtype.element_ty), mask=mine)
