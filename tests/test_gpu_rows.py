"""Laws of the Triton kernels over rows and tokens: in Triton's interpreter on the CPU, for real on a GPU."""

import ast
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import gpu, reference
from fastppo_kernels.gpu import launch
from fastppo_kernels.gpu import rows as launcher
from fastppo_kernels.gpu.row_kernels import rows_kernel
from fastppo_kernels.gpu.rows import _row_units
from fastppo_kernels.gpu.shapes import LaunchShape, launch_shape, splits_rows
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import KL_ESTIMATORS, HeadSettings, PPOSettings
from fastppo_kernels.table import PPO_COLUMNS, ppo_table
from numerics import DEVICE, assert_as_accurate, guarded

# numpy interprets the kernels where there is no GPU, and warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LARGE = 33001  # odd, and two blocks and a tail of either type
COLUMN = {name: i for i, name in enumerate(PPO_COLUMNS)}


def ppo_settings(chosen: dict[str, Any]) -> PPOSettings:
    return PPOSettings(**chosen)


def doubled(rows: PPORows) -> PPORows:
    return rows.cleaned(rows.weights != 0, torch.float64)


SETTINGS = st.fixed_dictionaries(
    {
        "clip_low": st.sampled_from([0.2, 0.0, math.inf]),
        "clip_high": st.sampled_from([0.2, 0.28, math.inf]),
        "dual_clip": st.sampled_from([None, 1.5]),
        "kl_coef": st.sampled_from([0.0, 0.3]),
        "kl_estimator": st.sampled_from(KL_ESTIMATORS),
        "entropy_coef": st.sampled_from([0.0, 0.1]),
        "old_kl_coef": st.sampled_from([0.0, 0.2]),
    }
).map(ppo_settings)
HEAD = st.sampled_from([(1.0, None), (0.6, None), (1.0, 30.0), (0.6, 4.0)]).map(
    lambda pair: HeadSettings(temperature=pair[0], softcap=pair[1])
)
PLAIN = HeadSettings()
FULL = PPOSettings(kl_coef=0.1, entropy_coef=0.05, old_kl_coef=0.1, dual_clip=2.0)


class Problem(NamedTuple):
    logits: Tensor
    targets: Tensor
    rows: PPORows


def problem(
    R: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    *,
    head: HeadSettings = PLAIN,
    padding: int = 0,
    dead: bool = True,
) -> Problem:
    """Logits whose rows are `padding` elements apart and end in NaN; old log-probs near; row 1 dead and full of NaN."""
    logits = guarded((2 * torch.randn(R, V + padding, device=DEVICE)).to(dtype))[:, :V]
    targets = torch.randint(V, (R,), device=DEVICE)
    logprobs = reference.logits_token_logprobs(logits, targets, head, entropy=False)[0]
    constants = [logprobs + 0.4 * torch.randn_like(logprobs) for _ in range(3)]
    advantages, weights = torch.randn(R, device=DEVICE), torch.rand(R, device=DEVICE) + 0.1
    rows = PPORows(constants[0], advantages, weights, constants[1], torch.rand(R, device=DEVICE), constants[2])
    if dead and R > 1:
        logits[1] = math.nan
        rows = PPORows(*(x.index_fill(0, torch.tensor([1], device=DEVICE), math.nan) for x in rows if x is not None))
        rows.weights[1], targets[1] = 0.0, 10**9
    return Problem(logits, targets, rows)


