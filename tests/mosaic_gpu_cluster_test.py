"""The merge by a cluster of the Hopper kernel's blocks: its arithmetic, the blocks' shares, and where it is chosen."""

import functools

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig as Config, ragged_paged_prefill
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.mosaic_gpu import host
from paged_prefill.lowering.mosaic_gpu.hopper import cluster, operations
from paged_prefill.lowering.mosaic_gpu.hopper.pieces import Pieces
from paged_prefill.lowering.mosaic_gpu.hopper.registers import REGISTERS
from paged_prefill.lowering.splits import merge_splits
from paged_prefill.lowering.tiles import Parts, Tiles
from paged_prefill.primitive.context import policy
from paged_prefill.tests import plans, problems

KERNEL, HOPPER = host.MosaicGpu(), Device("cuda", "NVIDIA H200", "9.0")


def decode(seqs, context, **changes):
    sizes = dict(tokens=seqs, seqs=seqs, q_heads=32, num_kv_heads=8, cache_kv_heads=8, pages_per_seq=context // 16)
    return problems.problem(**(sizes | dict(page_size=16, head_dim=128, value_dim=128) | changes))


def latent(seqs, heads, cache="bfloat16", **changes):
    features = {"latent"} | ({"quantised"} if cache != "bfloat16" else set())
    sizes = dict(q_heads=heads, num_kv_heads=1, cache_kv_heads=1, page_size=64, head_dim=576, value_dim=512)
    return decode(seqs, 4096, **sizes, cache_dtype=cache, features=frozenset(features), **changes)


def of_two_warpgroups(parts):
    return Config(block_q=64, block_kv=64, num_warps=12, num_stages=2, num_splits=parts)


def parts_of(problem, config):
    return host.parts_of_tiles(problem, HOPPER, config).most, host.merges_in_cluster(problem, HOPPER, config)


class ClusterTest(parameterized.TestCase):
    @parameterized.parameters(2, 3, 16)
    def test_parts_are_merged_as_everywhere(self, parts):
        """Rows that see nothing, parts that see nothing, and rows that are NaN."""
        rng = np.random.default_rng(parts)
        out, lse = rng.standard_normal((parts, 64, 8), np.float32), 20 * rng.standard_normal((parts, 64), np.float32)
        lse[rng.random(lse.shape) < 0.3] = -np.inf
        lse[:, 3] = -np.inf
        out[np.isneginf(lse)] = 0
        lse[0, 5] = out[-1, 7, 2] = np.nan
        got = cluster.merged([*out], [*lse])
        want = merge_splits(jnp.asarray(out)[:, :, None], jnp.asarray(lse)[:, :, None], jnp.float32)
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b[:, 0], 1e-5, 1e-6)
        self.assertTrue(np.isnan(got[0][5]).all() and np.isnan(got[0][7, 2]) and not np.isnan(got[0][3]).any())

    @parameterized.product(parts=(2, 3, 5, 8, 16), value_dim=(64, 128, 192, 256))
    def test_every_column_is_some_blocks(self, parts, value_dim):
        firsts, columns = cluster.shares(parts, value_dim)
        self.assertLen(firsts, parts)
        self.assertEqual({first + i for first in firsts for i in range(columns)}, {*range(value_dim)})
        self.assertTrue(all(first % cluster.GROUP == 0 for first in firsts))

    @parameterized.parameters(
        (decode(8, 1024), 2, True),
        (decode(3, 1024), 4, True),
        (decode(4, 512), 3, True),
        (decode(5, 992), 3, False),
        (decode(1, 8192), 16, False),
        (decode(8, 1024, q_heads=16, num_kv_heads=2, cache_kv_heads=2), 4, True),
        (decode(16, 1024), 1, False),
    )
    def test_short_calls_are_merged_so(self, problem, parts, merged):
        self.assertEqual(parts_of(problem, KERNEL.heuristic(problem, HOPPER)), (parts, merged))

    @parameterized.parameters((8, "bfloat16"), (16, "bfloat16"), (32, "bfloat16"), (64, "bfloat16"), (16, "int8"), (32, "int8"))
    def test_halves_of_latent_contexts_are_merged_so(self, heads, cache):
        """In place of blocks: a warpgroup's two outputs of few rows, or the halves of two warpgroups' columns."""
        problem = latent(64, heads, cache, pages_per_seq=64 if cache == "bfloat16" else 32)
        config = KERNEL.heuristic(problem, HOPPER)
        self.assertEqual(parts_of(problem, config), (2, True))
        self.assertFalse(host.exchange_fits(problem, config, 2))

    @parameterized.parameters((16, 16), (128, 8), (64, 32))
    def test_latent_contexts_are_not_cut_into_fewer_parts_for_a_clusters_sake(self, heads, seqs):
        """Their steps wait for one another as much as for memory."""
        problem = latent(seqs, heads, pages_per_seq=32)
        config = KERNEL.heuristic(problem, HOPPER)
        tiles = host.programs(problem, config)
        self.assertGreaterEqual(tiles * parts_of(problem, config)[0], HOPPER.cores - tiles)

    def test_the_chip_has_room_for_all_clusters_or_there_are_none(self):
        """Of 7 groups of 16 cores, and pairs of any; in a core for what is sent; and where parts do not vary."""
        problem = decode(4, 512)
        config = KERNEL.heuristic(problem, HOPPER)
        for parts, merged in ((1, False), (2, True), (3, True), (4, False), (17, False)):
            self.assertEqual(host.in_cluster(problem, HOPPER, config, parts), merged)
        wide = decode(1, 8192, head_dim=256, value_dim=256)
        self.assertTrue(host.in_cluster(wide, HOPPER, KERNEL.heuristic(wide, HOPPER), 8))
        self.assertFalse(host.in_cluster(wide, HOPPER, KERNEL.heuristic(wide, HOPPER), 16))
        many = decode(8, 32768)
        self.assertFalse(parts_of(many, KERNEL.heuristic(many, HOPPER))[1])
        with policy("invariant"):
            self.assertEqual(parts_of(problem, KERNEL.heuristic(problem, HOPPER)), (1, False))

    def test_clusters_are_no_larger_than_any_chip_takes_where_this_one_may_have_small_groups(self):
        """A launch of a cluster that no group of cores has room for fails."""
        problem = decode(1, 8192, q_heads=8, num_kv_heads=2, cache_kv_heads=2)
        config = KERNEL.heuristic(problem, HOPPER)
        for device, most in (
            (HOPPER, 16),
            (HOPPER._replace(core_count=78), 8),
            (Device("cuda", "NVIDIA H20", "9.0", 78), 8),
            (Device("cuda"), 8),
        ):
            self.assertEqual(max(n for n in range(32) if host.in_cluster(problem, device, config, n)), most)

    @parameterized.parameters((16, "bfloat16"), (64, "bfloat16"), (32, "float8_e4m3fn"))
    def test_latent_halves_lower_to_a_program_without_a_merge(self, heads, cache):
        operands = [((64, heads, 576), "bfloat16"), ((1, 2048, 64, 576), cache), ((64,), "int32"), ((64, 32), "int32")]
        operands += [((65,), "int32"), ((1,), "float32")]

        def call(query, keys, *rest):
            *indices, scale = rest
            scales = dict(key_scale=scale) if cache != "bfloat16" else {}
            return ragged_paged_prefill(query, keys, None, *indices, value_dim=512, platform="cuda", **scales)

        operands = [jax.ShapeDtypeStruct(*operand) for operand in operands]
        text = jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        self.assertIn("st.async", text)
        self.assertNotIn("stablehlo.exponential", text)

    @parameterized.parameters(
        ((8, 32, 128), (8, 64, 16, 128), (8, 64), {}, False),
        ((8, 16, 256), (8, 64, 16, 256), (8, 64), {}, False),
        ((3, 8, 64), (2, 64, 16, 64), (3, 60), dict(sliding_window=300), False),
        ((130, 8, 128), (2, 64, 16, 128), (1, 60), dict(cfg=of_two_warpgroups(2)), False),
        ((130, 8, 128), (2, 64, 16, 128), (1, 60), dict(cfg=of_two_warpgroups(17)), True),
    )
    def test_lowers_to_a_program_without_a_merge(self, query, cache, table, parameters, merges):
        """Of decode steps, and of two warpgroups with many tokens."""
        floats = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (query, cache, cache)]
        ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (table[:1], table, (table[0] + 1,))]
        call = functools.partial(ragged_paged_prefill, platform="cuda", **parameters)
        text = jax.jit(call).trace(*floats, *ints).lower(lowering_platforms=("cuda",)).as_text()
        self.assertIn("mosaic_gpu", text)
        self.assertEqual("stablehlo.exponential" in text, merges)
        # All threads meet at the cluster's own barrier, once: what waits there for others to end may wait for ever.
        self.assertNotRegex(text, r"barrier\.cluster\.[a-z.]*(?<!aligned);")

    @parameterized.parameters(
        (128, 2, "bfloat16", False), (256, 2, "bfloat16", False), (256, 32, "bfloat16", True), (128, 2, "int8", False)
    )
    def test_what_is_sent_lies_where_keys_and_values_were_if_it_has_no_room_beside_them(self, dim, group, cache, within):
        sizes = dict(q_heads=8 * group, num_kv_heads=8, cache_kv_heads=8, head_dim=dim, value_dim=dim, cache_dtype=cache)
        problem = decode(8, 1024, **sizes, features=("quantised",) if cache == "int8" else ())
        config = KERNEL.heuristic(problem, HOPPER)
        parts, merged = parts_of(problem, config)
        self.assertTrue(merged)
        fits = host.exchange_fits(problem, config, parts)
        self.assertEqual(fits, not within)

    def test_barriers_have_room_too_where_what_is_sent_fills_the_rest(self):
        """Beside widened blocks of 192 features four parts would lack 160 bytes, which lowering refuses."""
        shapes = [((278, 8, 192), "bfloat16"), *2 * [((2, 8, 192, 192), "float8_e5m2")]]
        shapes += [(shape, "int32") for shape in ((7,), (7, 5), (8,))] + [((), "float32")]
        operands = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

        def call(*operands):
            *rest, scale = operands
            return ragged_paged_prefill(*rest, key_scale=scale, value_scale=scale, platform="cuda")

        self.assertIn("mosaic_gpu", jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text())

    def test_a_block_meets_where_no_warpgroup_waits_alone(self):
        """One may still be in a vote of its own, of a soft cap, when the others are done with the block's keys."""
        own = range(operations.OWN_BARRIER, operations.OWN_BARRIER + max(number for number, _ in REGISTERS))
        self.assertNotIn(operations.MEETING_BARRIER, own)
        self.assertLess(max(operations.MEETING_BARRIER, *own), 16)

    @parameterized.parameters(1, 2, 5)
    def test_parts_that_take_part_follow_a_tiles_own_keys(self, fewest):
        """Those of its cluster's blocks; a tile of one part is its first block's alone."""
        plan = plans.plan(parts=Parts(4, 4, fewest=fewest), clusters=True, warpgroups=1, tiles=5)
        blocks, columns = [0, 1, 3, 8, 17], plan.columns
        table = np.zeros((5, columns), np.int32)
        table[:, Tiles._fields.index("end_block")] = blocks
        for tile, its_blocks in enumerate(blocks):
            index, scalars = jnp.int32(tile * plan.head_tiles), (jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
            of_block = Pieces(plan, jnp.asarray(table).reshape(-1), *scalars, block=index, slab=jnp.int32(0))
            pieces = [of_block.numbered(index, jnp.int32(part)) for part in range(4)]
            share = max(fewest, -(-its_blocks // 4))
            self.assertEqual({int(piece.tile.parts) for piece in pieces}, {1 if its_blocks <= share else 4})
            seen = [b for piece in pieces for b in range(piece.tile.first_block, piece.tile.end_block)]
            self.assertEqual(seen, [*range(its_blocks)])
            steps = [int(piece.steps) for piece in pieces]  # at least one, masked, so that there is a result
            self.assertEqual(steps, [max(1, min(share, its_blocks - part * share)) for part in range(4)])

    def test_a_block_has_one_part_and_writes_the_tile_once(self):
        plan = plans.plan(parts=Parts(4, 4), clusters=True, warpgroups=1)
        self.assertEqual((plan.splits, plan.results), (4, 1))


if __name__ == "__main__":
    absltest.main()
