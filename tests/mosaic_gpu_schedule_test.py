"""The kernel that works out the Hopper kernel's tiles, run on a CPU."""

from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering import tiles
from paged_prefill.lowering.call import Sequences, flatten
from paged_prefill.lowering.mosaic_gpu.hopper import schedule
from paged_prefill.lowering.mosaic_gpu.hopper.kernel import table_of
from paged_prefill.primitive.attention import Attention
from paged_prefill.tests.gpu_threads import Shared, Threads, counted


def table_by_threads(launch, *inputs):
    """What the kernel writes, block by block."""
    table = Shared(launch.size)
    inputs = [Shared(0, np.ravel(x).astype(np.int32)) for x in inputs]
    with mock.patch.object(schedule.lax, "fori_loop", counted):
        for block in range(-(-launch.tiling.tiles // schedule.TILES)):
            scratch = {name: Shared(size) for name, size in schedule.scratch(launch).items()}
            each = Threads(schedule.THREADS, [table, *inputs, *scratch.values()])
            schedule.write_table(launch, each, lambda: jnp.int32(block), *inputs, table, **scratch)
            table.synchronise()
    return table.values


def random_indices(rng, packs, seqs, tokens, capacity, kind):
    """Index arrays of some packs: valid ones, or of hostile numbers."""
    if kind == "hostile":
        some = np.array([-(2**31), -1, 0, 1, tokens // 2, tokens, tokens + 1, 2**31 - 1])
        return rng.choice(some, (packs, seqs + 1)), rng.choice(np.append(some, capacity), (packs, seqs))
    offsets = np.sort(rng.integers(0, tokens + 1, (packs, seqs + 1)), axis=1)
    if kind == "steps":  # one token each, and a chunk
        offsets = np.minimum(np.arange(seqs + 1), tokens)[None] + np.zeros((packs, 1), int)
        offsets[:, -1] = tokens
    return offsets, rng.integers(0, capacity + 100, (packs, seqs))


class ScheduleInOneTest(parameterized.TestCase):
    @parameterized.product(
        (
            dict(packs=1, seqs=1, tokens=700, block_q=64),
            dict(packs=1, seqs=8, tokens=8, block_q=16),
            dict(packs=1, seqs=65, tokens=300, block_q=16),  # in several blocks
            dict(packs=3, seqs=5, tokens=90, block_q=16),
        ),
        (
            dict(kind="valid", ordered=True, window=None, slabs=1, parts=tiles.Parts()),
            dict(kind="steps", ordered=True, window=100, slabs=2, parts=tiles.Parts()),
            dict(kind="hostile", ordered=True, window=None, slabs=2, parts=tiles.Parts()),
            dict(kind="hostile", ordered=False, window=100, slabs=1, parts=tiles.Parts()),
            dict(kind="valid", ordered=True, window=None, slabs=1, parts=tiles.Parts(1, 7, 3)),
            dict(kind="steps", ordered=False, window=None, slabs=1, parts=tiles.Parts(3, 3)),
            dict(kind="hostile", ordered=True, window=500, slabs=2, parts=tiles.Parts(2, 5, 2)),
            dict(kind="steps", ordered=True, window=None, slabs=1, parts=tiles.Parts(2, 7, 2, together=9)),
            dict(kind="hostile", ordered=True, window=None, slabs=2, parts=tiles.Parts(1, 5, 2, together=6)),
        ),
    )
    def test_it_is_the_schedule_that_xla_works_out(
        self, packs, seqs, tokens, block_q, kind, ordered, window, slabs, parts
    ):
        rng, capacity = np.random.default_rng(seqs), 1024
        attention = Attention(1.0, sliding_window=window)
        offsets, contexts = (x.astype(np.int32) for x in random_indices(rng, packs, seqs, tokens, capacity, kind))
        shape = jax.ShapeDtypeStruct
        operands = dict(
            query=shape((packs, tokens, 2, 8), jnp.float32),
            key_cache=shape((1, 9, 16, 8), jnp.float32),
            value_cache=shape((1, 9, 16, 8), jnp.float32),
            context_lens=contexts, page_indices=np.zeros((packs, seqs, capacity // 16), np.int32),
            query_offsets=offsets, kv_head_start=np.int32(0),
        )  # fmt: skip
        floats = {name: operands.pop(name) for name in ("query", "key_cache", "value_cache")}
        tiling = tiles.Tiling(
            packs * tokens, packs * seqs, capacity, block_q, 64, attention, block_q // slabs, ordered, parts
        )

        def flat(floats, operands):
            call = flatten(floats | operands, cache_batch_dims=0, num_kv_heads=1, attention=attention)
            return table_of(*tiles.schedule(call.sequences, tiling)), call.indices

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), floats)
        table, indices = jax.jit(flat)(zeros, operands)
        behind = 1 + tiling.tiles if parts.vary else 0
        columns = (len(table) - behind) // tiling.rows
        launch = schedule.Launch(tiling, packs, columns)
        found, table = table_by_threads(launch, indices.query_offsets, indices.context_lens), np.asarray(table)
        self.assertEqual(len(found), len(table))
        if parts.vary:
            np.testing.assert_array_equal(found[-behind:], table[-behind:])
            found, table = (x[: table[-behind] * columns] for x in (found, table))
        np.testing.assert_array_equal(found.reshape(-1, columns), table.reshape(-1, columns))

    def test_a_race_would_be_found(self):
        """Without waiting, threads read what others write."""
        tiling = tiles.Tiling(64, 8, 64, 16, 64, Attention(1.0), slab=16)
        launch = schedule.Launch(tiling, 1, 17)
        self.enterContext(mock.patch.object(Threads, "synchronise", lambda self: None))
        with self.assertRaisesRegex(AssertionError, "meanwhile"):
            table_by_threads(launch, np.arange(9) * 8, np.full(8, 64))

    def test_one_sequence_is_scheduled_longest_first(self):
        arrays = (np.asarray([x], np.int32) for x in (0, 200, 900, 0))
        sequences = Sequences(*arrays, np.zeros((1, 60), np.int32))
        tiling = tiles.Tiling(200, 1, 960, 64, 64, Attention(1.0), slab=64)
        schedule, *_ = jax.jit(tiles.schedule, static_argnums=1)(sequences, tiling)
        np.testing.assert_array_equal(schedule.start[:4], [192, 128, 64, 0])
        np.testing.assert_array_equal(schedule.length[:5], [8, 64, 64, 64, 0])


if __name__ == "__main__":
    absltest.main()
