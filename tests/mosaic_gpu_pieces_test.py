"""What the Hopper kernel does between two pieces of work, where no GPU is needed: its first loads, and its results."""

import contextlib
from dataclasses import replace
import functools
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import ragged_paged_prefill
from paged_prefill.lowering.mosaic_gpu import host
from paged_prefill.lowering.mosaic_gpu.hopper import compute, kernel, operations, scratch
from paged_prefill.lowering.mosaic_gpu.hopper.pieces import Pieces
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan
from paged_prefill.lowering.tiles import Parts
from paged_prefill.tests import plans

LATENT = dict(head_dim=576, value_dim=512, latent=True, block_kv=64, block_q=1, group=128, num_kv_heads=1)
FIRST, SECOND, THIRD = (mock.Mock(number=number) for number in range(3))  # pieces of a thread block


class Launched(Exception):
    """Instead of a kernel, whose operations take most of a second to lower."""


def launch_of(seqs=1, tokens=2048, pages_per_seq=128, q_heads=8, kv_heads=2, **parameters):
    """The plan that a call launches the kernel with, and the shapes of its arrays."""
    cache = (kv_heads, seqs * pages_per_seq, 16, 128)
    shapes = [(tokens, q_heads, 128), cache, cache, (seqs,), (seqs, pages_per_seq), (seqs + 1,)]
    dtypes = [jnp.bfloat16] * 3 + [jnp.int32] * 3
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes)]
    call = jax.jit(functools.partial(ragged_paged_prefill, platform="cuda", **parameters))
    with mock.patch.object(host, "launch", side_effect=Launched) as launch, contextlib.suppress(Launched):
        call.trace(*operands).lower(lowering_platforms=("cuda",))
    plan, *arrays = launch.call_args.args
    return plan, jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arrays)


class FirstLoadsTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("prompt", {}, True),
        ("short_prompts", dict(seqs=8, tokens=800, pages_per_seq=20), True),
        ("prompt_beside_decode_steps", dict(seqs=33), True),
        ("decode_steps", dict(seqs=64, tokens=64), False),
        ("drafts", dict(seqs=64, tokens=256), False),
        ("parts", dict(tokens=256, pages_per_seq=2048), False),
    )
    def test_a_query_comes_first_where_products_are_what_all_wait_for(self, call, comes_first):
        self.assertEqual(launch_of(**call)[0].query_comes_first, comes_first)

    def test_other_loads_wait_for_it(self):
        """All but those of a block of keys: two warps load keys, and two values."""
        waits = []
        plan, arrays = launch_of()
        for comes_first in (False, True):
            with mock.patch.object(Plan, "query_comes_first", comes_first):
                program = jax.make_jaxpr(functools.partial(kernel.launch, plan))(*arrays)
            waits.append(str(program).count("barrier_wait"))
        self.assertEqual(waits[1] - waits[0], 4)


class QueriesTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("three_warpgroups", dict(warpgroups=3, block_q=192), [0, 1, 2]),
        ("any_block_may_be_masked", dict(warpgroups=3, block_q=192, has_ranges=True), [0, 0, 0]),
        ("four_warpgroups", dict(warpgroups=4, block_q=256), [0, 1, 2, 3]),
        ("two_in_turns", dict(warpgroups=2, soft_cap=None), [0, 0]),
        ("two_in_turns_in_a_chain", dict(warpgroups=2, soft_cap=None, tiles=67), [0, 1]),
        ("two_teams", dict(warpgroups=1, teams=2), [0, 1]),
    )
    def test_warpgroups_that_go_apart_have_queries_of_their_own(self, changes, groups):
        plan = plans.plan(**changes)
        places = [(team, row_group) for team in range(plan.teams) for row_group in range(plan.row_groups)]
        self.assertEqual([plan.queries_of(FIRST, *place) for place in places], groups)

    @parameterized.named_parameters(
        ("chain", {}, 2),
        ("any_block_may_be_masked", dict(has_ranges=True), 1),
        ("gathered", dict(page_size=5), 1),
        ("two_places_for_blocks", dict(stages=2), 1),
        ("small_blocks", dict(block_kv=64), 1),
        ("one_piece_each", dict(tiles=3), 1),
        ("quantised", dict(cache_dtype="int8", key_scale="head", value_scale="head"), 1),
        ("three_warpgroups", dict(warpgroups=3, block_q=192, block_kv=64), 1),
    )
    def test_a_chain_has_two_places_for_queries_in_that_of_a_block_of_values(self, changes, places):
        plan = plans.plan(**(dict(tiles=67, soft_cap=None) | changes))
        self.assertEqual(plan.query_places, places)
        self.assertEqual(plan.copies_results, places > 1)
        if not plan.quantised:
            self.assertEqual((plan.key_slots, plan.slots), (plan.stages, plan.stages + 1 - places))
        first, second, third = (plan.queries_of(piece, 0, 1) for piece in (FIRST, SECOND, THIRD))
        self.assertEqual(first, third)
        self.assertEqual(first != second, places > 1)

    @parameterized.named_parameters(
        ("prompt", {}, 2),
        ("parts_of_tiles", dict(tokens=256, pages_per_seq=2048), 0),
        ("decode_steps", dict(seqs=256, tokens=256), 0),
        ("window", dict(sliding_window=1024), 0),
    )
    def test_the_next_query_is_asked_for_before_its_place_is_free(self, call, copies):
        """Into the second cache, by a copy for every 64 of its features, where products are what all wait for."""
        plan, arrays = launch_of(q_heads=32, kv_heads=8, **call)
        program = str(jax.make_jaxpr(functools.partial(kernel.launch, plan))(*arrays))
        self.assertEqual(program.count("async_prefetch"), copies)

    @parameterized.named_parameters(
        ("short_steps", dict(head_dim=64, value_dim=64), True),
        ("others", {}, False),
        ("large_heads", dict(head_dim=256, value_dim=256, block_kv=64), False),
        ("one_piece_each", dict(head_dim=64, value_dim=64, tiles=2), False),
        ("window", dict(head_dim=64, value_dim=64, window=100), False),
        ("latent_chunk", LATENT | dict(tiles=2048, tokens=2048), False),  # where it costs a register
        ("parts_of_latent_steps", LATENT | dict(tiles=200, tokens=200, parts=Parts(1, 6, 48)), True),
    )
    def test_the_first_values_come_before_the_query_where_steps_are_short_or_parts_begin(self, changes, before):
        plan = plans.plan(**(dict(tiles=67, tokens=2000, soft_cap=None) | changes))
        self.assertEqual(plan.values_before_query, before)

    def test_each_group_waits_for_as_many_copies_as_it_gets(self):
        """A query of three warpgroups: each 64 rows of 128 features are two copies, after all have let go of theirs."""
        plan, arrays = launch_of(tokens=8192, pages_per_seq=512, q_heads=32, kv_heads=8)
        self.assertEqual((plan.warpgroups, plan.query_groups), (3, 3))
        with mock.patch.object(scratch.plgpu, "Barrier", wraps=scratch.plgpu.Barrier) as barrier:
            jax.make_jaxpr(functools.partial(kernel.launch, plan))(*arrays)
        made = [call.kwargs for call in barrier.call_args_list]
        queries = [sizes["num_arrivals"] for sizes in made if sizes.get("num_barriers") == 3 and "num_arrivals" in sizes]
        self.assertEqual(queries, [2, 1])


class ChainTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("many_pieces", {}, True),
        ("one_each", dict(tiles=33), False),
        ("any_block_may_be_masked", dict(has_ranges=True), True),
        ("three_warpgroups", dict(warpgroups=3, block_q=192), False),
        ("a_polynomial", dict(soft_cap=50.0), False),
        ("parts_of_some", dict(parts=Parts(1, 4, 8)), False),
        ("parts_of_steps_beside_prompts", dict(parts=Parts(1, 4, 8), tokens=67 * 16), True),
        ("parts", dict(parts=Parts(5, 5)), True),
        ("parts_that_merge_in_clusters", dict(parts=Parts(5, 5), clusters=True), False),
        ("heads_of_96", dict(head_dim=96, value_dim=80), True),
        ("short_steps", dict(head_dim=64, value_dim=64), False),
        ("large_heads", dict(head_dim=256, value_dim=256, block_kv=64), False),
        ("quantised", dict(cache_dtype="int8", key_scale="head", value_scale="head"), True),
        ("quantised_and_long", dict(cache_dtype="int8", key_scale="head", value_scale="head", pages_per_seq=513), False),
        ("products_of_8_bits", dict(cache_dtype="float8_e4m3fn", key_scale="head", fp8_terms=1), False),
        ("scales_of_slots", dict(cache_dtype="int8", key_scale="slot", value_scale="slot"), False),
    )
    def test_pieces_are_a_chain_where_warpgroups_take_turns(self, changes, chains):
        self.assertEqual(plans.plan(**(dict(tiles=67, soft_cap=None) | changes)).chains, chains)

    @parameterized.parameters((1, 23), (7, 23), (23, 23))
    def test_a_chain_goes_through_as_many_pieces_as_there_are_parts(self, number, tiles):
        """Behind them the table has anything."""
        plan = plans.plan(tiles=tiles, tokens=16 * tiles, soft_cap=None, parts=Parts(1, 4, 8), cores=5)
        self.assertTrue(plan.chains)
        table = np.ones(plan.rows_of_table * plan.columns + 1, np.int32)
        table[-1] = number
        found = 0
        for block in range(plan.thread_blocks):
            pieces = Pieces(plan, jnp.asarray(table), *[jnp.zeros(1, jnp.int32)] * 2, block=jnp.int32(block), slab=jnp.int32(0))
            found += sum(int(pieces.piece_of(jnp.int32(i))[1]) for i in range(4 * tiles * plan.head_tiles // plan.thread_blocks))
        self.assertEqual(found, number * plan.head_tiles)

    def test_a_prompt_beside_decode_steps_has_more_clusters_than_the_chip_has_room_for_and_no_chain(self):
        """Whoever loads goes by clusters, and would wait for ever for those that compute by a chain."""
        plan, _ = launch_of(seqs=5, tokens=66, pages_per_seq=73, q_heads=64, kv_heads=4)
        self.assertEqual((plan.clusters, plan.warpgroups), (True, 2))
        self.assertGreater(plan.pieces, plan.cores)
        self.assertFalse(plan.chains)

    def test_a_chain_waits_for_no_product_alone_but_its_first_logits(self):
        """Those are two, of 64 features each; pieces alone wait for their last output too."""
        plan, arrays = launch_of(q_heads=32, kv_heads=8)
        self.assertTrue(plan.chains)
        alone = []
        for chains in (True, False):
            with mock.patch.object(Plan, "chains", chains):
                alone.append(str(jax.make_jaxpr(functools.partial(kernel.launch, plan))(*arrays)).count("wgmma_ref"))
        self.assertEqual(alone, [2, 3])

    @parameterized.named_parameters(
        ("chain", True, {}, "start_weighted numbered _results store_results"),
        ("window", False, dict(sliding_window=1000), "_results numbered store_results"),
    )
    def test_what_follows_is_looked_up_before_the_results_are_written(self, chains, call, order):
        """In a chain, beside the last product."""
        plan, arrays = launch_of(q_heads=32, kv_heads=8, **call)
        said, attention = [], compute._Attention
        places = dict(numbered=Pieces, start_weighted=compute, store_results=compute, _results=attention)
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(Plan, "chains", chains))
            for name, owner in places.items():

                def telling(*args, name=name, function=getattr(owner, name), **others):
                    said.append(name)
                    return function(*args, **others)

                patches.enter_context(mock.patch.object(owner, name, telling))
            jax.make_jaxpr(functools.partial(kernel.launch, plan))(*arrays)
        self.assertIn(order, " ".join(said))


class StepsTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("four_warpgroups", dict(warpgroups=4, block_q=256, head_dim=64, value_dim=64), True),
        ("wide_heads_with_a_window", dict(head_dim=256, value_dim=256, block_kv=64, window=100), True),
        ("wide_heads", dict(head_dim=256, value_dim=256, block_kv=64), False),
        ("window", dict(window=100), False),
    )
    def test_the_output_is_waited_for_before_the_next_weights_where_registers_are_few(self, changes, waits_first):
        self.assertEqual(plans.plan(**changes).waits_first, waits_first)


class ResultsTest(parameterized.TestCase):
    @parameterized.named_parameters(("chain", {}, 4), ("parts", dict(parts=Parts(5, 5)), 0), ("alone", dict(stages=2), 0))
    def test_whole_tiles_leave_a_chain_by_copies(self, changes, copies):
        """Two of 64 features for each of 32 tokens of a head."""
        plan, arrays = launch_of(q_heads=32, kv_heads=8)
        plan = replace(plan, **(dict(block_q=32, tiles=67) | changes))
        program = str(jax.make_jaxpr(functools.partial(kernel.launch, plan))(*arrays))
        self.assertEqual(program.count("copy_smem_to_gmem"), copies)

    def test_each_of_four_threads_comes_to_hold_the_words_of_its_group(self):
        threads = np.arange(4)
        words = [10 * group + threads for group in range(4)]
        found = operations.exchanged(
            words, lambda bit: threads & bit > 0, np.where, lambda word, bit: word[threads ^ bit]
        )
        np.testing.assert_array_equal(np.stack(found, axis=1), np.arange(4) + 10 * threads[:, None])


if __name__ == "__main__":
    absltest.main()
