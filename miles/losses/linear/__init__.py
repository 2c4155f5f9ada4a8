"""Log-probabilities straight from hidden states, without `[T, V]` logits in memory.

`reference` is the formula, `chunked` the same in tiles; a further backend is a module beside them
with their signature and an entry in `api.BACKENDS`. `tiles` holds what walks over the vocabulary.
"""

from miles.losses.linear.api import LogprobOutput, explain, linear_logprobs
from miles.losses.linear.nucleus import Nucleus

__all__ = ["LogprobOutput", "Nucleus", "explain", "linear_logprobs"]
