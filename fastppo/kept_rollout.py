"""The finished rollout of an iteration, kept beside the checkpoint it follows: a run that goes on there takes it.

It is bound to the very state it was drawn from, by the `id` of the checkpoint, and holds the random generators as they
were when it was finished: taking it is the same, bit for bit, as drawing it again.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastppo import checkpoint, distributed
from fastppo.batch import Prompts, Rollout, Sampling
from fastppo.checks import InputError
from fastppo.early_scores import EarlyScores
from fastppo.rewards import Scores
from fastppo.run_file import from_dict

if TYPE_CHECKING:
    from fastppo.run import Run

TENSORS = ("input_ids", "cu_seqlens", "prompt_lengths", "loss_mask", "group_ids")


@dataclass(frozen=True)
class Kept:
    """What is on disk: state.json and state.safetensors of a folder as a checkpoint is."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]

    def rollout(self, prompts: Prompts) -> Rollout:
        """The rollout of `prompts`, whose records are taken from there."""
        facts = self.numbers["rollout"]
        return Rollout(
            **{name: self.tensors[name] for name in TENSORS},
            logprobs=self.tensors.get("logprobs"),
            finish_reasons=tuple(facts["finish_reasons"]),
            records=tuple(prompts.records[i] for i in self.tensors["group_ids"].tolist()),
            sampling=None if facts["sampling"] is None else from_dict(Sampling, facts["sampling"]),
            exact=facts["exact"],
            policy_version=facts["policy_version"],
        )

    def scores(self) -> Scores | None:
        """Of the rollout, if they were known."""
        facts = self.numbers["scores"]
        if facts is None:
            return None
        parts = {name: self.tensors[f"part/{i}"] for i, name in enumerate(facts["parts"])}
        return Scores(self.tensors["scores"], self.tensors.get("token_scores"), parts, {}, facts["counts"])


def generate(run: "Run") -> tuple[Rollout, EarlyScores | None]:
    """The rollout that was kept, or a new one, which is kept; and what rewards already said of it."""
    if run.rollouts.is_ahead:  # where ranks wait for each other already
        return _generate(run)
    return distributed.together(partial(_generate, run))


def score(run: "Run", rollout: Rollout, early: EarlyScores | None) -> Scores:
    """The scores that were kept, or new ones, which are kept."""
    return distributed.together(partial(_score, run, rollout, early))


def _generate(run: "Run") -> tuple[Rollout, EarlyScores | None]:
    if run.kept is not None:
        rollout = run.kept.rollout(next(run.prompts)).to(run.engine.policy.device)
        set_state_of_rank(run, run.kept.numbers["rng"])
        if distributed.rank() == 0:
            what = "rollout" if run.kept.numbers["scores"] is None else "rollout and scores"
            print(f"resume: took the {what} of iteration {run.step + 1} that was finished", flush=True)
        return rollout, None
    rollout, early = next(run.rollouts)
    _keep(run, rollout, None)
    return rollout, early


def _score(run: "Run", rollout: Rollout, early: EarlyScores | None) -> Scores:
    known = None if run.kept is None else run.kept.scores()
    if known is not None and run.kept is not None:
        device = rollout.input_ids.device
        tokens = None if known.tokens is None else known.tokens.to(device)
        parts = {name: part.to(device) for name, part in known.parts.items()}
        return Scores(known.sequences.to(device), tokens, parts, {}, known.counts)
    scores = run.rewards(rollout, early)
    if not scores.missing:  # else a run that goes on asks again
        _keep(run, rollout, scores)
    return scores


def write(run: "Run") -> None:
    """Write what is kept, if the state it follows is on disk.

    Raises:
        CheckpointError: it cannot be written.
    """
    if run.kept is not None and run.saved:
        checkpoint.write(_folder(run), lambda path: path.mkdir(parents=True), run.kept.numbers, run.kept.tensors)


def find(run: "Run") -> Kept | None:
    """What was kept after the state that the run is in."""
    if not run.config.train.keep_rollouts or not _folder(run).exists():
        return None
    try:
        found = checkpoint.read(_folder(run))
        if run.boundary is None or found.numbers["follows"] != run.boundary["id"]:
            return None
        return Kept(found.numbers, dict(found.tensors()))
    except InputError as error:
        print(f"resume: passed over: {error}", flush=True)
        return None


def state_of_rank(run: "Run") -> dict[str, Any]:
    """What each rank has of its own, as JSON: every random generator, and what is left of portions."""
    portions = {name: portion.state() for name, portion in run.engine.portions.items()}
    generator = checkpoint.pack(run.engine.generator.get_state())
    return {"global": checkpoint.rng_state(), "engine": generator, "portions": portions}


def set_state_of_rank(run: "Run", state: dict[str, Any]) -> None:
    """Back to what `state_of_rank` returned."""
    run.engine.generator.set_state(checkpoint.unpack(state["engine"]))
    checkpoint.set_rng_state(state["global"])
    saved = state.get("portions", {})  # those of an earlier version have none
    for name in saved.keys() & run.engine.portions.keys():
        run.engine.portions[name].load(saved[name])


def _keep(run: "Run", rollout: Rollout, scores: Scores | None) -> None:
    if not run.config.train.keep_rollouts or run.boundary is None or run.rollouts.is_ahead:
        return
    tensors = {name: getattr(rollout, name) for name in TENSORS}
    tensors |= {} if rollout.logprobs is None else {"logprobs": rollout.logprobs}
    facts = None
    if scores is not None:
        tensors |= {"scores": scores.sequences} | {f"part/{i}": part for i, part in enumerate(scores.parts.values())}
        tensors |= {} if scores.tokens is None else {"token_scores": scores.tokens}
        facts = {"parts": list(scores.parts), "counts": scores.counts}
    numbers = {"follows": run.boundary["id"], "rollout": _facts(rollout), "scores": facts, "rng": state_of_rank(run)}
    run.kept = Kept(numbers, tensors)
    write(run)


def _facts(rollout: Rollout) -> dict[str, Any]:
    sampling = None if rollout.sampling is None else asdict(rollout.sampling)
    rest = {"exact": rollout.exact, "policy_version": rollout.policy_version}
    return {"finish_reasons": rollout.finish_reasons, "sampling": sampling, **rest}


def _folder(run: "Run") -> Path:
    return run.folder / "rollouts" / f"rank-{distributed.rank()}"
