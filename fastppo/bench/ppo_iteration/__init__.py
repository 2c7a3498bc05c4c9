"""Scripts that run one PPO setting in one system each; they are run as files. `end_to_end` starts them in turn."""
