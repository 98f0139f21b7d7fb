"""The merge of a tile's parts in pairs: whoever ends last, each is in it once, in one order, and nothing is left behind."""

import itertools
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import lowering, ragged_paged_prefill
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.mosaic_gpu.hopper import pairs
from paged_prefill.lowering.mosaic_gpu.hopper.cluster import merged
from paged_prefill.lowering.splits import merge_splits
from paged_prefill.lowering.tiles import Parts, tiles_at_most
from paged_prefill.tests import plans
from paged_prefill.tests.mosaic_gpu_last_part_test import piece_of

WIDE = dict(block_q=1, head_dim=576, value_dim=512, group=64, num_kv_heads=1, latent=True, block_kv=64, last_merges=True)


class Memory:
    """Counters and places as a GPU's memory has them."""

    def __init__(self):
        self.counters, self.places = {}, {}

    def comes_last(self, counters, number, counts, warpgroup):
        if not counts:
            return jnp.bool_(False)
        self.counters[int(number)] = 1 - self.counters.get(int(number), 0)
        return jnp.bool_(self.counters[int(number)] == 0)

    def leave(self, outputs, lse, places, counters, number, warpgroup):
        assert int(number) not in self.places
        self.places[int(number)] = outputs, lse

    def with_other(self, outputs, lse, places, counters, number, warpgroup):
        outputs, lses = zip((outputs, lse), self.places.pop(int(number)))
        merge = lambda *outputs: merged(outputs, lses)
        return [merge(*each)[0] for each in zip(*outputs)], merge(*(x[0] for x in outputs))[1]

    def merge(self, plan, piece, warpgroup, found):
        names = dict(_comes_last=self.comes_last, _leave=self.leave, _with_other=self.with_other)
        with mock.patch.multiple(pairs, **names), jax.disable_jit():
            return pairs.merge_in_pairs(plan, piece, jnp.int32(warpgroup), found, None, None)


class PairsTest(parameterized.TestCase):
    @parameterized.parameters(1, 2, 3, 5, 8, 11)
    def test_who_ends_last_has_all_parts_and_moves_no_bit(self, parts):
        plan = plans.plan(**WIDE, parts=Parts(1, 11), tokens=3, tiles=3)
        rng = np.random.default_rng(parts)
        out = jnp.asarray(rng.standard_normal((parts, 64, 4)), jnp.float32)
        lse = 20 * rng.standard_normal((parts, 64))
        lse[rng.random(lse.shape) < 0.3] = -np.inf
        lse = jnp.asarray(lse, jnp.float32)
        out = jnp.where(jnp.isneginf(lse)[..., None], 0, out)
        orders, results = [*itertools.permutations(range(parts))] if parts < 5 else [], []
        for order in orders or [rng.permutation(parts) for _ in range(12)]:
            memory, ends = Memory(), []
            for part in order:
                piece = piece_of(plan, int(part), parts=parts, start=2)
                ([found], its_lse), whole = memory.merge(plan, piece, 1, ([out[part]], lse[part]))
                ends.append(bool(whole))
                results += [(found, its_lse)] if whole else []
            self.assertEqual(ends, [False] * (parts - 1) + [True])
            self.assertFalse(memory.places)
            self.assertFalse(any(memory.counters.values()))
        want = merge_splits(out[:, None], lse[:, None], jnp.float32)
        for found in results:
            np.testing.assert_allclose(found[0], want[0][0], 1e-5, 1e-6)
            np.testing.assert_allclose(found[1], want[1][0], 1e-5, 1e-6)
            jax.tree.map(np.testing.assert_array_equal, found, results[0])

    @parameterized.parameters(
        dict(tokens=20, tiles=20, block_q=1, group=160), dict(tokens=40, tiles=tiles_at_most(40, 15, 4), block_q=4, group=16)
    )
    def test_pairs_have_places_of_their_own(self, **changes):
        """Of all tiles, their heads, pairs and warpgroups, in packs whose sequences end within a tile."""
        plan = plans.plan(**(WIDE | changes), parts=Parts(1, 5))
        lengths = [1, 4, 2, 3, 4] if plan.block_q > 1 else [1]
        ends = itertools.takewhile(lambda end: end < plan.tokens, itertools.accumulate(itertools.cycle(lengths)))
        tiles = [(start, i) for i, start in enumerate([0, *ends])]
        numbers = []

        def comes_last(counters, number, counts, warpgroup):
            numbers.append(int(number))
            return jnp.bool_(False)

        for (start, seq), head_tile, part, warpgroup in itertools.product(
            tiles, range(plan.head_tiles), (1, 3), range(plan.warpgroups)
        ):
            piece = piece_of(plan, part * plan.head_tiles + head_tile, start=start, seq=seq, parts=5)
            with mock.patch.multiple(pairs, _comes_last=comes_last, _leave=mock.Mock()), jax.disable_jit():
                pairs.merge_in_pairs(plan, piece, jnp.int32(warpgroup), ([jnp.float32(0)], jnp.float32(0)), None, None)
        self.assertEqual(len(numbers), len(set(numbers)))
        self.assertLess(max(numbers), pairs.counters_shape(plan)[0])

    @parameterized.parameters(
        (128, 64, 128, 8192, True), (128, 4, 128, 512, False), (64, 64, 128, 4096, True), (64, 64, 128, 8192, False),
        (64, 64, 64, 4096, False),
    )  # fmt: skip
    def test_many_latent_tiles_whose_parts_vary_lower_to_a_program_without_a_merge(self, heads, seqs, pages, pool, in_pairs):
        operands = [((seqs, heads, 576), "bfloat16"), ((1, pool, 64, 576), "bfloat16"), ((seqs,), "int32")]
        operands += [((seqs, pages), "int32"), ((seqs + 1,), "int32")]
        call = lambda query, keys, *indices: ragged_paged_prefill(query, keys, None, *indices, value_dim=512, platform="cuda")
        operands = [jax.ShapeDtypeStruct(*operand) for operand in operands]
        device = Device("cuda", "NVIDIA H200", "9.0")
        with mock.patch.object(lowering, "device_of", return_value=device):
            text = jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        self.assertEqual("red.release.gpu" in text, in_pairs)
        self.assertEqual("paged_prefill_merge" in text or "stablehlo.exponential" in text, seqs == 4)


if __name__ == "__main__":
    absltest.main()
