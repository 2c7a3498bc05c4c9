"""Random numbers that follow from what is asked for: rows, order and servers do not matter."""

import hashlib
from collections.abc import Iterator

from fastppo.batch import Prompts


def request_seeds(prompts: Prompts, samples_per_prompt: int, seed: int) -> Iterator[int]:
    """A number in [0, 2**63) per request, prompt by prompt: from the seed, the prompt's tokens and its rank among the
    samples of that prompt, also where the prompt occurs twice."""
    seen = dict[tuple[int, ...], int]()
    for ids in prompts.token_ids:
        for _ in range(samples_per_prompt):
            seen[ids] = seen.get(ids, 0) + 1
            digest = hashlib.blake2b(repr((seed, seen[ids], ids)).encode(), digest_size=8).digest()
            yield int.from_bytes(digest) >> 1
