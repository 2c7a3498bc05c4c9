"""`fastppo bench kernels --ops token_logprobs`: one op beside its peers."""

from fastppo.bench import arguments
from fastppo.bench.ops import token_logprobs

if __name__ == "__main__":
    arguments.run(token_logprobs.parser(), token_logprobs.cases)
