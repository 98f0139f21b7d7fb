"""What rows see, for `ragged_paged_prefill`: `key_ranges` for every mask that is one interval of keys a row, and trees.

Row i of a sequence with n new tokens stands at position p = context_len - n + i; keys count from the first of its
sequence. Each function makes the interval lo <= j < hi of every row of a pack, int32 [*batch, tokens, 2]:

    causal     j <= p                              lo = 0               hi = p + 1
      window   j <= p and j > p - W                lo = p - W + 1       hi = p + 1
    chunked    j <= p and j // C == p // C         lo = p // C * C      hi = p + 1
    full       all                                 lo = 0               hi = context_len
    prefix     j <= p or j < m                     lo = 0               hi = max(p + 1, m)
    spans      row and key in one span [s, e) too  lo = min(lo, s)      hi = max(hi, e)

cut at [0, context_len]; a row that no sequence owns gets an empty interval. A tree over the newest tokens is no
interval, and goes on top of one: `tree` makes the `tree_mask`.

Common arguments, as `ragged_paged_prefill` takes them; any integer dtype, made harmless in the same way:
  context_lens [*batch, seqs]: tokens of each sequence in the cache, this chunk included.
  query_offsets [*batch, seqs + 1]: sequence s owns tokens query_offsets[s] : query_offsets[s + 1].
  tokens: how many the pack has; static.
All raise ValueError or TypeError that names the argument where a shape or dtype does not fit. A width (`window`,
`chunk`) is an integer or an integer array of shape [], also traced, so that a scan over layers of several widths is one
program: a layer that sees everything before it has a width of 2**30. An array's value below 1 counts as 1.
"""

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from paged_prefill.primitive import checks
from paged_prefill.primitive.attention import visible_keys
from paged_prefill.primitive.packing import MAX_CONTEXT, Owners, harmless_contexts

BITS = 32  # of a word of a tree mask


def positions(
    context_lens: Int[Array, "*batch seqs"], query_offsets: Int[Array, "*batch seqs_plus_1"], tokens: int
) -> Int[Array, "*batch tokens"]:
    """Where each token stands in its sequence, for rotary embeddings; -1 where no sequence owns the token.

    A token of a chunk longer than its context has no place there: it counts on below 0.
    """
    pack = _Pack(context_lens, query_offsets, tokens)
    return jnp.where(pack.owners.owned, pack.position, -1)


def causal(
    context_lens: Int[Array, "*batch seqs"],
    query_offsets: Int[Array, "*batch seqs_plus_1"],
    tokens: int,
    window: int | Int[Array, ""] | None = None,
) -> Int[Array, "*batch tokens 2"]:
    """Key ranges of what the operation does without any: the keys up to the row's own, or the last `window` of them.

    For windows that are traced: gpt-oss, Gemma 3 and 4 alternate layers with a window and without.
    """
    pack = _Pack(context_lens, query_offsets, tokens)
    return pack.ranges(*visible_keys(pack.position, _width("window", window)))


