"""`fastppo bench kernels --ops decode_attention`: one op beside its peers."""

from fastppo.bench import arguments
from fastppo.bench.ops import decode_attention

if __name__ == "__main__":
    arguments.run(decode_attention.parser(), decode_attention.cases)
