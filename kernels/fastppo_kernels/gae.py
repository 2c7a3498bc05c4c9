"""Rewards of tokens and generalized advantage estimation on packed sequences (arXiv:1506.02438).

    delta_t = r_t + gamma * V_next(t) - V_t
    A_t     = delta_t + gamma * lam * A_next(t)          (eq. 16)
    R_t     = A_t + V_t

next(t) is the next action of the same sequence: tokens that are not actions (tool output) are no steps.
"""

from torch import Tensor

from fastppo_kernels import checks, operators
from fastppo_kernels.backend import choose_backend


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of B packed sequences; no gradient.

    Args:
        rewards: (N,) float, reward of each token. What stands at a token that is no action is ignored.
        values: (N,) float, value of the state before each token.
        cu_seqlens: (B+1,) int32, from 0 to N; sequences of length 0 are legal.
        gamma: discount per action, in [0, 1].
        lam: GAE lambda, in [0, 1]; 0 is one-step TD, 1 Monte Carlo.
        mask: (N,) bool, True where the token is an action; None: everywhere.
        bootstrap_values: (B,) float, value after the last action of each sequence: 0 where the sequence ended,
            the critic's value where it was cut off. None: all 0.
        backend: "triton", "native" or "reference"; None lets `choose_backend` decide.

    Returns:
        (advantages, returns), both (N,) float32 (float64 if an input is) and 0 where `mask` is False.

    Raises:
        ValueError: shapes or dtypes do not fit together, gamma or lam lies outside [0, 1], or (native)
            cu_seqlens does not rise from 0 or more to N at most.
    """
    checks.check_rows(rewards.shape[0] if rewards.ndim else -1, rewards=rewards)
    checks.check_rows(rewards.shape[0], values=values)
    num_sequences = checks.check_packed(cu_seqlens, rewards.shape[0], mask)
    checks.check_float(bootstrap_values=bootstrap_values)
    checks.check_shape((num_sequences,), "(B,)", bootstrap_values=bootstrap_values)
    given = {"cu_seqlens": cu_seqlens, "mask": mask, "bootstrap_values": bootstrap_values}
    checks.check_device(rewards=rewards, values=values, **given)
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= x <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {x}; the usual values are gamma = 1 and lam = 0.95")
    after = [] if bootstrap_values is None else [bootstrap_values]
    rewards, values, *after = checks.in_working_dtype(rewards, values, *after)
    name = choose_backend("gae", backend, rewards)
    return operators.gae(rewards, values, cu_seqlens, gamma, lam, mask, after[0] if after else None, name)


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Reward of each token: the score at the last action, minus kl_coef * KL estimate at every action; no gradient.

    Args:
        scores: (B,) float, one per sequence, credited to its last action; or (N,) float, one per token, of which
            those at tokens that are no actions are ignored. B == N is read as (N,), which is the same thing as long as
            every sequence has one token; where one has not, the scores mean nothing (see Raises).
        logprobs: (N,) float, under the policy that sampled the tokens, in nats. Ignored where there is no action.
        ref_logprobs: (N,) float, under the reference policy; None only with kl_coef = 0.
        cu_seqlens: (B+1,) int32, from 0 to N.
        kl_coef: weight of the penalty; >= 0.
        kl_estimator: k1, k2 or k3. k1, the default, makes the reward's gradient that of KL(policy || reference).
        mask: (N,) bool, True where the token is an action; None: everywhere.

        backend: as in `gae`.

    Returns:
        (N,) float32 (float64 if an input is), 0 where there is no action.

    Raises:
        ValueError: shapes or dtypes do not fit together, a setting lies outside its range, or, on the CPU, B == N
            although some sequence does not have one token, so that the scores can be read in two ways. A GPU is not
            asked for the lengths: there every reward is NaN then.
    """
    checks.check_rows(logprobs.shape[0] if logprobs.ndim else -1, logprobs=logprobs, ref_logprobs=ref_logprobs)
    checks.check_float(scores=scores)
    num_tokens = logprobs.shape[0]
    num_sequences = checks.check_packed(cu_seqlens, num_tokens, mask)
    if scores.ndim != 1 or scores.shape[0] not in (num_sequences, num_tokens):
        raise ValueError(
            f"scores must be (B,) = ({num_sequences},) or (N,) = ({num_tokens},), got {tuple(scores.shape)}"
        )
    given = {"ref_logprobs": ref_logprobs, "cu_seqlens": cu_seqlens, "mask": mask}
    checks.check_device(scores=scores, logprobs=logprobs, **given)
    if not kl_coef >= 0.0 or (kl_coef and ref_logprobs is None):
        raise ValueError(f"kl_coef must be >= 0, and 0 if ref_logprobs is None, got {kl_coef}")
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_estimator must be k1, k2 or k3, got {kl_estimator!r}; a reward has no gradient")
    reference = [] if ref_logprobs is None else [ref_logprobs]
    scores, logprobs, *reference = checks.in_working_dtype(scores, logprobs, *reference)
    name = choose_backend("token_rewards", backend, logprobs)
    return operators.token_rewards(
        scores, logprobs, reference[0] if reference else None, cu_seqlens, kl_coef, kl_estimator, mask, name
    )