def chunked(
    context_lens: Int[Array, "*batch seqs"],
    query_offsets: Int[Array, "*batch seqs_plus_1"],
    tokens: int,
    chunk: int | Int[Array, ""],
) -> Int[Array, "*batch tokens 2"]:
    """Key ranges of local attention: the keys up to the row's own that lie in one chunk of `chunk` positions with it.

    Llama 4's local layers, with a chunk of 8192 (`attention_chunk_size`). It is no sliding window: the first row of a
    chunk of positions sees itself only. What one call adds to the cache may begin and end anywhere.
    """
    pack = _Pack(context_lens, query_offsets, tokens)
    chunk = checks.width_of("chunk", chunk, MAX_CONTEXT)
    lo, hi = visible_keys(pack.position, None)
    return pack.ranges(jnp.maximum(pack.position, 0) // chunk * chunk, hi)


def full(
    context_lens: Int[Array, "*batch seqs"], query_offsets: Int[Array, "*batch seqs_plus_1"], tokens: int
) -> Int[Array, "*batch tokens 2"]:
    """Key ranges of attention that is not causal: every row sees all keys of its sequence.

    Encoders, and cross attention, where the cache holds what is attended to and context_lens may be shorter than the
    chunk.
    """
    pack = _Pack(context_lens, query_offsets, tokens)
    return pack.ranges(jnp.zeros_like(pack.position), pack.context)


def prefix(
    context_lens: Int[Array, "*batch seqs"],
    query_offsets: Int[Array, "*batch seqs_plus_1"],
    tokens: int,
    prefix_lens: Int[Array, "*batch seqs"],
) -> Int[Array, "*batch tokens 2"]:
    """Key ranges of a prefix-LM (T5's, arXiv 1910.10683; PaliGemma): causal, and every row sees the first keys.

    Args:
      prefix_lens: how many keys of each sequence all of its rows see. A chunk that ends inside the prefix cannot see
        what is not in the cache yet: the prefix belongs into one chunk.
    """
    pack = _Pack(context_lens, query_offsets, tokens, prefix_lens=(prefix_lens, ("seqs",)))
    lo, hi = visible_keys(pack.position, None)
    return pack.ranges(lo, jnp.maximum(hi, pack.owners.of(pack.arrays["prefix_lens"])))


def spans(
    context_lens: Int[Array, "*batch seqs"],
    query_offsets: Int[Array, "*batch seqs_plus_1"],
    tokens: int,
    spans: Int[Array, "*batch seqs n 2"],
    window: int | Int[Array, ""] | None = None,
    inside_window: bool = False,
) -> Int[Array, "*batch tokens 2"]:
    """Key ranges of causal attention in which the tokens of a span, an image say, also see each other.

    Two rules are in use where there is a window: `(causal and window) or span` (vLLM's, for most models), and
    `(causal or span) and window` (Gemma 4, and Gemma 3 in today's transformers): a span shows a row what comes after
    it, but nothing left of its window. Gemma 3's layers without a window have spans as well, Gemma 4's are causal.

    Args:
      spans: positions start : end of each sequence's spans, in any order; start >= end is none. Where spans overlap, a
        row sees all that hold it. A chunk that ends inside a span cannot see what is not in the cache yet.
      window: how many keys up to its own a row sees at most, by causality; None for all.
      inside_window: whether the second rule is meant.
    """
    checks.check_flag("inside_window", inside_window)
    pack = _Pack(context_lens, query_offsets, tokens, spans=(spans, ("seqs", "n", "2")))
    lo, hi = visible_keys(pack.position, _width("window", window))
    start, end = jnp.unstack(pack.owners.of(pack.arrays["spans"]), axis=-1)  # [*batch, tokens, n]
    position = jnp.expand_dims(pack.position, -1)
    inside = (start <= position) & (position < end)
    hi = jnp.maximum(hi, jnp.max(jnp.where(inside, end, 0), axis=-1, initial=0))
    if not inside_window:
        lo = jnp.minimum(lo, jnp.min(jnp.where(inside, start, MAX_CONTEXT), axis=-1, initial=MAX_CONTEXT))
    return pack.ranges(lo, hi)


def tree(
    parents: Int[Array, "*batch tokens"], query_offsets: Int[Array, "*batch seqs_plus_1"], words: int = 2
) -> UInt32[Array, "*batch tokens words"]:
    """The tree mask of drafts that are verified together: of its chunk, a token sees its ancestors and itself.

    Speculative decoding with trees (SpecInfer, arXiv 2305.09781; Medusa, arXiv 2401.10774; EAGLE). All that stands in
    the cache before the chunk is seen as ever; a draft's position, and with it its key's slot, is its place in the
    chunk, while rotary embeddings want its depth.

    Args:
      parents: for each token the number of its parent, counted from the first new token of its own sequence, and
        before it; -1, and whatever is no token of the chunk, for none. A chunk that is no tree is a chain: token i has
        parent i - 1.
      words: how many words of 32 tokens the mask has. A sequence's tokens from number 32 * words on see by causality
        alone, so trees have at most 32 * words tokens, while a longer chain, a prefill in the same pack, is right.

    Returns:
      Bit k % 32 of word k // 32 says whether a row sees token k of its chunk. No bit where no sequence owns the token.
    """
    words = checks.integer("words", words, least=1)
    arrays = checks.index_arrays(parents=(parents, ("tokens",)), query_offsets=(query_offsets, ("seqs + 1",)))
    parents = arrays["parents"]
    owners = Owners(arrays["query_offsets"], parents.shape[-1])
    first = owners.first()
    own = jnp.expand_dims(owners.token - first, -1)  # [*batch, tokens, 1]
    bit = jnp.left_shift(jnp.uint32(1), (own % BITS).astype(jnp.uint32))
    word = lax.broadcasted_iota(jnp.int32, (*own.shape[:-1], words), own.ndim - 1)
    seen = jnp.where(own // BITS == word, bit, jnp.uint32(0))
    # Pointer jumping: after k rounds a token has seen 2**k - 1 ancestors and points at the next, a root at itself.
    has_parent = (parents >= 0) & (parents < owners.end() - first)
    ancestor = jnp.where(has_parent, first + parents, owners.token)
    for _ in range((BITS * words - 1).bit_length()):
        seen |= jnp.take_along_axis(seen, jnp.expand_dims(ancestor, -1), axis=-2, mode="clip")
        ancestor = jnp.take_along_axis(ancestor, ancestor, axis=-1, mode="clip")
    seen = jnp.where(own < BITS * words, seen, ~jnp.uint32(0))
    return jnp.where(jnp.expand_dims(owners.owned, -1), seen, jnp.uint32(0))


class _Pack:
    """The rows of a pack: whose they are, where each stands, and how long its context is."""

    def __init__(self, context_lens, query_offsets, tokens, **others):
        """`others` are further index arrays of each sequence, as `checks.index_arrays` takes them."""
        self.arrays = checks.index_arrays(
            context_lens=(context_lens, ("seqs",)), query_offsets=(query_offsets, ("seqs + 1",)), **others
        )
        self.owners = Owners(self.arrays["query_offsets"], checks.size_of("tokens", tokens))
        self.position = self.owners.positions(self.arrays["context_lens"])
        self.context = self.owners.of(harmless_contexts(self.arrays["context_lens"]))

    def ranges(self, lo, hi):
        """Key ranges from the intervals of all rows."""
        lo, hi = (jnp.clip(x, 0, self.context) for x in (lo, hi))
        return jnp.where(jnp.expand_dims(self.owners.owned, -1), jnp.stack([lo, hi], axis=-1), 0)


def _width(name, width):
    return None if width is None else checks.width_of(name, width, MAX_CONTEXT)
