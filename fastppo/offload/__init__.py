"""What waits in host memory while it is not used: whole models and optimizer states, or models layer by layer."""
