"""Packing changes nothing: sequences in one row give what each gives alone, forward and backward."""

import pytest
import torch

import tiny
from fastppo import attention, models
from fastppo.batch import Rollout
from fastppo.microbatch import gather, microbatches


@pytest.fixture(params=["native", "sdpa"], autouse=True)
def implementation(request, monkeypatch):
    """Of float32 on a CPU; the second is what half precision and GPUs without FlashAttention run."""
    if request.param == "sdpa":
        monkeypatch.setenv("FASTPPO_BACKEND", "reference")
    return request.param


LENGTHS = [9, 1, 14, 3, 9, 30]  # several buckets, out of order, one token, longer than the sliding window


def sequences(lengths=LENGTHS):
    return [torch.randint(0, tiny.VOCAB, (n,)).tolist() for n in lengths]


def packed(ids):
    return gather(Rollout.pack(ids, [[] for _ in ids]), range(len(ids)))


def alone(model, ids):
    """Hidden states of each sequence by transformers' own attention, concatenated."""
    with attention.dense_attention(model):
        outs = [model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in ids]
    return torch.cat(outs)


@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 7], [5]], ids=["mixed", "equal", "single"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_packed_equals_one_sequence_at_a_time(architecture, lengths):
    model, ids = tiny.policy(architecture), sequences(lengths)
    torch.testing.assert_close(models.hidden_states(model, packed(ids)), alone(model, ids), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_packed_gradients_equal_one_sequence_at_a_time(architecture, checkpointing):
    model, ids = tiny.policy(architecture, layers=tiny.LAYERS[checkpointing]), sequences()
    upstream = torch.randn(sum(LENGTHS), 32)
    (models.hidden_states(model, packed(ids)) * upstream).sum().backward()
    actual = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    (alone(model, ids) * upstream).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(actual[name], p.grad, atol=2e-5 * float(p.grad.abs().max() + 1), rtol=1e-4)
    assert len(actual) >= 10


def test_what_pads_a_micro_batch_is_not_heard_and_learns_nothing():
    model, ids = tiny.policy(), [[t or 1 for t in row] for row in sequences()]  # no token 0
    batch = packed(ids)
    assert batch.packing.padding > 0 and len(batch.input_ids) == sum(LENGTHS)
    hidden = models.hidden_states(model, batch)
    hidden.square().sum().backward()
    weight = model.get_parameter("model.embed_tokens.weight")
    assert weight.grad is not None and not weight.grad[0].any() and weight.grad[1:].any()
    model.zero_grad()
    with torch.no_grad():
        weight[0] = torch.nan
    again = models.hidden_states(model, batch)
    again.square().sum().backward()
    assert torch.equal(again, hidden)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_micro_batches_of_any_lengths_recur_in_size():
    """The CPU's kernels are made for a number of tokens; five bits are kept, a sixteenth or 7 added at most."""
    sizes = set()
    for n in range(3, 1000):
        plan = attention.plan([n // 3, n - n // 3], recurring=True)
        assert n <= n + plan.padding <= max(n + 7, n * 17 / 16)
        assert plan.restore is not None and int(plan.cu_seqlens[-1]) == n and len(plan.restore) == n + plan.padding
        sizes.add(n + plan.padding)
    assert len(sizes) <= 64


@pytest.mark.parametrize("spare", [0, 500, 10**9])
def test_buckets_waste_at_most_what_a_call_costs(spare, monkeypatch):
    monkeypatch.setitem(attention.CALL_SCORES, "cpu", spare)
    lengths = torch.randint(1, 200, (60,)).tolist()
    buckets = list(attention.plan(lengths).buckets)
    assert sum(b for b, _ in buckets) == 60 and len(buckets) == {0: len(set(lengths)), 10**9: 1}.get(
        spare, len(buckets)
    )
    scores = sum(b * T**2 for b, T in buckets)
    assert scores <= sum(n**2 for n in lengths) + spare * len(buckets)
    model, ids = tiny.policy(), sequences(lengths[:8])
    torch.testing.assert_close(models.hidden_states(model, packed(ids)), alone(model, ids), atol=3e-5, rtol=1e-5)


def test_checkpointing_really_recomputes():
    model = tiny.policy(layers=tiny.LAYERS[True])
    calls = []
    model.get_submodule("model.layers.0.self_attn").register_forward_pre_hook(lambda *_: calls.append(1))
    models.hidden_states(model, packed(sequences())).sum().backward()
    assert len(calls) == 2


def test_no_token_sees_another_sequence():
    model, ids = tiny.policy(), sequences([6, 6])
    before = models.hidden_states(model, packed(ids))
    ids[0] = [(t + 1) % tiny.VOCAB for t in ids[0]]
    after = models.hidden_states(model, packed(ids))
    assert torch.equal(before[6:], after[6:])
    assert not torch.equal(before[:6], after[:6])


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_left_padded_batch_equals_packed(architecture):
    """CORRECTNESS A7: absolute and rotary positions both count from the first real token."""
    model, ids = tiny.policy(architecture), sequences([5, 9])
    padded = torch.tensor([[0] * 4 + ids[0], ids[1]])
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with attention.dense_attention(model):
        dense = model.base_model(input_ids=padded, attention_mask=mask, position_ids=position_ids, use_cache=False)
    expected = torch.cat([dense.last_hidden_state[0, 4:], dense.last_hidden_state[1]])
    torch.testing.assert_close(models.hidden_states(model, packed(ids)), expected, atol=3e-5, rtol=1e-5)


def test_dropout_is_off_in_train_mode():
    """CORRECTNESS A5: GPT-2 with dropout 0.1, two forwards in train mode are equal."""
    raw = tiny.raw_lm("gpt2")
    assert raw.config.attn_pdrop == 0.1
    model, batch = models.prepare_policy(raw), packed(sequences())
    assert model.training
    assert torch.equal(models.hidden_states(model, batch), models.hidden_states(model, batch))


def test_an_unpacked_forward_is_refused():
    with pytest.raises(ValueError, match="dense_attention"):
        tiny.policy()(input_ids=torch.tensor([[1, 2, 3]]))


def test_dense_attention_is_undone():
    model = tiny.policy()
    with attention.dense_attention(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == attention.PACKED


@pytest.mark.parametrize("lengths", [[8] * 400, [1, 3, 5, 9, 16, 14] * 66 + [32]], ids=["equal", "unequal"])
def test_attention_memory_is_not_quadratic_in_the_packed_length(lengths):
    """No (N, N) tensor: the largest allocation of a packed forward grows with N, not N^2."""
    model = tiny.policy()
    batch = packed(sequences(lengths))  # N about 3200: one (N, N) float mask would be 41 MB
    assert len(batch.input_ids) == pytest.approx(3200, rel=0.01)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        models.hidden_states(model, batch)
    largest = max(event.cpu_memory_usage for event in profile.events() or [] if event.name.startswith("aten::empty"))
    assert 0 < largest < 4 * 3200 * 3200 / 10


def test_microbatches_cover_every_token_and_action_once():
    rollout = Rollout.pack(sequences([3, 5, 2, 8]), sequences([4, 1, 6, 2]))
    tokens, actions = [], []
    for batch in microbatches(rollout, 12):
        assert len(batch.input_ids) <= 12
        assert torch.equal(rollout.input_ids[batch.tokens], batch.input_ids)
        assert torch.equal(rollout.input_ids[rollout.action_index[batch.actions]], batch.targets)
        assert torch.equal(batch.input_ids[batch.rows + 1], batch.targets)
        tokens += batch.tokens.tolist()
        actions += batch.actions.tolist()
    assert sorted(tokens) == list(range(31))
    assert sorted(actions) == list(range(13))


def test_a_sequence_over_the_budget_is_named():
    rollout = Rollout.pack(sequences([3, 9]), sequences([1, 4]))
    with pytest.raises(ValueError, match=r"sequence 1 has 13 tokens, more than max_tokens_per_microbatch = 12"):
        list(microbatches(rollout, 12))


def test_values_may_be_narrower_than_keys():
    """Multi-head latent attention (arXiv:2405.04434)."""
    (q, k), v = torch.randn(2, 1, 4, 9, 24), torch.randn(1, 4, 9, 16)
    made, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, None, packing=attention.plan([4, 5]))
    alone = [
        torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True)
        for one in zip(*(x.split([4, 5], dim=2) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(made, torch.cat(alone, dim=2).transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_dispatch_is_by_device_dtype_and_softcap(monkeypatch, implementation):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert attention.backend(cpu, torch.float32, None) == implementation
    assert attention.backend(cpu, torch.float32, 50.0) == "sdpa"
    monkeypatch.setattr(attention, "HAS_FLASH_ATTN", False)
    assert attention.backend(cpu, torch.bfloat16, None) == "sdpa"
    assert attention.backend(cuda, torch.float32, None) == "sdpa"
    assert attention.backend(cuda, torch.bfloat16, None) == "torch_varlen"
    assert attention.backend(cuda, torch.bfloat16, 50.0) == "sdpa"
    monkeypatch.setattr(attention, "HAS_FLASH_ATTN", True)
    assert attention.backend(cuda, torch.bfloat16, 50.0) == "flash_attn"
