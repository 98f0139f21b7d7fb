"""The optional operands in the Triton kernel without a GPU, under Triton's interpreter, alone and combined.

On GPUs, gpu_second_form_test.py runs them.
"""

from dataclasses import replace
from unittest import mock

from absl.testing import absltest, parameterized

from paged_prefill import PrefillPageAttentionConfig
from paged_prefill.lowering.tiles import Parts
from paged_prefill.tests import poisoned, triton_stand_ins
from paged_prefill.tests.append_test import QUANTISED
from paged_prefill.tests.triton_test import HAS_TRITON, WithInterpreter

# Tiles of 16 rows, 8 tokens of 2 heads: chunks are several of them, and contexts several blocks, each two edges.
SMALL_TILES = PrefillPageAttentionConfig(block_q=8, block_kv=32, num_splits=1)
SPLIT = PrefillPageAttentionConfig(block_q=8, block_kv=16, num_splits=3)
SIZES = dict(page_size=4, head_dim=16, value_dim=12, tokens_before=2, tokens_after=3)
LATENT = dict(latent=True, value_dim=12)
LONG = ((21, 70), (1, 44), (5, 0), (7, 3))
# Of few rows: keys between those that are seen, which no row sees.
RANGES_WITH_HOLES = dict(key_ranges=True, sequences=((2, 90), (3, 120), (2, 70), (4, 110)))
UNEVEN = ((1, 100), (1, 9), (3, 40), (11, 61), (1, 0), (2, 1))


