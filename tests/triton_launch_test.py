"""Protects how launches reach XLA from either form of jax_triton, which a stand-in takes the place of."""

import sys
import types
from unittest import mock
import zlib

from absl.testing import absltest, parameterized
import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
import jax.numpy as jnp

from paged_prefill.lowering.call import Device
from paged_prefill.lowering.triton.launch import as_launched, launch
from paged_prefill.lowering.triton.merge import merge, merge_sizes

KERNEL = types.SimpleNamespace(arg_names=["index", "cache_before", "cache", "more", "SIZE"])
INDEX, CACHE = jnp.zeros(3, jnp.int32), jnp.zeros((4, 5))


def run(index, cache):
    """Writes `cache` in place, and one result more."""
    results = (cache, jax.ShapeDtypeStruct((1,), jnp.int32))
    return launch(KERNEL, [index, cache], results, in_place=[(1, 0)], grid=(1,), name="write", SIZE=7)


def message(**fields) -> bytes:
    """A protocol buffer, of numbers and bytes by f"_{number}"."""

    def integer(value):
        return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + integer(value // 128)

    def field(number, value):
        is_integer = isinstance(value, int)
        content = integer(value) if is_integer else integer(len(value)) + value
        return integer(8 * number + 2 * (not is_integer)) + content

    return b"".join(field(int(name[1:]), value) for name, value in fields.items())


PTX = """// text
.version 9.4
.target sm_90a
.visible .entry write(
    .param .u64 .ptr .global .align 1 write_param_0,
    .param .u64 .ptr .global .align 1 write_param_1,
    .param .u64 .ptr .global .align 1 write_param_2,
    .param .u64 .ptr .global .align 1 write_param_3,
    .param .u64 .ptr .global .align 1 write_param_4,
    .param .u64 .ptr .global .align 1 write_param_5
)
{ ld.param.u64 %rd1, [write_param_0]; }"""
COMPILED = message(_1=b"write", _2=4, _3=54272, _4=PTX.encode(), _5=b"text", _6=90, _10=1)
OPAQUE = zlib.compress(message(_1=message(_1=COMPILED, _2=576, _3=1, _4=1, _5=message(_1=b"")), _4=b"write"))

old_p, new_p = Primitive("old"), Primitive("new")
for form, parameters in (
    (old_p, dict(call_target_name="triton_kernel_call", api_version=2, backend_config=OPAQUE)),
    (new_p, dict(call_target_name="triton_kernel_call_ffi")),
):
    form.multiple_results = True
    form.def_abstract_eval(lambda *_, results: [jax.core.ShapedArray(x.shape, x.dtype) for x in results])

    def lower(ctx, *operands, results, form=form, parameters=parameters):
        given = dict(opaque=OPAQUE) if form is new_p else {}
        return jax.ffi.ffi_lowering(**parameters)(ctx, *operands, **given)

    mlir.register_lowering(form, lower)


def old_triton_call(*operands, kernel, out_shape, input_output_aliases, grid, name, SIZE):
    assert (input_output_aliases, SIZE) == ({1: 0}, 7)
    return old_p.bind(*operands, results=tuple(out_shape))


def new_triton_call(*, kernel, out_type, grid, name, SIZE, index, cache_before):
    assert SIZE == 7
    return new_p.bind(index, cache_before, results=tuple(out_type))


@parameterized.parameters(old_triton_call, new_triton_call)
class LaunchTest(parameterized.TestCase):
    def lowered(self, triton_call, platform) -> str:
        with mock.patch.dict(sys.modules, jax_triton=types.SimpleNamespace(triton_call=triton_call)):
            traced = jax.jit(lambda *operands: run(*operands)).trace(INDEX, CACHE)
            return traced.lower(lowering_platforms=(platform,)).as_text()

    def test_on_nvidia_xla_is_given_the_ptx(self, triton_call):
        text = self.lowered(triton_call, "cuda")
        self.assertNotIn("triton_kernel_call", text)
        # Triton's two parameters after the four of the kernel.
        self.assertIn("@__gpu$xla.gpu.ptx(%arg0, %arg1, %arg0, %arg0)", text)
        self.assertIn(r'kernel_data = ".version 9.0\0A.target sm_90a\0A.visible .entry write(', text)
        for name, value in dict(grid_x=576, grid_y=1, grid_z=1, block_x=128, shared_mem_bytes=54272).items():
            self.assertIn(f"{name} = {value} : i32", text)
        self.assertIn("output_indices = [2 : i32, 3 : i32]", text)
        self.assertIn("output_operand_alias<output_tuple_indices = [0], operand_index = 1", text)

    def test_on_amd_jaxlib_is_given_what_it_takes(self, triton_call):
        text = self.lowered(triton_call, "rocm")
        self.assertIn("@triton_kernel_call_ffi(%arg0, %arg1)", text)
        self.assertIn("opaque = ", text)
        self.assertIn("output_operand_alias<output_tuple_indices = [0], operand_index = 1", text)


class PtxTest(absltest.TestCase):
    def test_a_block_that_no_core_holds_twice_leaves_registers_for_no_second(self):
        ptx = ".version 8.7\n.target sm_100a\n.visible .entry write()\n.reqntid 256\n{ }"
        self.assertIn(".reqntid 256 .minnctapersm 1\n", as_launched(ptx, 115 * 1024))
        self.assertEqual(as_launched(ptx, 114 * 1024), ptx)
        self.assertNotIn("minnctapersm", as_launched(ptx.replace("100", "90"), 115 * 1024))


class MergeTest(absltest.TestCase):
    def test_results_are_a_pair_as_every_kernel_has(self):
        """Timing compares them with the XLA lowering's, leaf by leaf of one tree: in a list, no parts would be timed."""
        kernel = {"paged_prefill.lowering.triton.merge_kernel": types.SimpleNamespace(merge_parts=None)}
        parts = jnp.zeros((5, 2, 3, 64)), jnp.zeros((5, 2, 3))
        with mock.patch.dict(sys.modules, kernel):
            results = jax.eval_shape(lambda *parts: merge(*parts, jnp.bfloat16, None, Device("cuda", None)), *parts)
        self.assertIsInstance(results, tuple)
        self.assertEqual([x.shape for x in results], [(5, 2, 64), (5, 2)])

    def test_few_rows_have_all_parts_on_their_way_and_many_no_more_programs_than_cores_start(self):
        few, more, many = (merge_sizes(rows, 64, 128, False, 132) for rows in (96, 512, 8192))
        self.assertEqual((few.at_once, few.rows, few.width, few.widths), (64, 1, 32, 4))
        self.assertEqual((more.at_once, more.rows, more.width), (32, 1, 64))
        self.assertEqual((many.at_once, many.rows, many.width), (16, 1, 128))
        self.assertEqual(merge_sizes(8192, 4, 128, False, 132).rows, 4)


if __name__ == "__main__":
    absltest.main()
