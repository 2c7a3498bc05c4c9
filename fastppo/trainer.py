"""train(): the PPO loop, one line per phase."""

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fastppo import distributed, kept_rollout
from fastppo.batch import Rollout
from fastppo.config import RunConfig
from fastppo.data import select
from fastppo.determinism import deterministic
from fastppo.faults import check_steps
from fastppo.left_out import only_scored, with_gaps
from fastppo.metrics import PhaseTimer
from fastppo.report import progress
from fastppo.resume import find, mark, restore
from fastppo.rewards import to_samples
from fastppo.run import Run, build, leave_folder, open_folder
from fastppo.saving import save, saved_on_failure
from fastppo.stop import stop, stop_requests
from fastppo.tracing import tracing


def train(config: RunConfig, *, resume: str | None = None, profile: bool = False) -> Path:
    """Run PPO as `config` says; returns the run folder.

    `resume`: a checkpoint folder to go on from, or "latest" for the newest whole one of the run folder, if it has one;
    the run then ends as if it had never stopped. `profile`: record a few iterations, see `tracing`; changes nothing.

    Ctrl-C or SIGTERM: the run saves `checkpoints/interrupted` after this iteration and raises KeyboardInterrupt, or
    SystemExit(0) after SIGTERM; a second one stops at once. Any other failure saves too and is raised. What stops
    inside an update leaves weights between two iterations, from which no run can go on: they are saved as
    `checkpoints/interrupted-weights`, and `interrupted` stays as it was. Before the end of the first iteration there is
    nothing to save. Of several ranks the first one writes everything.

    Raises:
        ValueError: the config names something that is missing or damaged, or the run folder already holds a run.
        RewardError: a reward failed.
    """
    with ExitStack() as stack:
        stack.enter_context(distributed.joined())
        stack.enter_context(deterministic(config.deterministic))
        run = start(config, resume)
        signals = stack.enter_context(stop_requests())  # first: they are requests while the run is saved too
        stack.enter_context(saved_on_failure(run))
        remaining = config.train.total_steps - run.step
        trace = stack.enter_context(tracing(run.folder, remaining, on=profile and _writes()))
        show = stack.enter_context(progress(config.train.total_steps, done=run.step, quiet=not _writes()))
        for step in range(run.step + 1, config.train.total_steps + 1):
            if (step - 1) % config.train.eval_every == 0:
                show.phase("evaluation")
                evaluate(run, step - 1)
            timer = PhaseTimer(show.phase, trace.span)
            with timer("rollout"):
                rollout, early = kept_rollout.generate(run)
            with timer("reward"):
                scores = kept_rollout.score(run, rollout, early)
            with timer("score"):
                experience = run.engine.score(rollout, scores)
            run.boundary = None
            with timer("update"):
                stats = run.engine.update(experience)
            trace.step()
            check_steps(run, step)
            tell(run.watch.iteration(step, stats))
            log(run, step, stats, rollout, timer)  # before there is a state that has this iteration behind it
            mark(run, step)
            show(stats)
            if config.train.save_every and step % config.train.save_every == 0:
                save(run, f"step-{step:06d}")
            distributed.from_first(run.writer.check)
            distributed.from_first(run.watch.stop)
            stop([number for received in distributed.gather(signals) for number in received])
        show.phase("evaluation")
        evaluate(run, config.train.total_steps)
        save(run, "final", wait=True)
    return run.folder


def start(config: RunConfig, resume: str | None) -> Run:
    """A run at its beginning, or where its checkpoint left it."""
    with ExitStack() as on_failure:
        if (lock := distributed.together(partial(open_folder, Path(config.out)))) is not None:
            on_failure.callback(leave_folder, Path(config.out), lock)
        found = distributed.from_first(lambda: find(config, resume))
        run = distributed.together(partial(build, config, lock, kept=0 if found is None else found.step))
        on_failure.callback(run.close)
        mark(run, 0) if found is None else restore(run, found)
        on_failure.pop_all()
    return run


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Sample one response to each held-out prompt, score it, log the means and write the samples. Not on every rank."""
    if run.eval_prompts is None or not _writes():
        return {}
    prompts = select(run.eval_prompts, range(min(len(run.eval_prompts), run.config.train.eval_prompts_max)))
    top_k = 1 if run.config.train.eval_greedy else 0
    sampling = replace(run.engine.sampling, samples_per_prompt=1, top_k=top_k, seed=run.config.seed)
    rollout = run.engine.generate(prompts, sampling)
    every, all_scores = rollout, run.rewards(rollout)
    rollout, scores = only_scored(every, all_scores)
    stats = {"eval/scores": float(scores.totals(rollout).mean())}
    stats |= {f"eval/reward/{name}": float(part.mean()) for name, part in scores.parts.items()}
    stats["eval/response_tokens"] = float(rollout.action_counts.float().mean())
    stats["eval/truncated_frac"] = float(rollout.truncated.float().mean())
    tell(run.watch.evaluation(stats))
    run.metrics.log(stats, step)
    write_samples(run, step, every, with_gaps(scores.totals(rollout).tolist(), list(all_scores.missing), len(every)))
    if run.config.train.keep_best and (run.best is None or stats["eval/scores"] > run.best):
        run.best = stats["eval/scores"]
        if run.boundary is not None:
            run.boundary["best"] = run.best
        save(run, "best")
    return stats


def tell(what: list[str]) -> None:
    """A line each, once for all ranks."""
    for line in what if _writes() else []:
        print(line, flush=True)


def write_samples(run: Run, step: int, rollout: Rollout, scores: list[float | None]) -> None:
    """Append every evaluated sample to samples.jsonl; one that no reward could score has none."""
    with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        for sample, score in zip(to_samples(rollout, run.tokenizer), scores, strict=True):
            row = {"step": step, "score": score, "prompt": sample.prompt, "response": sample.response}
            file.write(json.dumps({**row, "finish_reason": sample.finish_reason}) + "\n")


def log(run: Run, step: int, stats: dict[str, float], rollout: Rollout, timer: PhaseTimer) -> None:
    """One line of metrics per iteration."""
    stats |= run.watch.metrics() | timer.seconds | run.rollouts.metrics
    tokens = distributed.sum_over_ranks(torch.tensor(len(rollout.input_ids)))
    stats["perf/tokens_per_second"] = float(tokens) / timer.total()
    stats["episode"] = float(step * len(rollout) * distributed.world_size())
    run.metrics.log(stats, step)


def _writes() -> bool:
    """Whether this rank writes to the run folder."""
    return distributed.rank() == 0