@absltest.skipUnless(HAS_TRITON, "Triton is not installed")
class SecondFormTest(WithInterpreter):
    def check(self, seed, kind, *, cfg=SMALL_TILES, vmapped=None, **parameters):
        if kind.get("latent"):
            parameters["value_dim"] = kind["value_dim"]
        kind = dict(seed=seed, sequences=LONG) | SIZES | kind
        self.interpreter.submit(
            triton_stand_ins.check_second_form_interpreted, kind, dict(parameters, cfg=cfg), vmapped
        ).result()

    @parameterized.named_parameters(
        ("key_ranges", dict(key_ranges=True)),
        ("key_ranges_with_holes", RANGES_WITH_HOLES),
        ("key_ranges_with_holes_bfloat16", dict(RANGES_WITH_HOLES, dtype="bfloat16", page_size=32)),
        ("tree_mask", dict(tree_words=1)),
        ("tree_mask_of_several_words", dict(tree_words=3, sequences=((70, 90), (1, 9), (40, 9)))),
        ("sinks", dict(sinks=True)),
        ("sinks_of_any_size", dict(sinks=poisoned.EXTREME_SINKS)),
        ("layer", dict(layers=3)),
        ("latent", LATENT),
        ("key_ranges_bfloat16", dict(key_ranges=True, dtype="bfloat16")),
    )
    def test_alone(self, kind):
        self.check(0, kind)

    @parameterized.product(dtype=QUANTISED, granularity=poisoned.GRANULARITIES)
    def test_quantised_caches(self, dtype, granularity):
        query = ("float32", "bfloat16", "float16")[
            (QUANTISED.index(dtype) + poisoned.GRANULARITIES.index(granularity)) % 3
        ]
        scales = dict(key_scale=granularity, value_scale=granularity)
        self.check(1, dict(dtype=query, cache_dtype=dtype, **scales), attn_logits_soft_cap=3.0)

    def test_scales_of_two_granularities_and_one_that_is_absent(self):
        for scales in (dict(key_scale="slot", value_scale="tensor"), dict(value_scale="head")):
            self.check(2, dict(cache_dtype="int8", **scales), softmax_scale=-(2.0**-12), sliding_window=40)

    @parameterized.named_parameters(
        ("pskd", "pskd", dict(key_scale="slot", value_scale="head", layers=2)),
        ("pksd", "pksd", dict(key_scale="tensor", value_scale="slot")),
        ("interleaved", "ps(k2)d", dict(key_scale="slot", value_scale="slot", layers=2)),
        ("stacked", "p2ksd", dict(key_scale="head", value_scale="tensor")),
        ("stacked_by_slot", "p2skd", dict(key_scale="slot", value_scale="slot")),
    )
    def test_caches_as_others_lay_them(self, name, scales):
        kind = dict(cache_dtype="int8", value_dim=16, sequences=((9, 40), (1, 33)), **scales)
        self.check(9, kind, cache_layout=name)

    def test_latent_caches_as_others_lay_them(self):
        self.check(10, dict(LATENT, kv_heads=1, sequences=((9, 40), (1, 33))), cache_layout="pskd")

    @parameterized.parameters(("int8", "bfloat16", "head"), ("float8_e4m3fn", "bfloat16", "slot"))
    def test_values_whose_features_warps_take_by_turns(self, dtype, query, granularity):
        scales = dict(key_scale=granularity, value_scale=granularity)
        self.check(11, dict(dtype=query, cache_dtype=dtype, value_dim=64, sequences=((1, 90), (2, 40)), **scales))

    def test_small_values_in_float16(self):
        """A weight times a small scale is no normal number of float16."""
        self.interpreter.submit(check_small_values).result()

    def test_warps_that_share_columns(self):
        """As on Hopper, where the kernel's products are in branches."""
        self.interpreter.submit(check_shared_columns).result()

    @parameterized.named_parameters(
        ("bfloat16", dict(dtype="bfloat16", sinks=True), dict(sliding_window=70)),
        ("float16", dict(dtype="float16", value_dim=33), {}),
        ("ranges_with_holes", dict(RANGES_WITH_HOLES, dtype="float16"), {}),
        ("int8", dict(dtype="bfloat16", cache_dtype="int8", key_scale="head", value_scale="head", value_dim=64), {}),
        ("float8_slots", dict(dtype="bfloat16", cache_dtype="float8_e5m2", key_scale="slot", value_scale="slot"), {}),
    )
    def test_warps_that_share_keys(self, kind, parameters):
        """Contexts end before some warps have a key, with all, and behind several blocks."""
        self.interpreter.submit(check_shared_keys, dict(SIZES, seed=15) | kind, parameters).result()

    def test_queries_that_float16_has_no_room_for(self):
        """Products of float8 numbers are float16's in short tiles, of whatever size bfloat16 queries are."""
        self.interpreter.submit(check_queries_of_any_size).result()

    @parameterized.named_parameters(
        ("float32", dict(cache_dtype="float8_e5m2", key_scale="head", value_scale="slot")),
        ("bfloat16", dict(dtype="bfloat16", cache_dtype="float8_e4m3fn", key_scale="slot", value_scale="slot")),
        ("float16", dict(dtype="float16", cache_dtype="int8", key_scale="slot", value_scale="slot")),
    )
    def test_ranges_tree_sinks_cap_quantised_and_layer_in_splits(self, kind):
        kind = dict(kind, key_ranges=True, tree_words=1, sinks=True, layers=2)
        self.check(3, kind, cfg=SPLIT, attn_logits_soft_cap=2.0, softmax_scale=0.7)

    def test_sinks_of_any_size_in_splits(self):
        self.check(11, dict(sinks=poisoned.EXTREME_SINKS), cfg=SPLIT)

    @parameterized.named_parameters(
        ("from_one", Parts(1, 4, 2), {}, {}),
        ("from_two", Parts(2, 5, 1), {}, dict(sliding_window=33)),
        ("of_ranges_and_trees", Parts(1, 3, 2), dict(key_ranges=True, tree_words=1, sinks=True), {}),
        ("of_a_latent_cache", Parts(1, 3, 1), dict(LATENT, q_heads=4, kv_heads=1), dict(sliding_window=40)),
    )
    def test_parts_of_long_tiles(self, parts, kind, parameters):
        """What a tile's absent parts would have written holds NaN here."""
        kind = dict(seed=13, sequences=UNEVEN) | SIZES | kind
        if "latent" in kind:
            parameters = dict(parameters, value_dim=kind["value_dim"])
        self.interpreter.submit(check_in_parts, parts, kind, dict(parameters, cfg=SPLIT)).result()

    def test_bits_of_a_sequence_in_parts_beside_others_and_alone(self):
        self.interpreter.submit(check_alone_in_parts, Parts(1, 6, 2)).result()

    @parameterized.parameters((2, 5), (5, 64), (7, 300))
    def test_merge(self, splits, value_dim):
        """By one row a program and by several, all parts or some at once; NaN of a row stays, and of what is not written not."""
        for cores, at_once in ((1, 2), (132, 64), (10, 2)):
            self.interpreter.submit(check_merge, splits, value_dim, cores, at_once).result()

    def test_tree_sinks_window_latent_and_quantised(self):
        kind = dict(tree_words=2, sinks=True, layers=2, cache_dtype="float8_e4m3fn", key_scale="slot")
        self.check(4, kind | LATENT, sliding_window=40)

    def test_packs_of_a_batch_with_pools_of_their_own_and_shared(self):
        kind = dict(layers=3, cache_dtype="int8", key_scale="slot", value_scale="head", sequences=((9, 14), (1, 20)))
        self.check(5, dict(kind, batch=(2, 2), pools=1))

    @parameterized.parameters((("key_cache",),), (("value_cache", "value_scale"),), (("query", "key_scale"),))
    def test_caches_of_which_one_has_pools_of_its_own(self, vmapped):
        kind = dict(cache_dtype="int8", key_scale="head", value_scale="slot", sequences=((9, 14),), poison=False)
        self.check(6, kind, vmapped=vmapped)

    @parameterized.named_parameters(
        ("deepseek", dict(q_heads=4, kv_heads=1, head_dim=576, value_dim=512, latent=True)),
        ("gemma_4", dict(q_heads=2, kv_heads=1, head_dim=512, value_dim=512, key_ranges=True)),
        ("narrow_rest", dict(head_dim=40, value_dim=32, latent=True)),
        ("values_beyond_the_main_part", dict(head_dim=40, value_dim=36, latent=True)),
        ("three_quarters", dict(head_dim=96, value_dim=80)),
        ("less_than_16", dict(head_dim=9, value_dim=5, latent=True)),
    )
    def test_dims(self, kind):
        self.check(7, dict(kind, sequences=((3, 40), (1, 20)), page_size=8))


