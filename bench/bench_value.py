"""`fastppo bench kernels --ops value`: one op beside its peers."""

from fastppo.bench import arguments
from fastppo.bench.ops import value

if __name__ == "__main__":
    arguments.run(value.parser(), value.cases)
