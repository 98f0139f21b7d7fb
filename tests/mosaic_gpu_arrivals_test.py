"""What the Hopper kernel announces to barriers of its own: a GPU waits for ever where fewer bytes come, and not at all
where more do. All of it is seen where a call is lowered.
"""

import contextlib
import math
from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest, parameterized
import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.interpreters.mlir import ir

from paged_prefill import PrefillPageAttentionConfig as Config, compat, lowering, ragged_paged_prefill
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.mosaic_gpu.hopper import arrivals, cluster

BYTES = dict(cache="float8_e4m3fn")
PROMPT = dict(seqs=1, tokens=8192)


@contextlib.contextmanager
def announced_and_copied():
    """For each announcement that is lowered meanwhile, a list: its bytes, and those of each copy behind it."""
    found, barriers, described = [], [], []
    write, ask, describe = arrivals.llvm.inline_asm, arrivals.barrier_of, compat.copy_descriptor
    copy = mgpu.LaunchContext.async_copy

    def constant(value):
        return ir.IntegerAttr(value.owner.attributes["value"]).value

    def bytes_of(array, shape):
        return math.prod(shape) * utils.bitwidth(ir.MemRefType(array.type).element_type) // 8

    def inline_asm(kind, operands, text, *args, **others):
        if "arrive.expect_tx" in text:
            number = operands[1]
            # A cluster announces so much for each of a thread's two rows that are there.
            of_rows = number.owner.name == "arith.muli"
            found.append([2 * constant(number.owner.operands[1]) if of_rows else constant(number)])
        elif "cp.async.bulk.shared" in text:
            found[-1].append(constant(operands[2]))
        elif "cp.async.bulk.tensor" in text:  # two blocks copy as much, to both
            found[-1].append(described.pop(0) * (2 if "multicast" in text else 1))
        elif text.startswith("st.async"):
            found[-1].append(8 if ".v2.f32" in text else 4)
        return write(kind, operands, text, *args, **others)

    def copy_descriptor(context, source, shape, *args):
        described.append(bytes_of(source, shape))
        return describe(context, source, shape, *args)

    def barrier(*args):
        barriers.append(ask(*args))
        return barriers[-1]

    def async_copy(self, **given):
        if any(given.get("barrier") is one for one in barriers):
            found[-1].append(bytes_of(given["src_ref"], [place.length for place in given["gmem_slice"]]))
        return copy(self, **given)

    # In these modules alone: some versions of JAX announce their own copies with such instructions.
    llvm = SimpleNamespace(**(vars(arrivals.llvm) | dict(inline_asm=inline_asm)))
    with (
        mock.patch.object(arrivals, "llvm", llvm),
        mock.patch.object(cluster, "llvm", llvm),
        mock.patch.object(arrivals, "barrier_of", barrier),
        mock.patch.object(compat, "copy_descriptor", copy_descriptor),
        mock.patch.object(mgpu.LaunchContext, "async_copy", async_copy),
    ):
        yield found


def lower(seqs=2, tokens=64, head_dim=128, value_dim=None, page_size=16, cache="bfloat16", layout="kpsd", **parameters):
    """A call of 8 query heads over 2 KV heads."""
    shape = jax.ShapeDtypeStruct
    dims = dict(k=2, p=max(64, 2 * tokens // page_size), s=page_size)
    caches = [shape((*(dims[name] for name in layout[:-1]), d), cache) for d in (head_dim, value_dim or head_dim)]
    quantised = cache != "bfloat16"
    operands = [shape((tokens, 8, head_dim), "bfloat16"), *caches, shape((seqs,), "int32"), shape((seqs, dims["p"] // 2), "int32")]
    operands += [shape((seqs + 1,), "int32"), *[shape((2,), "float32")] * (2 * quantised)]

    def call(*arrays):
        scales = dict(zip(("key_scale", "value_scale"), arrays[6:]))
        return ragged_paged_prefill(*arrays[:6], platform="cuda", cache_layout=layout, **scales, **parameters)

    with mock.patch.object(lowering, "device_of", return_value=Device("cuda", "NVIDIA H200", "9.0")):
        jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",))


class ArrivalsTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("parts_of_narrow_heads", dict(head_dim=80)),
        ("parts_of_two_widths", dict(head_dim=112, value_dim=48, page_size=64, tokens=2)),
        ("two_blocks_for_one_another", PROMPT),
        ("two_blocks_of_other_heads", PROMPT | dict(layout="pskd", head_dim=64, page_size=64)),
        ("pages_of_a_prompt", PROMPT | dict(sliding_window=850)),
        ("bytes", BYTES),
        ("rows_of_bytes_as_a_plain_run", BYTES | dict(head_dim=512)),
        ("rows_of_bytes_one_by_one", BYTES | dict(head_dim=512, layout="pskd")),
        ("bytes_as_products_read_them", BYTES | dict(cfg=Config(fp8_terms=1))),
        ("results_of_a_cluster", dict(seqs=8, tokens=8)),
    )
    def test_as_many_bytes_are_announced_as_copied(self, call):
        with announced_and_copied() as found:
            lower(**call)
        self.assertNotEmpty(found)
        for announced, *copied in found:
            self.assertGreater(len(copied), 0)
            self.assertEqual(announced, sum(copied))


if __name__ == "__main__":
    absltest.main()
