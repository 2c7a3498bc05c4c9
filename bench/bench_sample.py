"""`fastppo bench kernels --ops sample`: one op beside its peers."""

from fastppo.bench import arguments
from fastppo.bench.ops import sample

if __name__ == "__main__":
    arguments.run(sample.parser(), sample.cases)
