"""The memory planner: a dry run of every phase on tensors that have shapes and no memory, recorded by a ledger."""
