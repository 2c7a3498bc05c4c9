"""What waits in host memory while it is not used."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from fastppo.checks import require

if TYPE_CHECKING:
    from fastppo.config import RunConfig

Way = Literal["keep", "move"]
FrozenWay = Literal["keep", "move", "stream"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadConfig:
    """On a GPU, what is in host memory (pinned) between its uses. No choice here changes a result by a bit.

    `keep`: it stays on the device. `move`: it comes to the device for the phase that uses it. `stream`, for models that
    do not train: embeddings and head come, and of the layers only the one at work and the next.
    """

    reference: FrozenWay = "keep"
    """The reference, which scoring uses."""
    reward: FrozenWay = "keep"
    """Every reward model."""
    critic: Way = "keep"
    """The critic's weights, which scoring and its half of the update use."""
    critic_optimizer: Way = "keep"
    """Moments and float32 masters of the critic, which its half of the update uses."""
    policy_optimizer: Way = "keep"
    """Moments and float32 masters of the policy, which its half of the update uses."""

    @property
    def chosen(self) -> dict[str, str]:
        """What does not stay on the device, and how."""
        return {f.name: way for f in fields(self) if (way := getattr(self, f.name)) != "keep"}

    def check(self, run: "RunConfig") -> None:
        """
        Raises:
            ValueError: it names what the run has not, or what has no memory of its own there.
        """
        shares = run.memory.share == "lora"
        there = {
            "reference": (run.ppo.kl_coef > 0, "a reference (ppo.kl_coef > 0)"),
            "reward": (any(r.kind == "model" for r in run.rewards), "a reward of kind 'model'"),
            "critic": (run.ppo.advantage == "gae", "a critic (ppo.advantage = 'gae')"),
            "critic_optimizer": (run.ppo.advantage == "gae", "a critic (ppo.advantage = 'gae')"),
        }
        own = {
            "reference": not shares or run.policy.reference is not None,
            "critic": not shares,
            "critic_optimizer": run.critic_optimizer.kind != "adamw-cpu-offload",
            "policy_optimizer": run.policy_optimizer.kind != "adamw-cpu-offload",
        }
        for key, way in self.chosen.items():
            has, what = there.get(key, (True, ""))
            require(has, f"offload.{key} = {way!r} needs {what}, and this run has none: set it to 'keep'")
            why = "is in host memory already" if key.endswith("optimizer") else "has no weights of its own"
            cause = f"{key}.kind = 'adamw-cpu-offload'" if key.endswith("optimizer") else "memory.share = 'lora'"
            require(own.get(key, True), f"offload.{key} = {way!r}: with {cause} it {why}; set it to 'keep'")
