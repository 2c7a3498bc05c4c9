"""`fastppo bench`: kernels, PPO steps and rollouts against this machine's own limits and against other projects.

`command` is the command line; a suite makes `harness.Case`s, or records by itself; `compare` holds two files of records
against each other; `report` and `pictures` make pages of them. Nothing else in fastppo imports this package but the
command.
"""
