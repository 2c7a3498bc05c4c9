"""`fastppo bench kernels --ops logits_ppo_loss`: one op beside its peers."""

from fastppo.bench import arguments
from fastppo.bench.ops import logits_ppo_loss

if __name__ == "__main__":
    arguments.run(logits_ppo_loss.parser(), logits_ppo_loss.cases)
