"""The instruction sets that the C++ kernels are compiled for, and which of them runs.

The fastest one that the CPU has runs, or the one that FASTPPO_ISA names. Sampling, the critic's loss and the sequence
ops give the same bits on all of them that have a fused multiply-add, that is all but "portable" on x86-64.
"""

import os
from functools import cache

from fastppo_kernels.native.library import load

ISA_VARIABLE = "FASTPPO_ISA"


@cache
def available_isas() -> dict[str, int]:
    """Instruction sets this CPU has, fastest first, with the library's number of each."""
    library = load()
    supported = (i for i in range(library.fastppo_num_isas()) if library.fastppo_isa_supported(i))
    return {library.fastppo_isa_name(i).decode(): i for i in supported}


def chosen_isa() -> int:
    """The library's number of the instruction set that runs: the one FASTPPO_ISA names, else the fastest.

    Raises:
        ValueError: this CPU or this build has no such instruction set.
    """
    available, wanted = available_isas(), os.environ.get(ISA_VARIABLE)
    if wanted and wanted not in available:
        raise ValueError(
            f"{ISA_VARIABLE} = {wanted!r} is no instruction set of this CPU and build; available: "
            f"{', '.join(available)}. Leave it unset to run the fastest."
        )
    return available[wanted or next(iter(available))]
