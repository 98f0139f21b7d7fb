"""How a pack lies: which of its tokens belong to which sequence, whatever its index arrays hold.

Sequence s owns tokens query_offsets[s] : query_offsets[s + 1]. With n of them and context_lens[s] tokens in the cache,
its row i stands at position context_lens[s] - n + i. Under jit the arrays cannot be checked, so they are made harmless:
offsets are clamped to the tokens that there are and may not decrease, contexts to what can exist.
"""

import itertools

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# A context longer than this cannot exist in memory; bounding it keeps sums of positions inside int32.
MAX_CONTEXT = 2**30

# Up to so many sequences, GPU kernels and what goes before them write out what they do over them: XLA fuses that, where
# a reduction, or an array that several gathers share, is one more kernel before ours, of 2 us and its launch.
FEW_SEQUENCES = 8


def harmless_offsets(query_offsets: Int[Array, "*batch seqs_plus_1"], tokens: int) -> Int[Array, "*batch seqs_plus_1"]:
    """Offsets in [0, tokens] that do not decrease: each is at least all before it."""
    offsets = jnp.clip(query_offsets, 0, tokens)
    count = offsets.shape[-1]
    if isinstance(count, int) and count <= FEW_SEQUENCES + 1:
        return jnp.stack(list(itertools.accumulate(jnp.unstack(offsets, axis=-1), jnp.maximum)), axis=-1)
    return lax.cummax(offsets, axis=offsets.ndim - 1)


def harmless_contexts(context_lens: Int[Array, "*batch seqs"]) -> Int[Array, "*batch seqs"]:
    """Contexts that can exist."""
    return jnp.clip(context_lens, 0, MAX_CONTEXT)


class Owners:
    """Which sequence owns each token of a pack, or of each pack of *batch.

    Attributes:
      offsets: the query_offsets, harmless.
      token: each token's number in its pack, the same in all.
      owned: whether a sequence owns it.
      seq: the sequence that owns it; one of those that there are even where none does.
    """

    offsets: Int[Array, "*batch seqs_plus_1"]
    token: Int[Array, "*ones tokens"]
    owned: Bool[Array, "*batch tokens"]
    seq: Int[Array, "*batch tokens"]

    def __init__(self, query_offsets: Int[Array, "*batch seqs_plus_1"], tokens: int):
        self.offsets = harmless_offsets(query_offsets, tokens)
        self.token = jnp.arange(tokens, dtype=jnp.int32).reshape(*[1] * (self.offsets.ndim - 1), tokens)
        begun = jnp.expand_dims(self.offsets, -1) <= jnp.expand_dims(self.token, -2)
        self.owned = begun[..., 0, :] & ~begun[..., -1, :]
        # Each offset between two sequences, at or before the token, is one more sequence that lies behind.
        self.seq = jnp.sum(begun[..., 1:-1, :], axis=-2, dtype=jnp.int32)

    def of(self, array: Array) -> Array:
        """What an array [*batch, seqs, ...] says of each token's sequence, [*batch, tokens, ...]; 0 without any."""
        axis = self.seq.ndim - 1
        if array.shape[axis] == 0:
            return jnp.zeros((*self.seq.shape, *array.shape[axis + 1 :]), array.dtype)
        index = self.seq.reshape(*self.seq.shape, *[1] * (array.ndim - self.seq.ndim))
        return jnp.take_along_axis(array, index, axis=axis, mode="clip")

    def first(self) -> Int[Array, "*batch tokens"]:
        """The first token of the sequence that owns each token."""
        return self.of(self.offsets[..., :-1])

    def end(self) -> Int[Array, "*batch tokens"]:
        """The token after the last of the sequence that owns each token."""
        return self.of(self.offsets[..., 1:])

    def positions(self, context_lens: Int[Array, "*batch seqs"]) -> Int[Array, "*batch tokens"]:
        """Where each token stands in its sequence, below 0 if the context is too short; anything if none owns it."""
        return self.of(harmless_contexts(context_lens)) - self.end() + self.token
