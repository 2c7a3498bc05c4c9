"""`fastppo bench kernels --ops ppo_loss`: one op beside its peers."""

from fastppo.bench import arguments
from fastppo.bench.ops import ppo_loss

if __name__ == "__main__":
    arguments.run(ppo_loss.parser(), ppo_loss.cases)
