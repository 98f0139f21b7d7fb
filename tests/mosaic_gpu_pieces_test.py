"""What the Hopper kernel does between two pieces of work, where no GPU is needed: its first loads, and its results."""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import ragged_paged_prefill
from paged_prefill.lowering.mosaic_gpu import host
from paged_prefill.lowering.mosaic_gpu.hopper import kernel, operations
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan


def launch_of(seqs=1, tokens=2048, pages_per_seq=128, **parameters):
    """The plan that a call launches the kernel with, and the shapes of its arrays."""
    shapes = [(tokens, 8, 128), (2, 64, 16, 128), (2, 64, 16, 128), (seqs,), (seqs, pages_per_seq), (seqs + 1,)]
    dtypes = [jnp.bfloat16] * 3 + [jnp.int32] * 3
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes)]
    call = jax.jit(functools.partial(ragged_paged_prefill, platform="cuda", **parameters))
    with mock.patch.object(host, "launch", wraps=host.launch) as launch:
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


class ResultsTest(parameterized.TestCase):
    def test_each_of_four_threads_comes_to_hold_the_words_of_its_group(self):
        threads = np.arange(4)
        words = [10 * group + threads for group in range(4)]
        found = operations.exchanged(
            words, lambda bit: threads & bit > 0, np.where, lambda word, bit: word[threads ^ bit]
        )
        np.testing.assert_array_equal(np.stack(found, axis=1), np.arange(4) + 10 * threads[:, None])


if __name__ == "__main__":
    absltest.main()