def in_parts(parts, pieces=100):
    from paged_prefill.lowering.triton import host

    return mock.patch.multiple(host, parts_of_tiles=lambda *_: parts, PIECES_OF_SEQUENCE=pieces)


def check_in_parts(parts, kind, parameters):
    """In a process prepared by `interpret_triton`; also where a sequence of several tiles has fewer, for so many pieces."""
    for pieces in (100, 6):
        with in_parts(parts, pieces):
            triton_stand_ins.check_second_form_interpreted(kind, parameters)


def check_alone_in_parts(parts):
    """In a process prepared by `interpret_triton`."""
    import jax
    import numpy as np

    from paged_prefill import ragged_paged_prefill

    call = poisoned.make_call(14, UNEVEN, **SIZES, dtype="bfloat16")

    @jax.jit
    def attend(call):
        return ragged_paged_prefill(**call, cfg=SPLIT, platform="triton", return_lse=True)

    with in_parts(parts):
        together = attend(call)
        offsets = call["query_offsets"]
        for seq in range(len(UNEVEN)):
            contexts = np.where(np.arange(len(UNEVEN)) == seq, call["context_lens"], 0)
            rows = slice(offsets[seq], offsets[seq + 1])
            for whole, alone in zip(together, attend(dict(call, context_lens=contexts))):
                np.testing.assert_array_equal(whole[rows], alone[rows])


