"""`python -m fastppo` is the `fastppo` command. Ctrl-C in the seconds that its imports take ends it quietly."""

import logging
import os
import signal
from types import FrameType


def main() -> None:
    """The entry point; `fastppo.cli.main` says what it does."""
    takes_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in a job of the background
    if takes_ctrl_c:
        signal.signal(signal.SIGINT, _leave)
    for name in ("torchao", "torch.utils._pytree"):  # which libraries torchao lacks or lags behind is no news of a run
        logging.getLogger(name).setLevel(logging.ERROR)
    from fastppo.cli import main as command

    if takes_ctrl_c:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing was begun; an exception might end in an import that swallows it."""
    os.write(2, b"fastppo: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
