"""`fastppo bench kernels --ops linear_ppo_loss`: one op beside its peers."""

from fastppo.bench import arguments
from fastppo.bench.ops import linear_ppo_loss

if __name__ == "__main__":
    arguments.run(linear_ppo_loss.parser(), linear_ppo_loss.cases)
