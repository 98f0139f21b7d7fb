"""The GPU kernels on a real GPU, held to the reference. Where there is no GPU, every test is skipped and says so."""

import contextlib
from dataclasses import replace
import functools
import itertools
import re
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, masks, ragged_paged_prefill
from paged_prefill.lowering.mosaic_gpu import host
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan
from paged_prefill.primitive.context import policy
from paged_prefill.tests import cases, oracle, packs, poisoned
from paged_prefill.tests.gpus import gpus_for

PLATFORMS = ("cuda", "triton")
# Random ranges of a few rows leave holes: keys between those of a tile that none of its rows sees.
FEW_ROWS = ((2, 300), (3, 500), (5, 200))
SEQUENCES = ((70, 300), (1, 513), (0, 40), (130, 130), (9, 4), (1, 1), (64, 128))


def fitted(case: cases.Case, platform: str) -> cases.Case:
    """The case nearest to `case` that the platform's kernel runs, with the sizes the kernel would choose."""
    case = replace(case, cfg=None)
    if platform == "triton":
        return case
    dims = dict(head_dim=case.head_dim, value_dim=case.value_dim)
    wide = {name: size and -(-size // 64) * 64 for name, size in dims.items()}
    return replace(case, dtype="bfloat16" if case.dtype == "float32" else case.dtype, **wide)


def on_each_platform(table):
    """(name, case, platform) for `named_parameters`; cases that come to the same on a platform once."""
    seen = {}
    for platform in PLATFORMS:
        for case in table:
            near = fitted(case, platform)
            name = f"{case.name.removesuffix(case.dtype)}_{near.dtype}_{platform}"
            seen.setdefault(name, (name, replace(near, name=name), platform))
    return list(seen.values())


def product(**values):
    """`parameterized.product` with values in the tests' names, so that pytest's -k can pick a platform."""
    combinations = [dict(zip(values, combination)) for combination in itertools.product(*values.values())]
    named = [dict(testcase_name=re.sub(r"\W+", "_", "_".join(map(str, c.values()))), **c) for c in combinations]
    return parameterized.named_parameters(*named)


def attend(pack, platform, **parameters):
    """One call, in memory that is NaN wherever the kernel does not write."""
    for size in (pack.query.size // pack.query.shape[-1] * pack.value_cache.shape[-1], pack.query.size):
        jnp.full(size, jnp.nan, pack.query.dtype).block_until_ready()
    return compiled(platform, **parameters)(*pack)


@functools.cache
def compiled(platform, **parameters):
    """The call as a jitted function, the same one each time: tests make several calls of one compilation."""
    return jax.jit(functools.partial(ragged_paged_prefill, platform=platform, return_lse=True, **parameters))


class GpuTest(parameterized.TestCase):
    def need(self, platform):
        gpus_for(self, hopper=platform == "cuda")

    @parameterized.named_parameters(on_each_platform(cases.EDGES + cases.GRIDS))
    def test_matches_reference(self, case, platform):
        self.need(platform)
        pack = case.pack()
        out, lse = attend(pack, platform, **case.parameters)
        rows = case.rows(len(pack.query))
        packs.assert_matches_reference(pack, out, lse, rows=rows, **case.parameters)
        exact, _ = packs.exact(pack, rows=rows, **case.parameters)
        kept = slice(None) if rows is None else rows
        got, want = np.asarray(out, np.float64)[kept], exact[kept]
        if np.any(want):
            self.assertLess(np.linalg.norm(got - want) / np.linalg.norm(want), 5e-3)

    @product(
        platform=PLATFORMS,
        shape=((4, 4, 64), (8, 2, 128), (5, 1, 64), (16, 2, 256), (8, 1, 128), (2, 2, 192), (4, 4, 112)),
        sliding_window=(None, 100),
    )
    def test_heads_and_dims(self, platform, shape, sliding_window):
        self.need(platform)
        q_heads, kv_heads, head_dim = shape
        case = cases.Case(f"heads_{shape}", SEQUENCES, q_heads, kv_heads, head_dim, page_size=16, dtype="bfloat16",
                          sliding_window=sliding_window, tokens_before=3)
        pack = case.pack()
        packs.assert_matches_reference(pack, *attend(pack, platform, **case.parameters), **case.parameters)

    @product(platform=PLATFORMS, shape=((32, 2, 128), (48, 4, 128)))
    def test_more_parts_of_tiles_than_cores(self, platform, shape):
        """A short prompt beside decode steps: its tiles' parts are more than the chip has cores, most without a key."""
        self.need(platform)
        case = cases.Case(f"parts_{shape}", ((62, 256), (1, 1163), (1, 17)), *shape, page_size=16, dtype="bfloat16",
                          room=(64, 3, 73, 128))  # fmt: skip
        pack = case.pack()
        packs.assert_matches_reference(pack, *attend(pack, platform, **case.parameters), **case.parameters)

    @product(platform=PLATFORMS, shape=((71, 1, 64), (24, 2, 128), (80, 2, 256), (4, 4, 64), (10, 2, 128), (32, 1, 256)))
    def test_decode_steps(self, platform, shape):
        """Heads of a token lie together in a tile, and what is behind the group's last is nobody's."""
        self.need(platform)
        case = cases.Case(f"steps_{shape}", ((1, 300), (0, 7), (1, 1000), (1, 64)), *shape, page_size=16,
                          dtype="bfloat16", tokens_before=3)  # fmt: skip
        pack = case.pack()
        packs.assert_matches_reference(pack, *attend(pack, platform, **case.parameters), **case.parameters)

    @product(platform=PLATFORMS, head_dim=(64, 128, 256), softmax_scale=(1.0, -3.0))
    def test_maxima_that_rise_from_block_to_block(self, platform, head_dim, softmax_scale):
        """Logits of a deviation of 8 to 48: later blocks pass the maximum of earlier ones by a lot, and by a little."""
        self.need(platform)
        case = cases.Case("rising", SEQUENCES + ((150, 1500),), 4, 2, head_dim, page_size=16, dtype="bfloat16",
                          softmax_scale=softmax_scale)
        pack = case.pack()
        packs.assert_matches_reference(pack, *attend(pack, platform, **case.parameters), **case.parameters)

    @product(page_size=(1, 5, 8, 16, 24, 128), dtype=("bfloat16", "float32"))
    def test_triton_takes_any_page_size(self, page_size, dtype):
        self.need("triton")
        case = cases.Case("pages", SEQUENCES, 8, 2, 128, page_size=page_size, dtype=dtype)
        pack = case.pack()
        packs.assert_matches_reference(pack, *attend(pack, "triton"))

    @product(platform=PLATFORMS, head_dim=(64, 128), soft_cap=(15.0, 50.0, 70.0), mean=(-400, 0, 60))
    def test_soft_cap_wherever_the_logits_lie(self, platform, head_dim, soft_cap, mean):
        """Logits inside of the cap and far outside, rows of a deviation of 1 beside rows of 20.

        The Hopper kernel has a way for each cap: tanh and a fixed maximum, a polynomial too, tanh and running maxima.
        """
        self.need(platform)
        case = cases.Case("cap", SEQUENCES + ((150, 1500),), 4, 2, head_dim, page_size=16, dtype="bfloat16",
                          attn_logits_soft_cap=soft_cap)
        pack = case.pack()
        pack = pack._replace(
            query=pack.query.at[1::2].multiply(20).at[..., 0].set(8),
            key_cache=pack.key_cache.at[..., 0].set(mean * head_dim**0.5 / 8),
        )
        packs.assert_matches_reference(pack, *attend(pack, platform, **case.parameters), **case.parameters)

    @product(platform=PLATFORMS, head_dim=(64, 128, 256), soft_cap=(30.0, 50.0), large=(None, 40, 400, -40, -400))
    def test_soft_cap_with_few_large_logits(self, platform, head_dim, soft_cap, large):
        """Small logits, and for some rows a few that are not: the Hopper kernel goes over to tanh at the first."""
        self.need(platform)
        case = cases.Case("few", ((130, 1500), (64, 2000), (1, 900), (70, 300)), 4, 2, head_dim, page_size=16,
                          dtype="bfloat16", attn_logits_soft_cap=soft_cap)
        pack = case.pack()
        key_cache, query = pack.key_cache.at[..., 0].set(0), pack.query.at[..., 0].set(0)
        if large is not None:
            key_cache = key_cache.at[:, ::7, 5, 0].set(8)
            query = query.at[::3, 1, 0].set(large * head_dim**0.5 / 8)
        pack = pack._replace(query=query, key_cache=key_cache)
        results = attend(pack, platform, **case.parameters)
        packs.assert_matches_reference(pack, *results, **case.parameters)
        chex.assert_trees_all_equal(attend(pack, platform, **case.parameters), results)

    @product(
        platform_and_cap=[(p, cap) for p in PLATFORMS for cap in (None, 15.0, 50.0, 70.0) if (p, cap) != ("cuda", 50.0)],
        softmax_scale=(None, 1.0, -3.0),
    )
    def test_a_row_has_the_same_bits_whatever_the_rows_beside_it(self, platform_and_cap, softmax_scale):
        """But for Hopper's polynomial at a cap of 50: a sequence's rows leave it together, and tanh has other errors."""
        platform, soft_cap = platform_and_cap
        self.need(platform)
        case = cases.Case("beside", ((100, 900),), 4, 2, 128, page_size=16, dtype="bfloat16")
        pack = case.pack()
        wild = pack._replace(query=pack.query.at[1::2].multiply(100))
        parameters = dict(attn_logits_soft_cap=soft_cap, softmax_scale=softmax_scale)
        results = [attend(each, platform, **parameters) for each in (pack, wild)]
        self.assertTrue(jnp.any(results[0][0][1::2] != results[1][0][1::2]))
        chex.assert_trees_all_equal(*[[array[::2] for array in result] for result in results])

    # Platform, head_dim, and warpgroups, which Triton has not, and for three of which wide heads leave no registers.
    TILES = [("triton", 64, 1), ("triton", 128, 1), ("triton", 256, 1), ("cuda", 256, 1), ("cuda", 256, 2)]
    TILES += [("cuda", head_dim, warpgroups) for head_dim in (64, 112, 128) for warpgroups in (1, 2, 3)]

    @product(tile=TILES, soft_cap=(None, 15.0, 50.0, 70.0))
    def test_a_sequence_has_the_same_bits_whatever_its_neighbours(self, tile, soft_cap):
        """Queries of every other sequence 40 times as large; tiles hold rows, and heads, that they do not own."""
        platform, head_dim, warpgroups = tile
        self.need(platform)
        cfg = None
        if platform == "cuda":
            block_kv = 64 if warpgroups == 3 or head_dim == 256 else 128
            cfg = PrefillPageAttentionConfig(block_q=32 * warpgroups if warpgroups < 3 else 64, block_kv=block_kv,
                                             num_warps=4 * (warpgroups + 1), num_stages=2)
        sequences = (70, 900), (1, 513), (40, 700), (130, 1130), (9, 400), (3, 1300), (64, 328)
        case = cases.Case("neighbours", sequences, 6, 2, head_dim, page_size=16, dtype="bfloat16",
                          attn_logits_soft_cap=soft_cap)
        pack = case.pack()
        seq = jnp.repeat(jnp.arange(len(sequences)), jnp.asarray([n for n, _ in sequences]))
        wild = pack._replace(query=jnp.where((seq % 2 == 1)[:, None, None], pack.query * 40, pack.query))
        results = [attend(each, platform, cfg=cfg, **case.parameters) for each in (pack, wild)]
        self.assertTrue(jnp.any(results[0][0][seq % 2 == 1] != results[1][0][seq % 2 == 1]))
        chex.assert_trees_all_equal(*[[array[seq % 2 == 0] for array in result] for result in results])

    @product(sizes=((1, 64, 3), (2, 64, 1), (8, 64, 4), (16, 128, 1)), head_dim=(64, 80, 128), soft_cap=(None, 30.0))
    def test_tiles_of_few_rows(self, sizes, head_dim, soft_cap):
        """They are columns of the products; a sequence has the same bits whatever its neighbours."""
        self.need("cuda")
        block_q, block_kv, num_splits = sizes
        cfg = PrefillPageAttentionConfig(block_q=block_q, block_kv=block_kv, num_warps=8, num_stages=2,
                                         num_splits=num_splits)  # fmt: skip
        sequences = (1, 900), (20, 513), (3, 700), (1, 1300), (9, 400), (0, 5), (1, 1)
        case = cases.Case("few", sequences, 4, 2, head_dim, page_size=16, dtype="bfloat16", tokens_before=3,
                          attn_logits_soft_cap=soft_cap)  # fmt: skip
        pack = case.pack()
        results = attend(pack, "cuda", cfg=cfg, **case.parameters)
        packs.assert_matches_reference(pack, *results, **case.parameters)
        own = jnp.arange(len(pack.query)) < pack.query_offsets[1]
        wild = pack._replace(query=jnp.where(own[:, None, None], pack.query, pack.query * 40))
        for one, other in zip(results, attend(wild, "cuda", cfg=cfg, **case.parameters)):
            chex.assert_trees_all_equal(one[own], other[own])

    @product(operands=("ranges", "tree", "both", "tree and window"),
             sizes=((64, 1, None), (128, 3, None), (128, 1, 50.0), (256, 1, 70.0), (256, 3, None)))
    def test_masks_match_the_reference(self, operands, sizes):
        """Random ranges and trees, with holes and rows that see nothing; NaN wherever no row looks."""
        self.need("cuda")
        head_dim, num_splits, soft_cap = sizes
        kind = dict(key_ranges=operands in ("ranges", "both"), tree_words=0 if operands == "ranges" else 2)
        window = dict(sliding_window=100) if operands == "tree and window" else {}
        sequences = SEQUENCES + ((40, 620), (4, 500), (0, 30), *FEW_ROWS)
        call = poisoned.make_call(5, sequences, q_heads=6, kv_heads=2, head_dim=head_dim, page_size=16,
                                  dtype="bfloat16", sinks=head_dim == 64, tokens_before=2, tokens_after=3,
                                  **kind, **window)
        cfg = PrefillPageAttentionConfig(num_splits=num_splits)
        self.assert_matches(call, cfg, attn_logits_soft_cap=soft_cap, **window)

    @product(kind=("causal", "chunked", "full", "prefix", "spans"), warpgroups=(2, 3))
    def test_mask_families_match_the_reference(self, kind, warpgroups):
        """Chunks long enough for blocks that every row sees whole, between those that need a mask."""
        self.need("cuda")
        call = poisoned.make_call(6, ((300, 1200), (1, 700), (130, 130)), q_heads=2, kv_heads=2, head_dim=128,
                                  page_size=16, dtype="bfloat16", poison=False)
        where = call["context_lens"], call["query_offsets"], len(call["query"])
        spans = np.asarray([[[950, 1030], [1100, 1190]], [[0, 9], [5, 5]], [[20, 100], [0, 0]]], np.int32)
        more = dict(chunked=[256], prefix=[np.asarray([1000, 3, 50], np.int32)], spans=[spans]).get(kind, [])
        call["key_ranges"] = np.asarray(getattr(masks, kind)(*where, *more))
        poisoned.poison_unseen(np.random.default_rng(0), call)
        self.assert_matches(call, PrefillPageAttentionConfig(block_q=64 * warpgroups, block_kv=64, num_stages=3,
                                                             num_warps=4 * (warpgroups + 1)))

    @product(sizes=((64, 64, 1), (128, 128, 1), (128, 192, 1), (128, 16, 3)), soft_cap=(None, 50.0),
             dtype=("bfloat16", "float16"))
    def test_sinks_of_any_size(self, sizes, soft_cap, dtype):
        """Sinks far above and below all logits, and -inf; rows that see no key, and tokens that no sequence owns."""
        self.need("cuda")
        head_dim, block_q, num_splits = sizes
        call = poisoned.make_call(8, SEQUENCES, q_heads=6, kv_heads=2, head_dim=head_dim, page_size=16, dtype=dtype,
                                  sinks=True, tokens_before=2, tokens_after=3, batch=(2,))
        call["sinks"][:] = np.float32([[-np.inf, -1e4, -1.0, 2.0, 1e4, 0.0], [0.5, -2.0, 90.0, -90.0, 3.0, 1.0]])
        warps = 4 * (3 if block_q < 192 else 4)
        cfg = PrefillPageAttentionConfig(block_q=block_q, block_kv=64, num_warps=warps, num_splits=num_splits)
        self.assert_matches(call, cfg, attn_logits_soft_cap=soft_cap)

    @product(kind=("causal", "window", "ranges"), block_kv=(64, 128), cores=(1, 3),
             caches=((128,), (96,), (80,), (128, "float8_e4m3fn", "head"), (128, "int8", "tensor"), (128, "float8_e5m2", "head")))
    def test_pieces_in_a_chain_have_the_bits_of_pieces_alone(self, kind, block_kv, cores, caches):
        """On few cores: each thread block goes from sequence to sequence, and from one block of keys to many."""
        self.need("cuda")
        window, (head_dim, *cache) = dict(sliding_window=90) if kind == "window" else {}, caches
        quantised = dict(zip(("cache_dtype", "key_scale", "value_scale"), (*cache, cache[1]))) if cache else {}
        call = poisoned.make_call(11, (*SEQUENCES, (200, 700)), q_heads=4, kv_heads=2, head_dim=head_dim, page_size=16,
                                  dtype="bfloat16", key_ranges=kind == "ranges", tokens_before=2, tokens_after=3,
                                  **window, **quantised)
        stages = None if cache else 3
        cfg = PrefillPageAttentionConfig(block_q=64, block_kv=block_kv, num_warps=12, num_stages=stages, num_splits=1)
        plan_of, results = host._plan, []
        for chains in (True, False):
            few = mock.patch.object(host, "_plan", lambda *args: replace(plan_of(*args), cores=cores))
            alone = contextlib.nullcontext() if chains else mock.patch.object(Plan, "chains", False)
            with few, alone:
                run = functools.partial(ragged_paged_prefill, platform="cuda", return_lse=True, cfg=cfg, **window)
                results.append(jax.jit(run)(**call))
        oracle.assert_matches(call, *results[0], **window)
        chex.assert_trees_all_equal(*results)

    @product(sizes=((64, 64, 12), (64, 128, 20), (256, 64, 12)), cores=(1, 3))
    def test_pieces_that_follow_one_another_have_the_bits_of_pieces_alone(self, sizes, cores):
        """Heads whose pieces are no chain: their loads run ahead, and of 64 features in another order."""
        self.need("cuda")
        head_dim, block_q, num_warps = sizes
        call = poisoned.make_call(11, (*SEQUENCES, (200, 700)), q_heads=4, kv_heads=2, head_dim=head_dim, page_size=16,
                                  dtype="bfloat16", tokens_before=2, tokens_after=3)
        cfg = PrefillPageAttentionConfig(block_q=block_q, block_kv=64, num_warps=num_warps, num_splits=1)
        plan_of, results = host._plan, []
        for few in (cores, 10**4):
            with mock.patch.object(host, "_plan", lambda *args, few=few: replace(plan_of(*args), cores=few)):
                run = functools.partial(ragged_paged_prefill, platform="cuda", return_lse=True, cfg=cfg)
                results.append(jax.jit(run)(**call))
        oracle.assert_matches(call, *results[0])
        chex.assert_trees_all_equal(*results)

    def assert_matches(self, call, cfg, **parameters):
        run = functools.partial(ragged_paged_prefill, platform="cuda", return_lse=True, cfg=cfg, **parameters)
        oracle.assert_matches(call, *jax.jit(run)(**call), **parameters)

    @product(operands=("ranges", "both"), num_splits=(1, 3))
    def test_masks_keep_what_no_row_sees_out_of_every_bit(self, operands, num_splits):
        self.need("cuda")
        words = 2 * (operands == "both")
        call = poisoned.make_call(7, (*FEW_ROWS, (1, 90), (40, 600)), q_heads=4, kv_heads=2, head_dim=128,
                                  page_size=16, dtype="bfloat16", key_ranges=True, tree_words=words)
        other = dict(call)
        poisoned.poison_unseen(np.random.default_rng(99), other)
        run = compiled("cuda", cfg=PrefillPageAttentionConfig(num_splits=num_splits))
        chex.assert_trees_all_equal(run(**call), run(**other))

    @product(head_dim=(64, 128, 256), soft_cap=(None, 50.0))
    def test_invariant_bits_are_the_same_alone_and_in_any_pack(self, head_dim, soft_cap):
        self.need("cuda")
        case = cases.Case("invariant", ((300, 900), (1, 513), (7, 400), (1, 2000)), 8, 2, head_dim, page_size=16,
                          dtype="bfloat16", attn_logits_soft_cap=soft_cap)
        pack = case.pack()
        run = jax.jit(functools.partial(ragged_paged_prefill, return_lse=True, attn_logits_soft_cap=soft_cap))
        with policy("invariant"):
            self.assertIn("mosaic_gpu", run.lower(*pack).as_text())
            want, offsets = run(*pack), np.asarray(pack.query_offsets)
            for seq in range(len(pack.context_lens)):
                rows, columns = slice(offsets[seq], offsets[seq + 1]), -(-int(pack.context_lens[seq]) // 16)
                got = run(pack.query[rows], pack.key_cache, pack.value_cache, pack.context_lens[seq : seq + 1],
                          pack.page_indices[seq : seq + 1, :columns], jnp.asarray([0, rows.stop - rows.start]))
                chex.assert_trees_all_equal(got, tuple(x[rows] for x in want))

    @product(platform=PLATFORMS, rows=(64, 128, 32), num_splits=(1, 3), page_size=(8, 256), sliding_window=(None, 200))
    def test_sizes(self, platform, rows, num_splits, page_size, sliding_window):
        """Every way to cut the work gives the same result, and the same bits each time."""
        self.need(platform)
        block_q = rows if platform == "cuda" else rows // 4  # Triton's tile holds all 4 heads of a group
        case = cases.Case("sizes", SEQUENCES + ((200, 1000),), 8, 2, 128, page_size=page_size, dtype="bfloat16",
                          sliding_window=sliding_window)
        num_warps = 12 if (platform, rows) == ("cuda", 128) else None  # of two warpgroups
        pack, cfg = case.pack(), PrefillPageAttentionConfig(block_q=block_q, num_warps=num_warps, num_splits=num_splits)
        results = attend(pack, platform, cfg=cfg, **case.parameters)
        packs.assert_matches_reference(pack, *results, **case.parameters)
        for _ in range(3):
            chex.assert_trees_all_equal(attend(pack, platform, cfg=cfg, **case.parameters), results)

    @product(sizes=((16, 192, 1), (16, 64, 3), (20, 256, 1), (20, 128, 1), (20, 64, 3)), page_size=(8, 256),
             sliding_window=(None, 200), soft_cap=(None, 50.0))
    def test_more_warpgroups(self, sizes, page_size, sliding_window, soft_cap):
        """Three compute, or four where heads have 64 features."""
        self.need("cuda")
        num_warps, block_q, num_splits = sizes
        cfg = PrefillPageAttentionConfig(block_q=block_q, block_kv=64, num_warps=num_warps, num_stages=5,
                                         num_splits=num_splits)
        case = cases.Case("more", SEQUENCES + ((200, 1000),), 8, 2, 128 if num_warps == 16 else 64, page_size=page_size,
                          dtype="bfloat16", sliding_window=sliding_window, attn_logits_soft_cap=soft_cap)
        pack = case.pack()
        results = attend(pack, "cuda", cfg=cfg, **case.parameters)
        packs.assert_matches_reference(pack, *results, **case.parameters)
        chex.assert_trees_all_equal(attend(pack, "cuda", cfg=cfg, **case.parameters), results)

    @product(platform=PLATFORMS, sliding_window=(None, 70))
    def test_what_no_row_sees_has_no_effect_on_any_bit(self, platform, sliding_window):
        self.need(platform)
        case = cases.Case("unseen", SEQUENCES, 4, 2, 64, page_size=16, dtype="bfloat16")
        results = []
        for poison in (0.0, np.nan, np.inf, -np.inf):
            pack = case.pack(poison=poison, sliding_window=sliding_window)
            for junk in (0, -1, 2**31 - 1):
                unneeded = jnp.isin(pack.page_indices, jnp.asarray(packs.JUNK_PAGES))
                pack = pack._replace(page_indices=jnp.where(unneeded, junk, pack.page_indices))
                results.append(attend(pack, platform, sliding_window=sliding_window))
        for result in results[1:]:
            chex.assert_trees_all_equal(result, results[0])

    @product(platform=PLATFORMS, head_dim=(64, 128, 256), num_splits=(1, 3), softmax_scale=(None, -0.3),
             soft_cap=(None, 15.0, 50.0, 70.0))
    def test_broken_numbers_stay_in_their_sequence(self, platform, head_dim, num_splits, softmax_scale, soft_cap):
        """NaN and Inf in a query, a key and a value, among blocks that need a mask and blocks that need none."""
        self.need(platform)
        sequences = (1, 900), (150, 700), (2, 9), (200, 800), (90, 500), (1, 170)
        cfg = PrefillPageAttentionConfig(num_splits=num_splits)
        case = cases.Case("broken", sequences, 4, 2, head_dim, page_size=16, dtype="bfloat16", cfg=cfg,
                          softmax_scale=softmax_scale, attn_logits_soft_cap=soft_cap)
        run = functools.partial(attend, platform=platform, cfg=cfg, **case.parameters)
        # A soft cap makes a finite number of an infinite logit.
        cases.check_broken(run, case, (np.nan, np.inf, -np.inf) if soft_cap is None else (np.nan,))

    @product(platform=PLATFORMS)
    def test_bits_do_not_depend_on_the_pack(self, platform):
        self.need(platform)
        # All of them: what is left open follows the call's shape.
        sizes = dict(block_q=64, block_kv=64, num_warps=12) if platform == "cuda" else dict(block_q=64, block_kv=64)
        cfg = PrefillPageAttentionConfig(num_splits=2, **sizes)
        case = cases.Case("alone", ((100, 900),), 4, 2, 64, page_size=16, dtype="bfloat16", spare_columns=30,
                          spare_pages=90)
        alone = case.pack()
        out, lse = attend(alone, platform, cfg=cfg)
        beside = alone._replace(
            query=jnp.concatenate([alone.query, alone.query[:60]]),
            context_lens=jnp.asarray([900, 1300]),
            page_indices=jnp.stack([alone.page_indices[0], alone.page_indices[0][::-1]]),
            query_offsets=jnp.asarray([0, 100, 160]),
        )
        chex.assert_trees_all_equal([x[:100] for x in attend(beside, platform, cfg=cfg)], [out, lse])

    @product(platform=PLATFORMS, num_splits=(1, 2))
    @policy("invariant")  # else long tiles of short calls may have more parts on fewer heads
    def test_heads_cut_over_two_gpus_give_the_same_bits(self, platform, num_splits):
        self.need(platform)
        if jax.device_count("cuda") < 2:
            self.skipTest("there is one GPU here")
        cfg = PrefillPageAttentionConfig(num_splits=num_splits)
        case = cases.Case("two", SEQUENCES, 8, 2, 128, page_size=16, dtype="bfloat16")
        pack = case.pack()
        mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,), devices=jax.devices("cuda")[:2])
        specs = (P(None, "heads"), P("heads"), P("heads"), P(), P(), P())
        cut = pack._replace(**{
            name: jax.device_put(array, NamedSharding(mesh, spec))
            for (name, array), spec in zip(pack._asdict().items(), specs)
        })
        results = attend(cut, platform, cfg=cfg)
        self.assertFalse(results[0].sharding.is_fully_replicated)
        chex.assert_trees_all_equal(results, attend(pack, platform, cfg=cfg))

    @product(platform=PLATFORMS)
    def test_cache_of_more_than_2_31_elements(self, platform):
        """Pages at the far end of caches of 2^31 elements and some, over heads and pages (flashinfer#3130)."""
        self.need(platform)
        case = cases.Case("far", ((33, 200),), 4, 2, 128, page_size=16, dtype="bfloat16", spare_pages=0,
                          spare_columns=0)
        near = case.pack()
        used, far = near.key_cache.shape[1], 2**31 // (2 * 16 * 128) + 1000
        expand = jax.jit(lambda x: jnp.zeros((2, far, 16, 128), x.dtype).at[:, -used:].set(x))
        pack = near._replace(key_cache=expand(near.key_cache), value_cache=expand(near.value_cache),
                             page_indices=near.page_indices + far - used)
        chex.assert_trees_all_equal(attend(pack, platform), attend(near, platform))


if __name__ == "__main__":
    absltest.main()
