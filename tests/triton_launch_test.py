"""Protects how launches reach either form of jax_triton, which a stand-in takes the place of."""

import sys
import types
from unittest import mock

from absl.testing import absltest
import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
import jax.numpy as jnp

from paged_prefill.lowering.triton.launch import launch

KERNEL = types.SimpleNamespace(arg_names=["index", "cache_before", "cache", "more", "SIZE"])
INDEX, CACHE = jnp.zeros(3, jnp.int32), jnp.zeros((4, 5))


def run(index, cache):
    """Writes `cache` in place, and one result more."""
    results = (cache, jax.ShapeDtypeStruct((1,), jnp.int32))
    return launch(KERNEL, [index, cache], results, in_place=[(1, 0)], grid=(1,), name="write", SIZE=7)


class LaunchTest(absltest.TestCase):
    def lowered(self, triton_call) -> str:
        with mock.patch.dict(sys.modules, jax_triton=types.SimpleNamespace(triton_call=triton_call)):
            return jax.jit(lambda *operands: run(*operands)).lower(INDEX, CACHE).as_text()  # traced anew

    def test_a_call_by_the_old_interface_goes_by_the_new_one_with_the_same_contents(self):
        old = Primitive("triton_kernel_call")
        old.multiple_results = True
        old.def_abstract_eval(lambda *_, types, aliases: [jax.core.ShapedArray(x.shape, x.dtype) for x in types])

        def lower(ctx, *operands, types, aliases):
            rule = jax.ffi.ffi_lowering(
                "triton_kernel_call", api_version=2, backend_config=b"ab\x00\xff", operand_output_aliases=dict(aliases)
            )
            return rule(ctx, *operands)

        mlir.register_lowering(old, lower)

        def triton_call(*operands, kernel, out_shape, input_output_aliases, grid, name, SIZE):
            return old.bind(*operands, types=tuple(out_shape), aliases=tuple(input_output_aliases.items()))

        text = self.lowered(triton_call)
        self.assertIn('@triton_kernel_call_ffi(%arg0, %arg1) {api_version = 4 : i32', text)
        self.assertIn(r'backend_config = {opaque = "ab\00\FF"}', text)
        self.assertIn("output_operand_alias<output_tuple_indices = [0], operand_index = 1", text)

    def test_the_form_that_takes_an_aliased_result_once(self):
        given = {}

        def triton_call(*operands, kernel, out_type, input_output_aliases, grid, name, **named):
            given.update(named, operands=operands, aliases=input_output_aliases)
            return [jnp.zeros(x.shape, x.dtype) for x in out_type]

        self.lowered(triton_call)
        self.assertEqual(given["operands"], ())
        self.assertEqual([given[name].shape for name in ("index", "cache_before", "cache")], [(3,), (3,), (4, 5)])
        self.assertEqual((given["aliases"], given["SIZE"]), ({2: 0}, 7))
        self.assertNotIn("more", given)


if __name__ == "__main__":
    absltest.main()
