"""The vLLM servers of `rollout.engine = "vllm"`."""

from dataclasses import dataclass

from fastppo.checks import require, require_positive, require_unit


@dataclass(frozen=True, kw_only=True, slots=True)
class VLLMConfig:
    """vLLM servers that sample; `fastppo doctor` prints how to start one, docs/rollout.md says the rest."""

    servers: tuple[str, ...] = ("http://127.0.0.1:8000",)
    """URLs; requests go round them. Of several ranks each has its own."""
    folder: str = "/dev/shm"
    """Where the weights are left for the servers: memory for servers on this machine, a shared file system for others.
    It takes the space of one copy of the policy."""
    timeout_s: float = 600.0
    """Seconds until a request, for one response or one step of a sync, has failed."""
    retries: int = 5
    """Further tries of a request that a running server fails; the wait doubles from 0.5 s."""
    wait_s: float = 600.0
    """Seconds to wait for a server that died to come back when no other is left; it gets the weights again."""
    sleep: bool = False
    """Let the servers sleep between rollouts, so that on one card the trainer has their memory; they are started with
    --enable-sleep-mode."""
    gpu_share: float | None = None
    """Portion of the trainer's own card that a server takes, its --gpu-memory-utilization: the memory plan leaves it
    out. None: 0.5 with `sleep`, as in the command that `fastppo doctor` prints, else none."""

    def __post_init__(self) -> None:
        require(len(self.servers) > 0, "rollout.vllm.servers is empty: give at least one URL")
        for url in self.servers:
            legal = url.startswith(("http://", "https://"))
            require(legal, f"rollout.vllm.servers: a URL starts with http:// or https://, got {url!r}")
        twice = sorted({url for url in self.servers if self.servers.count(url) > 1})
        require(not twice, f"rollout.vllm.servers has {twice} twice: one entry per server")
        require_positive("rollout.vllm", self, "timeout_s", "wait_s")
        require(self.retries >= 0, f"rollout.vllm.retries must be >= 0, got {self.retries}")
        require_unit("rollout.vllm", self, *(["gpu_share"] if self.gpu_share is not None else []))

    @property
    def portion(self) -> float:
        """Of the trainer's card."""
        return self.gpu_share if self.gpu_share is not None else 0.5 if self.sleep else 0.0
