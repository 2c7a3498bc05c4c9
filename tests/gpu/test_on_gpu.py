"""The same laws on a GPU: packed attention, losses and a whole PPO iteration."""

import pytest
import torch
from transformers import PreTrainedModel

import tiny
from fastppo import (
    FunctionReward,
    OptimizerConfig,
    PPOConfig,
    PPOEngine,
    Prompts,
    RewardModel,
    Rollout,
    RolloutConfig,
    Sampling,
    WeightedRewards,
    attention,
    models,
)
from fastppo.bench.machine import captured
from fastppo.bench.ops import OPS
from fastppo.microbatch import gather
from fastppo.rollout import EmbeddedEngine, GenerateBatchEngine, graphs
from fastppo.score import action_logprobs
from fastppo_kernels import linear_ppo_loss, logits_ppo_loss, sample
from numerics import assert_as_accurate

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LENGTHS = [9, 1, 14, 3, 30]


def on_gpu(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    return models.to_device(model.to(dtype), torch.device(DEVICE))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_equals_one_sequence_at_a_time(architecture, dtype):
    model = on_gpu(tiny.policy(architecture, scale=1.0), dtype)
    ids = [torch.randint(0, tiny.VOCAB, (n,)).tolist() for n in LENGTHS]
    batch = gather(Rollout.pack(ids, [[] for _ in ids], device=DEVICE), range(len(ids)))
    packed = models.hidden_states(model, batch)
    with attention.dense_attention(model):
        alone = [model.base_model(torch.tensor([row], device=DEVICE), use_cache=False)[0][0] for row in ids]
    tolerance = 3e-5 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(packed, torch.cat(alone), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [127, 5003, 32000])
def test_linear_ppo_loss_answers_to_float64(vocab, dtype):
    R, H = 63, 64
    hidden, weight = torch.randn(R, H), 0.2 * torch.randn(vocab, H)
    rows = (torch.randint(0, vocab, (R,)), torch.randn(R) - 9, torch.randn(R), torch.rand(R) / R)

    def run(h, w, device):
        h, w = h.to(device).requires_grad_(), w.to(device).requires_grad_()
        targets, *others = (x.to(device) for x in rows)
        others = [x.to(torch.float64 if h.dtype == torch.float64 else torch.float32) for x in others]
        loss, _ = linear_ppo_loss(h, w, targets, *others)
        return [loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, (h, w)))]

    h, w = hidden.to(dtype), weight.to(dtype)
    truth, base, actual = run(h.double(), w.double(), "cpu"), run(h, w, "cpu"), run(h, w, DEVICE)
    for name, a, b, t in zip(("loss", "dhidden", "dweight"), actual, base, truth, strict=True):
        assert_as_accurate(name, a, b, t, atol=1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hundred_runs_are_bitwise_equal(dtype):
    """At a vocabulary and a number of rows that fill the GPU; in the gradient of the weight, too."""
    R, H, V = 2048, 256, 32000
    hidden, weight = torch.randn(R, H, device=DEVICE).to(dtype), (0.1 * torch.randn(V, H, device=DEVICE)).to(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = torch.randint(V, (R,), device=DEVICE)
    rows = (torch.randn(R, device=DEVICE) - 10, torch.randn(R, device=DEVICE), torch.rand(R, device=DEVICE) / R)

    def run():
        loss, stats = linear_ppo_loss(hidden, weight, targets, *rows, entropy_coef=0.01)
        return [loss, *stats.values(), *torch.autograd.grad(loss, (hidden, weight))]

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_a_capture_that_fails_leaves_nothing_behind():
    stream, x = torch.cuda.current_stream(), torch.ones(4, device=DEVICE)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            captured(lambda: (x + 1).sum().item())
        assert torch.cuda.current_stream() == stream and torch.rand(4, device=DEVICE).min() >= 0
    replay = captured(lambda: x.add_(1))
    before = x.clone()
    replay()
    assert torch.equal(x, before + 1)


MANY = {  # shapes whose programs fill the GPU several times
    "logits_ppo_loss": "2048,32000",
    "token_logprobs": "2048,256,32000",
    "ppo_loss": "64,1024",
    "value": "4096,896",
    "gae": "512,1024",
    "sample": "256,32000",
    "decode_attention": "64,14,2,64,512",
}


@pytest.mark.parametrize("op", MANY)
def test_a_hundred_runs_of_the_other_ops_are_bitwise_equal(op):
    argv = ["--device", DEVICE, "--dtypes", "bfloat16", "--entropy", "True", "--shapes", MANY[op]]
    for case in OPS[op].cases(OPS[op].parser().parse_args(argv)):
        ours = case.variants["fastppo"]
        first: dict[str, torch.Tensor] = {}
        for _ in range(101):
            if ours.before:
                ours.before()
            made = {name: x.clone() for name, x in ours.run().items()}
            first = first or made
            assert all(torch.equal(x, first[name]) for name, x in made.items()), case.setting


@pytest.mark.parametrize("vocab", [1, 5, 127, 50257, 128256, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 63, 1025])
def test_logits_ppo_loss_answers_to_float64(rows, dtype, vocab):
    logits, targets = 3 * torch.randn(rows, vocab, device=DEVICE), torch.randint(vocab, (rows,), device=DEVICE)
    logits = logits.to(dtype)
    constants = (
        torch.randn(rows, device=DEVICE) - 9,
        torch.randn(rows, device=DEVICE),
        torch.rand(rows, device=DEVICE),
    )

    def run(z, backend):
        z = z.clone().requires_grad_()
        like = [x.to(torch.float64 if z.dtype == torch.float64 else torch.float32) for x in constants]
        options = {"entropy_coef": 0.1, "kl_coef": 0.1, "ref_logprobs": like[0] - 0.5, "temperature": 0.7}
        loss, _ = logits_ppo_loss(z, targets, *like, **options, inplace=False, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, z)]

    truth, base = run(logits.double(), "reference"), run(logits, "reference")
    for name, a, b, t in zip(("loss", "dlogits"), run(logits, "triton"), base, truth, strict=True):
        assert_as_accurate(name, a, b, t, atol=1e-6)


def test_no_op_waits_for_the_device():
    """What a captured graph or an overlapped loop needs: nothing is read back."""
    hidden, weight = torch.randn(64, 32, device=DEVICE), torch.randn(500, 32, device=DEVICE)
    hidden.requires_grad_()
    targets, rows = torch.randint(500, (64,), device=DEVICE), [torch.randn(64, device=DEVICE) for _ in range(3)]
    linear_ppo_loss(hidden, weight, targets, *rows)[0].backward()  # compiles
    sample(hidden.detach(), torch.rand(64, device=DEVICE))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_ppo_loss(hidden, weight, targets, *rows)[0].backward()
        sample(hidden.detach(), torch.rand(64, device=DEVICE))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sampling_on_the_gpu_draws_the_same_tokens():
    logits, uniform = 3 * torch.randn(64, 5003), torch.rand(64)
    tokens, logprobs = sample(logits, uniform)
    on_gpu = sample(logits.to(DEVICE), uniform.to(DEVICE))
    assert (on_gpu[0].cpu() == tokens).float().mean() > 0.97  # a cumulative sum may round across a border
    same = on_gpu[0].cpu() == tokens
    torch.testing.assert_close(on_gpu[1].cpu()[same], logprobs[same], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_ppo_iteration_runs_and_starts_at_ratio_one(dtype):
    policy = on_gpu(tiny.policy(scale=1.0), dtype)
    engine = PPOEngine(
        policy,
        ppo=PPOConfig(num_epochs=2, num_minibatches=2, truncation="none"),
        rollout=RolloutConfig(num_prompts=8, max_new_tokens=12, temperature=1.0),
        policy_optimizer=OptimizerConfig(lr=1e-3),
    )
    prompts = Prompts(token_ids=tuple((i, i + 1) for i in range(8)))
    count = FunctionReward(lambda samples: [float(s.response_ids.count(7)) for s in samples], name="sevens")
    model = RewardModel(models.frozen(models.reward_model_from(policy)))
    rewards = WeightedRewards([count, model])
    for _ in range(3):
        rollout = engine.generate(prompts)
        stats = engine.update(engine.score(rollout, rewards(rollout)))
        assert stats["val/ratio_max_first"] == 1.0 and stats["policy/clipfrac_first"] == 0.0
        assert stats["policy/skipped_steps"] == 0


def test_foreign_trajectories_may_come_from_the_cpu():
    engine = PPOEngine(
        on_gpu(tiny.policy(scale=1.0), torch.float32), rollout=RolloutConfig(num_prompts=2, temperature=1.0)
    )
    stats = engine.update(engine.score(Rollout.pack([[1], [2]], [[3, 4], [5]]), [1.0, -1.0]))
    assert stats["policy/steps"] == 4


@pytest.mark.parametrize("keep_memory", [False, True])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_steps_are_the_policys_at_every_update(architecture, dtype, keep_memory):
    """Also with few rows, of which the last are replayed beside others that stand still."""
    policy = on_gpu(tiny.policy(architecture, scale=1.0), dtype)
    given = Prompts(token_ids=tuple(tuple(range(1, 3 + i % 7)) for i in range(40)))
    sampling = Sampling(max_new_tokens=60, seed=3, temperature=0.8)
    made = EmbeddedEngine(policy, eos_token_ids=(3,), max_rows=16, keep_memory=keep_memory)
    for _ in range(3):
        one, again = made.generate(given, sampling), made.generate(given, sampling)
        assert list(one.sequences()) == list(again.sequences())
        ours = action_logprobs(policy, one, temperature=0.8, max_tokens=4096)
        torch.testing.assert_close(one.logprobs, ours, atol=1e-3 if dtype == torch.float32 else 0.2, rtol=0)
        with torch.no_grad():  # the next rollout is of other weights
            for parameter in policy.parameters():
                parameter.mul_(1.05)
    if keep_memory:
        assert made._kept is not None and made._kept.steps.graphs


@pytest.mark.parametrize("recorded", [False, True])
def test_a_decode_step_waits_for_nothing(recorded, monkeypatch):
    """But for which rows have ended, once a step, after it."""
    policy = on_gpu(tiny.policy(scale=1.0), torch.bfloat16)
    made = EmbeddedEngine(policy, eos_token_ids=(3,), max_rows=8, cuda_graphs=recorded)
    given, sampling = Prompts(token_ids=((1, 2),) * 8), Sampling(max_new_tokens=40, seed=1, stop_sequences=((5, 6),))
    made.generate(given, sampling)  # compiles
    step, seen = graphs.Steps.__call__, []

    def strict(steps, *key):
        waits = key not in steps.graphs and steps.uses.get(key, 0) + 1 == graphs.RECORD_AT  # recording does
        torch.cuda.set_sync_debug_mode("default" if waits else "error")
        try:
            return step(steps, *key)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen.append(bool(steps.graphs))

    monkeypatch.setattr(graphs.Steps, "__call__", strict)
    assert len(made.generate(given, sampling)) == 8
    assert len(seen) > 8 and any(seen) == recorded


def test_kept_steps_are_left_when_the_policy_has_moved():
    """A recorded step reads the weights where they were."""
    policy = on_gpu(tiny.policy(scale=1.0), torch.float32)
    given, sampling = Prompts(token_ids=((1, 2),) * 8), Sampling(max_new_tokens=40, seed=1)
    made = EmbeddedEngine(policy, max_rows=8, keep_memory=True)
    made.generate(given, sampling)
    kept = made._kept
    for parameter in policy.parameters():
        parameter.data = parameter.data * 1.05
    rollout = made.generate(given, sampling)
    assert made._kept is not kept
    ours = action_logprobs(policy, rollout, temperature=1.0, max_tokens=4096)
    torch.testing.assert_close(rollout.logprobs, ours, atol=1e-3, rtol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_steps_are_recorded_on_the_policy_s_gpu():
    policy = models.to_device(tiny.policy(scale=1.0), torch.device("cuda", 1))
    made = EmbeddedEngine(policy, max_rows=8, keep_memory=True)
    rollout = made.generate(Prompts(token_ids=((1, 2),) * 8), Sampling(max_new_tokens=40, seed=1))
    assert made._kept is not None and made._kept.steps.graphs and torch.cuda.current_device() == 0
    ours = action_logprobs(policy, rollout, temperature=1.0, max_tokens=4096)
    torch.testing.assert_close(rollout.logprobs, ours, atol=1e-3, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_continuous_batching_on_a_gpu_samples_the_policy(architecture, dtype):
    policy = on_gpu(tiny.policy(architecture, scale=1.0), dtype)
    made = GenerateBatchEngine(policy, max_rows=16)
    rollout = made.generate(Prompts(token_ids=((1, 2),) * 20), Sampling(max_new_tokens=20, seed=1, temperature=0.8))
    ours = action_logprobs(policy, rollout, temperature=0.8, max_tokens=4096)
    torch.testing.assert_close(rollout.logprobs, ours, atol=1e-3 if dtype == torch.float32 else 0.2, rtol=0)
    assert policy.config._attn_implementation == attention.PACKED and policy.training
