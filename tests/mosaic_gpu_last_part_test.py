"""The merge of a tile's parts by the warpgroup that ends the last: its arithmetic, its counters, and where it is chosen."""

import functools
import itertools
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig as Config, ragged_paged_prefill
from paged_prefill.lowering.mosaic_gpu.hopper import last_part
from paged_prefill.lowering.mosaic_gpu.hopper.masks import Rows
from paged_prefill.lowering.mosaic_gpu.hopper.pieces import Pieces
from paged_prefill.lowering.splits import merge_splits
from paged_prefill.lowering.tiles import Parts, Tiles
from paged_prefill.tests import plans
from paged_prefill.tests.gpu_threads import Shared, Threads, counted

# Who merges: whether a warpgroup counts parts, how many kernels there are of this project's, and whether XLA has one.
LAST, KERNEL, XLA, NOBODY = (True, 2, False), (False, 3, False), (False, 2, True), (False, 2, False)
# Tiles of few rows, of a warpgroup's, and of two warpgroups.
PLANS = dict(
    few_rows=dict(rows=8, block_q=1, warpgroups=1, block_kv=64),
    one=dict(block_q=16, warpgroups=1),
    two=dict(block_q=32),
)


def piece_of(plan, index, **fields):
    """A piece of a table whose every row has these fields, but for the part, which counts on within a tile."""
    table = np.zeros((plan.rows_of_table, plan.columns), np.int32)
    for name, value in (dict(parts=plan.splits, length=1) | fields).items():
        table[:, Tiles._fields.index(name)] = value
    table[:, Tiles._fields.index("part")] = np.arange(len(table)) % plan.splits
    scalars = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
    pieces = Pieces(plan, jnp.asarray(table).reshape(-1), *scalars, block=jnp.int32(0), slab=jnp.int32(0))
    return pieces.numbered(jnp.int32(index))


class LastPartTest(parameterized.TestCase):
    @parameterized.parameters(
        ("few_rows", 9, "bfloat16"), ("few_rows", 2, "float16"), ("one", 2, "bfloat16"), ("two", 2, "bfloat16"),
    )  # fmt: skip
    def test_parts_are_merged_as_everywhere(self, name, parts, dtype):
        """Of rows that are there, and no others; some see no key in some parts, some in none, and one has NaN."""
        plan = plans.plan(**PLANS[name], parts=Parts(1, parts), last_merges=True, tokens=60, dtype=dtype)
        rng = np.random.default_rng(parts)
        out = rng.standard_normal((parts, plan.tokens, plan.q_heads, plan.value_dim)).astype(np.float32)
        lse = 20 * rng.standard_normal((parts, plan.q_heads, plan.tokens)).astype(np.float32)
        lse[rng.random(lse.shape) < 0.3] = -np.inf
        lse[:, 1, 6], lse[0, 0, 5] = -np.inf, np.nan
        out[np.isneginf(lse).swapaxes(1, 2)] = 0
        start, length = 5, min(plan.block_q, 3)
        piece = piece_of(plan, 0, start=start, length=length)
        want_out, want_lse = merge_splits(jnp.asarray(out), jnp.asarray(lse), jnp.dtype(dtype), by_head=True)
        heads = min(plan.heads, plan.group)
        for warpgroup in range(plan.warpgroups):
            rows = Rows(plan, piece, warpgroup, {})
            results = np.full((plan.tokens * plan.q_heads, plan.value_dim), 77, dtype), Shared(0, np.full(lse[0].size, 77.0))
            of_parts = out.reshape(-1, plan.value_dim), Shared(0, lse.reshape(-1))
            threads = Threads(last_part.THREADS, [])
            with mock.patch.object(last_part.lax, "fori_loop", counted):
                last_part.merge_rows(plan, threads, piece, rows, results, of_parts)
            got_out, got_lse = results[0].reshape(out.shape[1:]), results[1].values.reshape(lse.shape[1:])
            own = np.zeros((plan.tokens, plan.q_heads), bool)
            its_heads = range(heads) if plan.row_groups == 1 else range(2 * warpgroup, 2 * warpgroup + 2)
            own[start : start + length, [head for head in its_heads if head < heads]] = True
            each = [np.where(own[..., None], x, 77).astype(np.float32) for x in (want_out, got_out)]
            np.testing.assert_allclose(each[1], each[0], 1e-2, 1e-5)
            untouched = np.array(got_out).astype(np.float32)
            untouched[own] = 77
            np.testing.assert_array_equal(untouched, 77)
            np.testing.assert_allclose(got_lse, np.where(own.T, want_lse.T, 77), 1e-5)

    @parameterized.parameters(*PLANS)
    def test_every_tile_has_counters_of_its_own(self, name):
        """One for each head tile and warpgroup."""
        plan = plans.plan(**PLANS[name], last_merges=True, tokens=7)
        each = itertools.product(range(7), range(plan.head_tiles), range(plan.warpgroups))
        counters = [last_part.counter_of(plan, *number) for number in each]
        [size] = last_part.counters_shape(plan)
        self.assertEqual(sorted(counters), [*range(size)])

    @parameterized.parameters(
        (dict(seqs=32, tokens=128, pages_per_seq=512, q_heads=32, kv_heads=8), {}, LAST),  # drafts
        (dict(seqs=20, tokens=20, pages_per_seq=1250), {}, KERNEL),  # uneven decode, of more parts than a thread reads at a time
        (dict(tokens=1, pages_per_seq=1776, q_heads=4), {}, KERNEL),
        (dict(tokens=1, pages_per_seq=1250, q_heads=128, kv_heads=32), dict(num_splits=5), XLA),
        (dict(tokens=64, pages_per_seq=1250), dict(num_splits=30), XLA),
        (dict(tokens=64, pages_per_seq=4), dict(num_splits=1), NOBODY),
    )
    def test_no_kernel_follows_where_tiles_have_few_parts_that_vary(self, sizes, cfg, who):
        sizes = dict(seqs=1, q_heads=8, kv_heads=2) | sizes
        cache = (sizes["kv_heads"], sizes["seqs"] * sizes["pages_per_seq"], 16, 128)  # where there is less room, contexts differ
        shapes = [(sizes["tokens"], sizes["q_heads"], 128), cache, cache]
        indices = (sizes["seqs"],), (sizes["seqs"], sizes["pages_per_seq"]), (sizes["seqs"] + 1,)
        operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        operands += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in indices]
        call = functools.partial(ragged_paged_prefill, platform="cuda", cfg=Config(**cfg))
        text = jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        kernels = text.count("custom_call @mosaic_gpu")
        self.assertEqual(("atom.acq_rel.gpu" in text, kernels, "stablehlo.exponential" in text), who)


if __name__ == "__main__":
    absltest.main()