def check_merge(splits, value_dim, cores, at_once):
    """In a process prepared by `interpret_triton`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from paged_prefill.lowering.call import Device
    from paged_prefill.lowering.triton import merge

    rng, shape = np.random.default_rng(splits), (37, 3)
    out, lse = rng.normal(size=(*shape, splits, value_dim)), 3 * rng.normal(size=(*shape, splits))
    lse[rng.random(lse.shape) < 0.3] = -np.inf
    lse[5], lse[7, 1, 1] = -np.inf, np.nan
    sinks = np.where(rng.random(shape) < 0.5, rng.normal(size=shape), -np.inf)
    for sinks in (None, sinks):
        weights = np.exp(lse)
        total = weights.sum(-1) + (0 if sinks is None else np.exp(sinks))
        unseen = total == 0
        want = np.einsum("tgs,tgsf->tgf", weights, np.where(np.isneginf(lse)[..., None], 0, out))
        want = np.where(unseen[..., None], 0, want / np.where(unseen, 1, total)[..., None])
        want_lse = np.where(unseen, -np.inf, np.log(np.where(unseen, 1, total)))
        unwritten = np.where(np.isneginf(lse)[..., None], np.nan, out)
        run = jax.jit(lambda *x: merge.merge(*x[:2], jnp.float32, *x[2:] or (None,), Device("cuda", core_count=cores)))
        with mock.patch.multiple(merge, MERGED=32 * at_once, MERGED_AT_ONCE=at_once):
            merged, merged_lse = run(*(x.astype(np.float32) for x in (unwritten, lse, sinks) if x is not None))
        np.testing.assert_allclose(merged, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(merged_lse, want_lse, rtol=1e-5, atol=1e-6)


def check_small_values():
    """In a process prepared by `interpret_triton`."""
    import numpy as np

    from paged_prefill import ragged_paged_prefill
    from paged_prefill.tests import oracle

    for granularity in ("head", "slot"):
        scales = dict(key_scale=granularity, value_scale=granularity)
        call = poisoned.make_call(8, **SIZES, dtype="float16", cache_dtype="int8", **scales)
        with np.errstate(over="ignore"):  # of what is poison
            call["value_scale"] = call["value_scale"] * np.float32(2.0**-13)
        out, lse = ragged_paged_prefill(**call, cfg=SMALL_TILES, platform="triton", return_lse=True)
        oracle.assert_matches(call, out, lse)


def check_shared_columns():
    """In a process prepared by `interpret_triton`."""
    from paged_prefill.lowering.triton import constants, sizes

    config = PrefillPageAttentionConfig(block_q=32, block_kv=32, num_warps=8, num_splits=1)
    kind = dict(SIZES, seed=12, sequences=((37, 90), (1, 44), (5, 0)), kv_heads=2, q_heads=4, latent=True, value_dim=12)
    # Of 64 rows; and of half of a token's heads.
    more_heads = dict(kind, sequences=((3, 40), (1, 20), (0, 4)), kv_heads=1, q_heads=128, key_ranges=True)
    with (
        mock.patch.multiple(sizes, device_class=lambda device: "hopper", MOST_VALUES=8),
        mock.patch.object(constants, "MOST_VALUES", 8),
    ):
        triton_stand_ins.check_second_form_interpreted(kind, dict(cfg=config, value_dim=12))
        for num_splits in (1, 2):
            of_one = replace(config, block_q=1, num_splits=num_splits)
            triton_stand_ins.check_second_form_interpreted(more_heads, dict(cfg=of_one, value_dim=12))


def check_shared_keys(kind, parameters):
    """In a process prepared by `interpret_triton`."""
    from paged_prefill.lowering.triton import sizes

    cfg = PrefillPageAttentionConfig(block_q=4, block_kv=64, num_warps=4, num_splits=1)
    kind = dict(sequences=((1, 2), (3, 200), (2, 64), (1, 0), (4, 119))) | kind
    with mock.patch.object(sizes, "FEW_KEYS", 0):
        triton_stand_ins.check_second_form_interpreted(kind, dict(parameters, cfg=cfg))


def check_queries_of_any_size():
    """In a process prepared by `interpret_triton`."""
    import numpy as np

    from paged_prefill import ragged_paged_prefill
    from paged_prefill.tests import oracle

    scales = dict(key_scale="slot", value_scale="head")
    call = poisoned.make_call(11, **SIZES, dtype="bfloat16", cache_dtype="float8_e4m3fn", **scales)
    query = call["query"].astype(np.float32)
    for size in (2.0**-100, 2.0**60):
        rows = size * 2.0 ** np.array([-9, 0, 3])[np.arange(len(query)) % 3]
        call["query"] = (query * rows[:, None, None].astype(np.float32)).astype(call["query"].dtype)
        parameters = dict(softmax_scale=0.25 / size)
        out, lse = ragged_paged_prefill(**call, **parameters, cfg=SMALL_TILES, platform="triton", return_lse=True)
        oracle.assert_matches(call, out, lse, **parameters)


if __name__ == "__main__":
    absltest.main()