def expected(p: Problem, s: PPOSettings, head: HeadSettings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(table, dlogits) of the reference in `dtype`, dead rows 0."""
    live = p.rows.weights != 0
    x = torch.where(live[:, None], p.logits, 0).to(dtype).requires_grad_()
    rows = p.rows.cleaned(live, dtype)
    logprobs, entropy = reference.logits_token_logprobs(x, torch.where(live, p.targets, 0), head)
    loss, _ = reference.ppo_loss(logprobs, rows, s, entropy)
    return ppo_table(logprobs, entropy, rows, s), torch.autograd.grad(loss, x)[0]


def buffer(p: Problem, where: str) -> Tensor:
    """Memory for the gradient: fresh, the logits' own, or a 2-byte view of that."""
    if where == "fresh":
        return torch.empty_like(p.logits)
    if where == "fresh, bfloat16":
        return torch.empty_like(p.logits, dtype=torch.bfloat16)
    if where == "in place":
        return p.logits
    R, V = p.logits.shape
    stride = p.logits.stride(0) * p.logits.element_size() // 2
    whole = torch.as_strided(p.logits, (p.logits.untyped_storage().nbytes() // p.logits.element_size(),), (1,), 0)
    return whole.view(torch.bfloat16).as_strided((R, V), (stride, 1), 0)


def run(p: Problem, s: PPOSettings, head: HeadSettings, where: str = "fresh", **kwargs: Any) -> tuple[Tensor, Tensor]:
    p = p._replace(logits=copied(p.logits))
    dlogits = buffer(p, where)
    return gpu.ppo_rows(p.logits, p.targets, p.rows, s, head, entropy=True, dlogits=dlogits, **kwargs), dlogits


def copied(x: Tensor) -> Tensor:
    """A copy of `x` with its strides, NaN in the columns between rows and after the last."""
    stride = x.stride(0)
    whole = torch.full((x.shape[0] * stride + 64,), math.nan, dtype=x.dtype, device=x.device)
    view = whole.as_strided(x.shape, (stride, 1))
    view.copy_(x)
    return view


@settings(max_examples=80)
@given(
    s=SETTINGS,
    head=HEAD,
    V=st.sampled_from([1, 5, 127]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    where=st.sampled_from(["fresh", "fresh, bfloat16", "in place", "half"]),
    padding=st.sampled_from([0, 1, 8]),
    present=st.integers(0, 15),
)
def test_table_and_gradient_answer_to_float64(
    s: PPOSettings, head: HeadSettings, V: int, dtype: torch.dtype, where: str, padding: int, present: int
) -> None:
    p = problem(3, V, dtype, head=head, padding=padding)
    old, advantages, weights, *optional = p.rows
    given_ = [x if present >> i & 1 else None for i, x in enumerate((old, *optional))]
    if given_[1] is None:
        s = PPOSettings(clip_low=s.clip_low, entropy_coef=s.entropy_coef, old_kl_coef=s.old_kl_coef)
    p = p._replace(rows=PPORows(given_[0], advantages, weights, *given_[1:]))
    table, dlogits = run(p, s, head, "in place" if where == "half" and dtype != torch.float32 else where)
    (base_table, base), (true_table, truth) = expected(p, s, head, torch.float32), expected(p, s, head, torch.float64)
    for name, i in COLUMN.items():
        assert_as_accurate(name, table[:, i], base_table[:, i], true_table[:, i], atol=1e-6)
    assert_as_accurate("dlogits", dlogits, base.to(dlogits.dtype), truth, atol=1e-7)
    assert table[1].eq(0).all() and dlogits[1].eq(0).all()


@pytest.mark.parametrize("where", ["fresh, bfloat16", "in place", "half"])
def test_rows_of_several_blocks_answer_to_float64(where: str) -> None:
    head = HeadSettings(temperature=0.6)
    p = problem(3, LARGE, head=head, padding=7)
    table, dlogits = run(p, FULL, head, where)
    (base_table, base), (true_table, truth) = (
        expected(p, FULL, head, torch.float32),
        expected(p, FULL, head, torch.float64),
    )
    for name, i in COLUMN.items():
        assert_as_accurate(name, table[:, i], base_table[:, i], true_table[:, i], atol=1e-6)
    assert_as_accurate("dlogits", dlogits, base.to(dlogits.dtype), truth)


def test_vocabulary_of_32000_answers_to_float64() -> None:
    p = problem(1, 32000, torch.bfloat16)
    table, dlogits = run(p, FULL, PLAIN)
    (base_table, base), (true_table, truth) = (
        expected(p, FULL, PLAIN, torch.float32),
        expected(p, FULL, PLAIN, torch.float64),
    )
    assert_as_accurate("table", table, base_table, true_table)
    assert_as_accurate("dlogits", dlogits, base.to(dlogits.dtype), truth)


def test_log_prob_over_128256_columns_errs_by_5e_6_at_most() -> None:
    logits, targets = 3 * torch.randn(1, 128256, device=DEVICE), torch.tensor([77], device=DEVICE)
    made, entropy = gpu.logprob_rows(logits, targets, PLAIN, entropy=True)
    truth, true_entropy = reference.logits_token_logprobs(logits.double(), targets, PLAIN)
    assert entropy is not None and true_entropy is not None
    assert (made - truth).abs().max() <= 5e-6 and (entropy - true_entropy).abs().max() <= 5e-6


@pytest.mark.parametrize("offset", [150.0, -150.0, 1e4, -1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_common_offset_of_the_logits_changes_nothing(offset: float, temperature: float) -> None:
    """Multiples of 1/8, so that the shifted logits are exact in float32."""
    logits, targets = torch.randint(-64, 64, (2, 301), device=DEVICE) / 8.0, torch.tensor([3, 300], device=DEVICE)
    head = HeadSettings(temperature=temperature)
    slopes = (torch.tensor([1.0, -2.0], device=DEVICE), torch.tensor([0.3, 0.1], device=DEVICE))
    made = []
    for x in (logits, logits + offset):
        dlogits = torch.empty_like(x)
        gpu.logprob_rows_backward(x, targets, *slopes, head, dlogits=dlogits)
        made.append((*gpu.logprob_rows(x, targets, head, entropy=True), dlogits))
    for still, shifted in zip(*made, strict=True):
        assert still is not None and shifted is not None
        assert (still - shifted).abs().max() <= 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns_at_minus_infinity_do_not_exist(dtype: torch.dtype) -> None:
    """Whole lanes of them, the first lane among them, and every lane but one in part."""
    V, kept = 300, torch.cat([torch.arange(20, 130), torch.arange(200, 300, 7)]).to(DEVICE)
    p = problem(2, V, dtype, dead=False)
    p = p._replace(targets=kept[torch.tensor([0, 50], device=DEVICE)])
    holes = torch.ones(V, dtype=torch.bool, device=DEVICE).index_fill(0, kept, False)
    p.logits[:, holes] = -math.inf
    narrow = p._replace(logits=p.logits[:, kept].contiguous(), targets=torch.tensor([0, 50], device=DEVICE))
    table, dlogits = run(p, FULL, PLAIN)
    expected_table, expected_dlogits = expected(narrow, FULL, PLAIN, torch.float64)
    assert dlogits[:, holes].eq(0).all()
    torch.testing.assert_close(table.double(), expected_table, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(
        dlogits[:, kept].double(), expected_dlogits, atol=1e-6, rtol=2e-6 if dtype == torch.float32 else 8e-3
    )


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_nan_in_a_live_row_is_not_hidden_and_stays_in_its_row(softcap: float | None) -> None:
    p, head = problem(3, 127, dead=False), HeadSettings(softcap=softcap)
    clean_table, clean = run(p, FULL, head)
    p.logits[1, 126] = math.nan
    table, dlogits = run(p, FULL, head)
    assert table[1, COLUMN["logprob"]].isnan() and table[1, COLUMN["loss"]].isnan() and dlogits[1].isnan().all()
    assert table[1, COLUMN["entropy"]].isnan() and table[1, COLUMN["ratio"]].isnan()
    for i in (0, 2):
        assert torch.equal(table[i], clean_table[i]) and torch.equal(dlogits[i], clean[i])


@pytest.mark.parametrize("where", ["fresh", "in place", "half"])
@pytest.mark.parametrize(("V", "split"), [(127, False), (LARGE, False), (LARGE, True)])
def test_a_target_outside_makes_nan_of_its_row_and_touches_no_other(V: int, split: bool, where: str) -> None:
    """-100 is what other libraries call a label to be left out. Columns of the row before, of the one after, beyond."""
    p = problem(3, V, padding=8, dead=False)
    clean_table, clean = run(p, FULL, PLAIN, where, split=split)
    for target in (-100, V, V + 8 + 3, 10**12, -(10**12)) if V == 127 else (-100, V + 8 + 3):
        q = p._replace(targets=p.targets.index_fill(0, torch.tensor([1], device=DEVICE), target))
        table, dlogits = run(q, FULL, PLAIN, where, split=split)
        assert table[1, [COLUMN["loss"], COLUMN["logprob"], COLUMN["ratio"]]].isnan().all() and dlogits[1].isnan().all()
        assert torch.equal(table[[0, 2]], clean_table[[0, 2]]) and torch.equal(dlogits[[0, 2]], clean[[0, 2]])
        assert table[1, COLUMN["entropy"]] == clean_table[1, COLUMN["entropy"]]


@pytest.mark.parametrize(("V", "split"), [(127, False), (LARGE, True)])
def test_a_target_outside_has_no_log_prob_and_no_gradient(V: int, split: bool) -> None:
    """Not even that of the number between this row and the next."""
    p, slopes = problem(3, V, padding=8, dead=False), torch.ones(3, device=DEVICE)
    clean, _ = gpu.logprob_rows(p.logits, p.targets, PLAIN, entropy=True, split=split)
    wanted, found = torch.empty_like(p.logits), torch.empty_like(p.logits)
    gpu.logprob_rows_backward(p.logits, p.targets, slopes, slopes, PLAIN, dlogits=wanted, split=split)
    for target in (-100, V):
        targets = p.targets.index_fill(0, torch.tensor([1], device=DEVICE), target)
        made, entropy = gpu.logprob_rows(p.logits, targets, PLAIN, entropy=True, split=split)
        assert entropy is not None and made[1].isnan() and entropy.isfinite().all()
        gpu.logprob_rows_backward(p.logits, targets, slopes, slopes, PLAIN, dlogits=found, split=split)
        assert torch.equal(made[[0, 2]], clean[[0, 2]])
        assert found[1].isnan().all() and torch.equal(found[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("V", [127, LARGE])
def test_where_the_gradient_lies_does_not_change_it(V: int) -> None:
    p = problem(2, V, dead=False)
    table, fresh = run(p, FULL, PLAIN)
    half_table, half = run(p, FULL, PLAIN, "half")
    for other_table, other, wanted in (
        (*run(p, FULL, PLAIN, "in place"), fresh),
        (half_table, half, run(p, FULL, PLAIN, "fresh, bfloat16")[1]),
    ):
        assert torch.equal(other_table, table) and torch.equal(other, wanted)


@pytest.mark.parametrize("where", ["in place", "half"])
@pytest.mark.parametrize("padding", [3, 8])
def test_nothing_is_written_between_the_rows(where: str, padding: int) -> None:
    p = problem(3, 127 + 2, padding=padding)
    logits = copied(p.logits)
    dlogits = buffer(p._replace(logits=logits), where)
    gpu.ppo_rows(logits, p.targets, p.rows, FULL, PLAIN, entropy=True, dlogits=dlogits)
    rows = torch.as_strided(logits, (3, logits.stride(0)), (logits.stride(0), 1))
    assert rows[:, 129:].isnan().all()
    assert dlogits.isfinite().all()


def test_number_of_rows_and_of_programs_per_row_changes_no_bit() -> None:
    p = problem(4, LARGE, torch.bfloat16)
    table, dlogits = run(p, FULL, PLAIN, split=False)
    shared_table, shared = run(p, FULL, PLAIN, split=True)
    assert torch.equal(table, shared_table) and torch.equal(dlogits, shared)
    one = slice(2, 3)
    alone = Problem(p.logits[one], p.targets[one], p.rows.take(one))
    for split in (False, True):
        table_alone, dlogits_alone = run(alone, FULL, PLAIN, split=split)
        assert torch.equal(table_alone[0], table[2]) and torch.equal(dlogits_alone[0], dlogits[2])


@pytest.mark.parametrize(("V", "dtype"), [(127, torch.float32), (127, torch.bfloat16), (LARGE, torch.float32)], ids=str)
def test_scored_log_probs_give_ratio_one_exactly(V: int, dtype: torch.dtype) -> None:
    """Whichever kernel scored them: with or without entropy, split or not, the update computes the same bits."""
    p, head = problem(2, V, dtype, dead=False), HeadSettings(temperature=0.6)
    for split in (False, True):
        for entropy in (False, True):
            old, _ = gpu.logprob_rows(p.logits, p.targets, head, entropy=entropy, split=split)
            q = p._replace(rows=p.rows._replace(old_logprobs=old))
            table, _ = run(q, PPOSettings(), head, "fresh, bfloat16")
            assert table[:, COLUMN["ratio"]].eq(1).all() and table[:, COLUMN["log_ratio"]].eq(0).all()


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_backward_is_the_gradient_of_log_prob_and_entropy(with_entropy: bool, split: bool) -> None:
    p, head = problem(3, LARGE if split else 127, dead=False), HeadSettings(temperature=0.7, softcap=8.0)
    slopes = [torch.tensor([1.0, 0.0, -2.0], device=DEVICE), torch.tensor([0.5, 0.0, 0.0], device=DEVICE)]
    p.logits[1] = math.nan  # no slope, so not read
    made = torch.empty_like(p.logits)
    dentropy = slopes[1] if with_entropy else None
    gpu.logprob_rows_backward(p.logits, p.targets, slopes[0], dentropy, head, dlogits=made, split=split)
    assert made[1].eq(0).all()
    grads = []
    for dtype in (torch.float32, torch.float64):
        x = p.logits.nan_to_num(0.0).to(dtype).requires_grad_()
        logprobs, entropy = reference.logits_token_logprobs(x, p.targets, head)
        assert entropy is not None
        total = (slopes[0] * logprobs).sum() + (slopes[1] * entropy if with_entropy else 0 * entropy).sum()
        grads.append(torch.autograd.grad(total, x)[0])
    assert_as_accurate("dlogits", made, *grads)


@settings(max_examples=40)
@given(s=SETTINGS, present=st.integers(0, 15), with_entropy=st.booleans(), R=st.sampled_from([1, 3, 63, 130]))
def test_tokens_answer_to_float64(s: PPOSettings, present: int, with_entropy: bool, R: int) -> None:
    logprobs = -3 * torch.rand(R, device=DEVICE)
    vectors = [logprobs + torch.randn_like(logprobs) * scale for scale in (0.4, 0.5, 0.1)]
    given_ = [x if present >> i & 1 else None for i, x in enumerate((*vectors, torch.rand_like(logprobs)))]
    if given_[1] is None:
        s = PPOSettings(clip_high=s.clip_high, entropy_coef=s.entropy_coef, dual_clip=s.dual_clip)
    weights = torch.where(torch.rand_like(logprobs) < 0.2, 0, torch.rand_like(logprobs))
    rows = PPORows(given_[0], torch.randn_like(logprobs), weights, given_[1], given_[3], given_[2])
    entropy = torch.rand_like(logprobs) if with_entropy else None
    made = gpu.ppo_tokens(logprobs, entropy, rows, s)
    truth = ppo_table(logprobs.double(), None if entropy is None else entropy.double(), doubled(rows), s)
    base = ppo_table(logprobs, entropy, rows, s)
    for name, i in COLUMN.items():
        assert_as_accurate(name, made[:, i], base[:, i], truth[:, i])


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("x", [30.0, -30.0, 200.0, 20.0, -20.0, 1.0, 0.999, 1e-3, 0.0])
def test_far_and_near_log_ratios(x: float, estimator: str) -> None:
    """Beyond +-20 the ratio has no slope and k3 keeps the slope it has there; near 0 k3 does not cancel."""
    logprobs, zero = torch.tensor([x], device=DEVICE), torch.zeros(1, device=DEVICE)
    one, s = (
        zero + 1,
        PPOSettings(clip_low=math.inf, clip_high=math.inf, kl_coef=1.0, kl_estimator=estimator, old_kl_coef=0.5),
    )
    rows = PPORows(zero, -one, one, zero)
    made = gpu.ppo_tokens(logprobs, None, rows, s)
    truth = ppo_table(logprobs.double(), None, doubled(rows), s)
    torch.testing.assert_close(made.double(), truth, rtol=2e-6, atol=1e-12)  # a GPU's exponential errs by 2^-22


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("x", [math.inf, -math.inf, math.nan])
def test_a_reference_given_for_the_statistics_alone_changes_no_loss(x: float, estimator: str) -> None:
    """Coefficient 0: one token that the reference model makes impossible does not end the run."""
    p = problem(3, 127)
    rows = p.rows._replace(ref_logprobs=torch.full_like(p.rows.advantages, x))
    s = PPOSettings(entropy_coef=0.05, kl_estimator=estimator)
    table, dlogits = run(p._replace(rows=rows), s, PLAIN)
    wanted_table, wanted = run(p._replace(rows=p.rows._replace(ref_logprobs=None)), s, PLAIN)
    columns = [COLUMN[name] for name in ("loss", "policy_loss", "kl_loss", "dlogprob")]
    assert torch.equal(table[:, columns], wanted_table[:, columns]) and torch.equal(dlogits, wanted)
    penalised, _ = run(p._replace(rows=rows), PPOSettings(kl_coef=0.1, kl_estimator=estimator), PLAIN)
    assert not penalised[[0, 2], COLUMN["loss"]].isfinite().any()  # and what counts is not hidden


def test_infinite_log_probs_and_entropies_without_a_coefficient_leave_the_loss_finite() -> None:
    """Of a target at -inf, of an old policy that ruled the token out; the ratio is bounded either way."""
    logprobs = torch.tensor([-math.inf, -1.0, -1.0, -2.0], device=DEVICE)
    old = torch.tensor([-1.0, -math.inf, math.inf, -1.0], device=DEVICE)
    advantages, ones = torch.tensor([1.0, -1.0, 2.0, 1.0], device=DEVICE), torch.ones(4, device=DEVICE)
    rows = PPORows(old, advantages, ones, None, ones)
    entropy = torch.tensor([0.0, 0.0, 0.0, math.inf], device=DEVICE)
    made, s = gpu.ppo_tokens(logprobs, entropy, rows, PPOSettings(dual_clip=3.0)), PPOSettings(dual_clip=3.0)
    truth = ppo_table(logprobs.double(), None, doubled(rows), s)
    for name in ("loss", "policy_loss", "kl_loss", "ratio", "dlogprob", "clip_low", "clip_high", "dual_clip"):
        torch.testing.assert_close(made[:, COLUMN[name]].double(), truth[:, COLUMN[name]], rtol=1e-6, atol=0, msg=name)
    for changed in (PPOSettings(old_kl_coef=0.1), PPOSettings(entropy_coef=0.1)):
        assert not gpu.ppo_tokens(logprobs, entropy, rows, changed)[:, COLUMN["loss"]].isfinite().all()


def test_a_nan_log_ratio_shows_in_the_slope() -> None:
    """An old log-prob of NaN, or no difference between two infinite ones."""
    logprobs = torch.tensor([-1.0, -math.inf], device=DEVICE)
    old, ones = torch.tensor([math.nan, -math.inf], device=DEVICE), torch.ones(2, device=DEVICE)
    made = gpu.ppo_tokens(logprobs, None, PPORows(old, ones, ones), PPOSettings())
    assert made[:, [COLUMN["loss"], COLUMN["dlogprob"]]].isnan().all()


def test_dead_tokens_and_rows_give_zeros_whatever_they_hold() -> None:
    nan = torch.full((3,), math.nan, device=DEVICE)
    rows = PPORows(nan, nan, torch.zeros(3, device=DEVICE), nan, nan, nan)
    assert gpu.ppo_tokens(nan, nan, rows, FULL).eq(0).all()
    logits, targets = nan[:, None].expand(3, 200).contiguous(), torch.full((3,), -(10**12), device=DEVICE)
    for split in (False, True):
        dlogits = torch.empty_like(logits)
        table = gpu.ppo_rows(logits, targets, rows, FULL, PLAIN, entropy=True, dlogits=dlogits, split=split)
        assert table.eq(0).all() and dlogits.eq(0).all()


def test_rows_and_tokens_share_one_objective() -> None:
    p = problem(3, 127)
    table, _ = run(p, FULL, PLAIN)
    made = gpu.ppo_tokens(table[:, COLUMN["logprob"]], table[:, COLUMN["entropy"]], p.rows, FULL)
    assert torch.equal(made, table)


def test_no_rows_no_launch() -> None:
    p = problem(2, 127)
    empty = Problem(p.logits[:0], p.targets[:0], p.rows.take(slice(0, 0)))
    assert run(empty, FULL, PLAIN)[0].shape == (0, 16)
    assert gpu.logprob_rows(empty.logits, empty.targets, PLAIN, entropy=True)[0].shape == (0,)
    assert gpu.ppo_tokens(empty.rows.advantages, None, empty.rows, PPOSettings()).shape == (0, 16)


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    logits, targets = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="got CPU tensors: move them to a GPU"):
        gpu.logprob_rows(logits, targets, PLAIN, entropy=False)
    with pytest.raises(ValueError, match="got CPU tensors: move them to a GPU"):
        gpu.ppo_tokens(logits[0], None, PPORows(None, logits[0], logits[0]), PPOSettings())


def test_what_the_kernels_cannot_take_is_refused() -> None:
    x, targets = torch.zeros(2, 64, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    slopes = torch.ones(2, device=DEVICE)
    cases = {
        "must be bfloat16, float16 or float32": (x.double(), x.double()),
        r"dlogits must be \(R, V\) = \(2, 64\) with last stride 1": (x, x[:, :32]),
        r"logits must be \(R, V\) .* call .contiguous": (x.T, x.T),
        "rows must start at the same addresses": (x, x.view(torch.bfloat16).view(4, 64)[:2]),
        "be no wider": (x.view(torch.bfloat16)[:, :64], x),
        r"rows of dlogits overlap: a row stride of 0 < V = 64": (x[:1].expand(2, 64), x[:1].expand(2, 64)),
        r"rows of dlogits overlap: a row stride of 8 < V = 64": (x, x.new_zeros(72).as_strided((2, 64), (8, 1))),
    }
    for message, (logits, dlogits) in cases.items():
        with pytest.raises(ValueError, match=message):
            gpu.logprob_rows_backward(logits, targets, slopes, None, PLAIN, dlogits=dlogits)


@given(V=st.integers(1, 300_000), size=st.sampled_from([2, 4]), shared=st.sampled_from([65536, 101376, 166912, 232448]))
def test_launch_shapes(V: int, size: int, shared: int) -> None:
    shape = launch_shape(V, size, shared)
    assert shape.lane * size == 16
    assert shape[:4] == launch_shape(V, size)[:4]  # the order of summation is the same on every GPU
    assert shape.programs == 1 and shape.threads % 32 == 0 and shape.block <= 16384
    assert shape.block <= max(2 * V, 32 * shape.lane)
    assert (shape.stages - 1) * shape.block * size <= shared
    assert shape.slices == 1 or (shape.threads == 512 and 2 * shape.block <= V)


@settings(max_examples=60)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    start=st.integers(0, 9),
    stride=st.integers(20, 40),
)
def test_rows_are_read_by_16_bytes_only_where_they_begin_at_multiples_of_16(dtype, start: int, stride: int) -> None:
    """And wherever they do: from the last column on a wide read would end beyond the tensor, or fault."""
    x = torch.empty(160, dtype=dtype, device=DEVICE)[start:].as_strided((3, 20), (stride, 1))
    units, unit = _row_units(x)
    aligned = all(row.data_ptr() % 16 == 0 for row in x)
    assert units * unit == stride and unit == (16 // x.element_size() if aligned else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", [0, 1, 3, 8])
def test_rows_that_begin_anywhere_answer_to_float64(dtype: torch.dtype, start: int) -> None:
    """Rows of a multiple of 16 bytes: logits[:, 1:] of logits with a column to leave out.

    On a GPU their columns are spread over the threads otherwise than those of aligned rows, so bits may differ.
    """
    p = problem(2, 1029, dtype)
    base, truth = expected(p, FULL, PLAIN, torch.float32), expected(p, FULL, PLAIN, torch.float64)
    left, right = (torch.full((2, n), math.nan, dtype=dtype, device=DEVICE) for n in (start, 1040 - 1029 - start))
    for where in ("fresh", "in place"):
        logits = copied(torch.cat([left, p.logits, right], 1))[:, start:][:, :1029]
        dlogits = logits if where == "in place" else torch.empty_like(p.logits)
        table = gpu.ppo_rows(logits, p.targets, p.rows, FULL, PLAIN, entropy=True, dlogits=dlogits)
        assert_as_accurate("table", table, base[0], truth[0], atol=1e-6)
        assert_as_accurate("dlogits", dlogits, base[1].to(dtype), truth[1], atol=1e-7)


def test_rows_may_lie_more_than_2_to_31_elements_apart() -> None:
    """Row 2 begins at element 2^31 + 64, beyond what 32 bits count. Most of the memory is never touched."""
    stride = 2**30 + 32
    p = problem(3, 127, torch.bfloat16, dead=False)
    memory = torch.UntypedStorage(2 * (2 * stride + 127), device=DEVICE)
    far = torch.empty(0, dtype=torch.bfloat16, device=DEVICE).set_(memory, 0, (3, 127), (stride, 1))
    table, dlogits = run(p, FULL, PLAIN)
    far.copy_(p.logits)
    assert torch.equal(gpu.ppo_rows(far, p.targets, p.rows, FULL, PLAIN, entropy=True, dlogits=far), table)
    assert torch.equal(far, dlogits)


@pytest.mark.parametrize(
    "shape",
    [LaunchShape(4, 64, 2, 1, 1), LaunchShape(4, 32, 1, 4, 3, programs=8), LaunchShape(4, 256, 4, 1, 2, programs=2)],
)
def test_any_launch_shape_answers_to_float64(shape: LaunchShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block and less, several, and split rows; and it is that shape which is launched."""
    launched: list[dict[str, Any]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda **arguments: launched.append(arguments) or rows_kernel[grid](**arguments)

    monkeypatch.setattr(launcher, "rows_kernel", Recorded())
    p = problem(3, 1700)
    base, truth = expected(p, FULL, PLAIN, torch.float32), expected(p, FULL, PLAIN, torch.float64)
    for split in (False, True):
        for where in ("fresh", "half"):
            table, dlogits = run(p, FULL, PLAIN, where, split=split, shape=shape)
            assert_as_accurate("table", table, base[0], truth[0], atol=1e-6)
            assert_as_accurate("dlogits", dlogits, base[1].to(dlogits.dtype), truth[1], atol=1e-7)
    for made in launched:
        assert (made["LANE"], made["REPS"], made["SLICES"], made["STAGES"]) == (shape.lane, *shape[2:5])


def test_programs_that_share_a_multiprocessor_share_its_registers() -> None:
    assert launch_shape(128256, 2).max_registers == 128  # 512 threads alone
    assert LaunchShape(8, 256, 4, 8, 4, programs=2).max_registers == 128
    assert LaunchShape(8, 512, 4, 8, 4, programs=2).max_registers == 64
    assert launch_shape(127, 2).max_registers is None  # a thread has 255 at most


def test_rows_are_shared_while_whole_ones_would_leave_processors_idle() -> None:
    assert splits_rows(1, 132) and splits_rows(263, 132) and not splits_rows(264, 132)
    assert not splits_rows(1, 0)


def test_every_masked_load_says_what_stands_outside() -> None:
    """Without `other` the interpreter reads 0, a GPU anything."""
    loads = 0
    for file in Path(launch.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                names = {keyword.arg for keyword in node.keywords}
                assert "mask" not in names or "other" in names, f"{file.name}:{node.lineno}: {ast.unparse(node)}"
                loads += 1
    assert loads > 10
