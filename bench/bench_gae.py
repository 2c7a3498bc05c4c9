"""`fastppo bench kernels --ops gae`: one op beside its peers."""

from fastppo.bench import arguments
from fastppo.bench.ops import gae

if __name__ == "__main__":
    arguments.run(gae.parser(), gae.cases)
