"""Optimizer steps skipped because loss or gradient was not finite: named, and too many in a row are the end."""

from fastppo import checkpoint, distributed
from fastppo.checkpoint import Checkpoint
from fastppo.checks import InputError
from fastppo.run import Run


class NonFiniteError(RuntimeError):
    """`ppo.max_skipped_steps` optimizer steps in a row had a loss or gradient that was not finite."""


def check_steps(run: Run, step: int) -> None:
    """Name what was skipped in iteration `step`; then go on, go back, or end.

    Raises:
        NonFiniteError: too many in a row, and there is nothing to go back to or nobody asked.
    """
    skipped = run.engine.skipped()
    if not skipped:
        run.rolled_back_to = None  # it helped
    for role, (count, why) in skipped.items():
        if distributed.rank() == 0:
            print(f"iteration {step}: {role}: step skipped, {count} in a row: {why}", flush=True)
    limit, most = run.config.ppo.max_skipped_steps, max((count for count, _ in skipped.values()), default=0)
    if limit == 0 or most < limit:
        return
    what = f"{most} optimizer steps in a row were skipped (ppo.max_skipped_steps = {limit})"
    if run.config.ppo.on_max_skipped == "stop":
        raise NonFiniteError(f"{what}: {'; '.join(why for _, why in skipped.values())}. Parameters are as they were")
    found = distributed.from_first(lambda: _last_good(run))
    if found is None or found.step == run.rolled_back_to:
        raise NonFiniteError(f"{what}, and no checkpoint before the first of them that was not tried already")
    run.engine.roll_back(found.tensors())
    run.rolled_back_to = found.step
    if distributed.rank() == 0:
        print(f"iteration {step}: {what}: weights and optimizers are those of {found.path} again", flush=True)


def _last_good(run: Run) -> Checkpoint | None:
    """The newest whole checkpoint with steps of its own, the last of them taken, not skipped."""
    run.writer.wait()
    for path in checkpoint.by_steps(run.folder / "checkpoints"):
        try:
            found = checkpoint.read(path)
        except InputError:
            continue
        skipped = any(role[2] for role in found.numbers["engine"]["roles"].values())
        if not skipped and found.numbers["rolled_back_to"] is None:
            return found
    return None
