"""The table of numerical cases that every kernel must pass: the edges of the operation and the grids of the field.

All of it runs in the XLA lowering (edges_test.py, peers_grid_test.py), and on a GPU in the kernels for GPUs
(gpu_test.py). Without a GPU or a TPU some of the edges run in interpreters: in the Triton kernel (triton_test.py) and in
the TPU kernel (mosaic_tpu_test.py). The Hopper kernel has none.
"""

from dataclasses import dataclass, replace
import zlib

import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, ragged_paged_prefill
from paged_prefill.tests import packs

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One call of the operation on a random pack. `sequences` are pairs (new tokens, context).

    `room`, if given, pads the pack to (tokens, seqs, pages_per_seq, num_pages) with tokens that no sequence owns,
    sequences without tokens and pages nobody uses, so that many cases are one compilation. `most_rows` bounds the rows
    that are compared, where all of them would take the reference too long.
    """

    name: str
    sequences: tuple[tuple[int, int], ...]
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    value_dim: int | None = None
    page_size: int = 8
    dtype: str = "float32"
    sliding_window: int | None = None
    attn_logits_soft_cap: float | None = None
    softmax_scale: float | None = None
    tokens_before: int = 0
    spare_pages: int = 3
    spare_columns: int = 2
    room: tuple[int, int, int, int] | None = None
    cfg: PrefillPageAttentionConfig | None = None
    most_rows: int | None = None

    @property
    def parameters(self) -> dict:
        """The parameters that change the result."""
        names = ("softmax_scale", "attn_logits_soft_cap", "sliding_window")
        return {name: getattr(self, name) for name in names}

    def pack(self, **overrides) -> packs.Pack:
        """The operands; `overrides` go to `make_pack`."""
        sequences, spare_pages, spare_columns, after = list(self.sequences), self.spare_pages, self.spare_columns, 0
        if self.room:
            tokens, seqs, pages_per_seq, num_pages = self.room
            sequences += [(0, 0)] * (seqs - len(sequences))
            needed = [-(-max(context, 0) // self.page_size) for _, context in sequences]
            spare_pages, spare_columns = num_pages - sum(needed), pages_per_seq - max(needed)
            after = tokens - self.tokens_before - sum(length for length, _ in sequences)
        arguments = dict(
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            page_size=self.page_size,
            dtype=jnp.dtype(self.dtype),
            sliding_window=self.sliding_window,
            spare_pages=spare_pages,
            spare_columns=spare_columns,
            tokens_before=self.tokens_before,
            tokens_after=after,
        )
        seed = zlib.crc32(self.name.encode())
        lengths, context_lens = zip(*sequences)
        return packs.make_pack(seed, lengths, context_lens, **(arguments | overrides))

    def rows(self, tokens: int):
        """The rows to compare: None for all, else a spread with both ends and random ones between."""
        if self.most_rows is None or tokens <= self.most_rows:
            return None
        rng = np.random.default_rng(0)
        spread = np.linspace(0, tokens - 1, self.most_rows // 2, dtype=np.int64)
        return np.unique(np.concatenate([spread, rng.integers(0, tokens, self.most_rows // 2)]))


def check(case: Case, attend=ragged_paged_prefill) -> None:
    """Runs a case and holds output and lse to the reference."""
    pack = case.pack()
    out, lse = attend(*pack, **case.parameters, cfg=case.cfg, return_lse=True)
    packs.assert_matches_reference(pack, out, lse, rows=case.rows(len(pack.query)), **case.parameters)


def named(cases) -> list[tuple[str, Case]]:
    """For `parameterized.named_parameters`."""
    return [(case.name, case) for case in cases]


def in_all_dtypes(*cases) -> list[Case]:
    """Each case in float32, bfloat16 and float16."""
    return [replace(case, name=f"{case.name}_{dtype}", dtype=dtype) for case in cases for dtype in DTYPES]


# Tiles and blocks smaller than the sequences, so that chunks are longer than a tile and no multiple of it.
SMALL_TILES = PrefillPageAttentionConfig(block_q=16, block_kv=32)
# One tile height: a small program that compiles fast, for tests of what has nothing to do with tiles.
ONE_HEIGHT = PrefillPageAttentionConfig(block_q=1, block_kv=8)
ROOM = (48, 6, 14, 48)

# A row of the page table for 2**31 + 2**16 keys, of which a window is seen.
ENDLESS = Case("endless", ((3, 70_000),), 2, 1, 8, page_size=2**16, sliding_window=50, spare_pages=0,
               spare_columns=2**15 - 1, cfg=SMALL_TILES)

BROKEN = Case("broken", ((1, 30), (9, 20), (2, 9), (13, 29), (7, 34), (1, 17)), cfg=SMALL_TILES)


def check_broken(attend, case=BROKEN, numbers=(np.nan, np.inf, -np.inf)) -> None:
    """Holds `attend(pack)` to what NaN and Inf may do. Of the case's sequences, which are those of `BROKEN`, a query of
    number 1 is broken, a key of number 3 and a value of number 4, each in the middle of the chunk.

    They never reach another sequence, on any bit. A row that sees NaN says so in its lse: -inf is for rows that saw no
    key. A value reaches the rows that see its key; those before them in the chunk may get NaN too, in its feature.
    """
    pack = case.pack()
    offsets, clean = np.asarray(pack.query_offsets), [np.asarray(x, np.float32) for x in attend(pack)]
    token, key, value = ((offsets[seq] + offsets[seq + 1]) // 2 for seq in (1, 3, 4))

    def slot(seq, token):  # where the key of this token is
        position = pack.context_lens[seq] - (offsets[seq + 1] - token)
        return pack.page_indices[seq, position // case.page_size], position % case.page_size

    for number in numbers:
        broken = pack._replace(
            query=pack.query.at[token, :, 0].set(number),
            key_cache=pack.key_cache.at[:, *slot(3, key), 0].set(number),
            value_cache=pack.value_cache.at[:, *slot(4, value), 0].set(number),
        )
        out, lse = (np.asarray(x, np.float32) for x in attend(broken))
        logit = np.asarray(pack.query, np.float32)[key : offsets[4], :, 0] * number * (case.softmax_scale or 1)
        sees_nan = np.zeros(lse.shape, bool)
        sees_nan[token] = True
        sees_nan[key : offsets[4]] = ~(logit < 0)  # a logit of -inf weighs nothing
        np.testing.assert_array_equal(np.isnan(lse), sees_nan)
        np.testing.assert_array_equal(np.isnan(out).all(-1), sees_nan)
        same = np.ones(out.shape, bool)  # all bits, but for the sequences of query and key, and the value's feature
        same[offsets[1] : offsets[2]] = same[offsets[3] : offsets[4]] = same[offsets[4] : offsets[5], :, 0] = False
        np.testing.assert_array_equal(out[same], clean[0][same])
        np.testing.assert_array_equal(lse[same[..., 1]], clean[1][same[..., 1]])
        assert not np.isfinite(out[value : offsets[5], :, 0]).any()


def _edge(name, *sequences, **changes) -> Case:
    return Case(name, sequences, **(dict(room=ROOM, page_size=4, head_dim=16, cfg=SMALL_TILES) | changes))


EDGES = in_all_dtypes(
    # More new tokens than the context holds: the first rows stand before key 0.
    _edge("context_shorter_than_chunk", (10, 4), (3, 1), (20, 17)),
    _edge("context_empty", (5, 0), (7, 20), (1, 0)),
    _edge("no_new_tokens", (0, 20), (4, 9), (0, 0), (0, 5), (6, 6)),
    _edge("one_token", (1, 1)),
    _edge("one_token_each", (1, 1), (1, 33), (1, 4), (1, 5), (1, 50)),
    _edge("chunk_longer_than_a_tile", (37, 45)),
    _edge("chunk_is_the_context", (16, 16), (17, 17), (15, 15)),
    _edge("tokens_without_sequence", (9, 30), (8, 8), tokens_before=5),
    _edge("all_mixed", (1, 44), (0, 7), (21, 34), (5, 2), (1, 1), (7, 21), tokens_before=2),
) + in_all_dtypes(
    _edge("window", (20, 50), (1, 40), (3, 3), (5, 2), (0, 9), sliding_window=7),
    _edge("window_of_one", (20, 50), (1, 40), (3, 3), (5, 2), (0, 9), sliding_window=1),
    _edge("window_past_context", (20, 50), (1, 40), (3, 3), (5, 2), sliding_window=2**31 - 1),
    _edge("soft_cap_and_window", (20, 50), (1, 40), (3, 3), (5, 2), sliding_window=19, attn_logits_soft_cap=2.0),
    # Logits in the hundreds over a cap of 1: exp-form soft caps give NaN here (vllm#56578).
    _edge("soft_cap_far_exceeded", (20, 50), (1, 40), (3, 3), attn_logits_soft_cap=1.0, softmax_scale=40.0),
    _edge("value_dim_is_smaller", (20, 50), (1, 40), (5, 2), head_dim=24, value_dim=8),
    _edge("value_dim_is_larger", (20, 50), (1, 40), (5, 2), head_dim=8, value_dim=24),
) + [
    _edge("scale_is_zero", (20, 50), (1, 40), softmax_scale=0.0),
    _edge("scale_is_negative", (20, 50), (1, 40), softmax_scale=-0.5, dtype="bfloat16"),
    _edge("scale_is_large", (20, 50), (1, 40), softmax_scale=1e6),
    # One slot a page, pages no multiple of a power of two, one page for all, and pages above the key block.
    _edge("page_of_1", (20, 31), (1, 14), page_size=1, room=(48, 6, 33, 48), dtype="float16"),
    _edge("page_of_3", (20, 50), (1, 40), page_size=3, room=(48, 6, 18, 48)),
    _edge("page_of_7", (20, 50), (1, 40), page_size=7, dtype="bfloat16"),
    _edge("page_of_64", (20, 50), (1, 40), (2, 65), page_size=64, room=(48, 6, 2, 7), dtype="float16"),
    _edge("page_of_101", (20, 150), (1, 40), page_size=101, room=(48, 6, 2, 5)),
    # The last row of the page table is full, and nothing comes after it.
    _edge("no_spare_page_or_column", (9, 50), (9, 13), (9, 50), room=None, spare_pages=0, spare_columns=0),
    # jaxlib 0.10.2 miscompiles page gather + repeat of one KV head to many query heads under jit.
    _edge("one_kv_head_for_8", (20, 50), (1, 40), (5, 2), q_heads=8, kv_heads=1),
    _edge("one_kv_head_for_8_narrow", (20, 50), (1, 40), q_heads=8, kv_heads=1, dtype="bfloat16"),
    _edge("one_kv_head_for_32", (20, 50), (1, 40), q_heads=32, kv_heads=1),
    _edge("one_head", (20, 50), (1, 40), q_heads=1, kv_heads=1, dtype="float16"),
    _edge("odd_heads", (20, 50), (1, 40), q_heads=15, kv_heads=3, head_dim=5, value_dim=3),
]


def _product_pack(queries, keys) -> tuple[tuple[int, int], ...]:
    return tuple((q, k) for k in keys for q in queries)


# A grid's (queries, keys) rows stand together in one pack: that is how they are served, one compilation covers them
# all, and properties_test.py shows that a sequence's bits do not depend on its neighbours. Heads, dims, pages, dtypes
# and parameters are a covering selection: each value appears, and each dtype in each grid, not each product of them.
_FLASHINFER = dict(most_rows=400)
FLASHINFER_PAGED = [
    # Batches of 12 and 17: all queries x keys, where more queries than keys leave rows without a key.
    Case("flashinfer_batch12_page1", _product_pack((37, 17, 127), (54, 97, 512, 2048)), 4, 4, 64, page_size=1,
         dtype="float16", **_FLASHINFER),
    Case("flashinfer_batch12_page5", _product_pack((37, 17, 127), (54, 97, 512, 2048)), 32, 4, 128, page_size=5,
         dtype="bfloat16", **_FLASHINFER),
    Case("flashinfer_batch17_page16", _product_pack((37, 17, 127, 577), (54, 97, 512, 2048)) + ((1, 2048),), 4, 4, 256,
         page_size=16, dtype="float32", **_FLASHINFER),
    Case("flashinfer_batch17_page5", _product_pack((37, 17, 127, 577), (54, 97, 512)) + ((1, 97),) * 5, 32, 4, 64,
         page_size=5, dtype="float16", **_FLASHINFER),
]

_SHORT = ((11, 11), (12, 12), (99, 99), (1763, 1763))
FLASHINFER_FA3 = [
    Case("fa3_heads_1_1", _SHORT, 1, 1, 64, page_size=1, dtype="float16"),
    Case("fa3_heads_4_1", _SHORT, 4, 1, 128, page_size=16, dtype="bfloat16", attn_logits_soft_cap=30.0, most_rows=600),
    Case("fa3_heads_4_4", _SHORT, 4, 4, 256, page_size=1, dtype="float32", most_rows=600),
    Case("fa3_heads_8_1", _SHORT, 8, 1, 64, page_size=16, dtype="float32", attn_logits_soft_cap=30.0, most_rows=600),
    Case("fa3_heads_8_4", _SHORT, 8, 4, 64, page_size=1, dtype="bfloat16", most_rows=600),
    Case("fa3_heads_8_8", _SHORT, 8, 8, 64, page_size=16, dtype="float16", attn_logits_soft_cap=30.0, most_rows=600),
    # The lengths themselves are the point: few heads, a small head_dim, and a sample of the rows.
    Case("fa3_9999", ((9999, 9999),), 1, 1, 64, page_size=1, dtype="float32", attn_logits_soft_cap=30.0, most_rows=96),
    Case("fa3_32767", ((32767, 32767),), 1, 1, 64, page_size=16, dtype="bfloat16", most_rows=64),
]

FLASHINFER_WINDOW = [
    Case(f"flashinfer_window_{window}", _product_pack((1, 37, 47), (54, 397, 1177)), 4, 2, head_dim, page_size=page_size,
         dtype=dtype, sliding_window=window)
    for window, head_dim, page_size, dtype in ((14, 64, 1, "float16"), (34, 128, 5, "bfloat16"), (112, 64, 16, "float32"))
]

_KVCACHE = ((1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 20000), (128, 128),
            (256, 512), (2048, 3577))
FA3_KVCACHE = [
    Case("fa3_kvcache_mha", _KVCACHE, 2, 2, 64, page_size=16, dtype="float16", most_rows=500),
    Case("fa3_kvcache_mqa", _KVCACHE, 4, 1, 128, page_size=64, dtype="bfloat16", most_rows=500),
    Case("fa3_kvcache_gqa", _KVCACHE, 4, 2, 64, page_size=256, dtype="float32", most_rows=500),
]

_VLLM_MIXED, _VLLM_DECODE = ((1, 1328), (5, 18), (129, 463)), ((1, 523), (1, 37), (1, 2011))
VLLM = [
    Case("vllm_mixed_mha", _VLLM_MIXED, 4, 4, 128, page_size=16, dtype="bfloat16"),
    Case("vllm_mixed_gqa_cap", _VLLM_MIXED, 8, 2, 128, page_size=16, dtype="float16", attn_logits_soft_cap=50.0),
    Case("vllm_mixed_mqa_window_64", _VLLM_MIXED, 5, 1, 128, page_size=32, dtype="float32", sliding_window=64),
    Case("vllm_mixed_window_256_cap", _VLLM_MIXED, 8, 2, 256, page_size=16, dtype="bfloat16", sliding_window=256,
         attn_logits_soft_cap=50.0),
    Case("vllm_decode_mha_window_128", _VLLM_DECODE, 4, 4, 128, page_size=16, dtype="float32", sliding_window=128),
    Case("vllm_decode_gqa_cap", _VLLM_DECODE, 8, 2, 256, page_size=32, dtype="bfloat16", attn_logits_soft_cap=50.0),
    Case("vllm_decode_mqa", _VLLM_DECODE, 5, 1, 128, page_size=16, dtype="float16"),
]

_SGLANG = ((1, 128), (3, 20), (64, 64), (20, 20), (125, 125), (1024, 1024), (123, 522), (1, 511))
SGLANG = [
    Case("sglang_page_1", _SGLANG, 4, 2, 128, page_size=1, dtype="bfloat16", most_rows=700),
    Case("sglang_page_8", _SGLANG, 4, 2, 128, page_size=8, dtype="float16", most_rows=700),
    Case("sglang_page_64_window_cap", _SGLANG, 4, 2, 128, page_size=64, dtype="float32", sliding_window=512,
         attn_logits_soft_cap=20.0, most_rows=700),
]

GRIDS = FLASHINFER_PAGED + FLASHINFER_FA3 + FLASHINFER_WINDOW + FA3_KVCACHE + VLLM + SGLANG
