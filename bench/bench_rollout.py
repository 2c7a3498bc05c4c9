"""Sampling beside transformers' own: the same as `fastppo bench rollout`; see fastppo/bench/rollout.py."""

from fastppo.bench import arguments, rollout

if __name__ == "__main__":
    arguments.run(rollout.parser(), rollout.cases)
