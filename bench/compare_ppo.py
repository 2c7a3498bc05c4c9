"""One PPO iteration against TRL's last PPOTrainer: `fastppo bench end-to-end`; see fastppo/bench/end_to_end.py."""

from fastppo.bench import end_to_end

if __name__ == "__main__":
    end_to_end.main()
