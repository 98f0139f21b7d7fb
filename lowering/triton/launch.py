"""How kernels reach the GPU: the one place that knows jax_triton, in either form, and where it can be used.

A kernel's parameters are its inputs, then its results; of an input whose memory a result takes it makes no use.

jax_triton compiles a kernel to PTX and launches it by a custom call of jaxlib's. That may be part of a CUDA graph, but
XLA has it launch anew for every new address of an array, where it copies the kernel's text and looks it up by that: 5
us and more. To XLA's own custom call for PTX a kernel is like those that XLA writes, of which a graph only takes other
addresses. So on NVIDIA that takes its place. For AMD there is none.
"""

import functools
import importlib.util
import inspect
import re
import zlib

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
import numpy as np

from paged_prefill.lowering.call import Device

INSTALL = 'install it with pip install "paged_prefill[cuda]"'
TARGETS, PTX_TARGET = ("triton_kernel_call", "triton_kernel_call_ffi"), "__gpu$xla.gpu.ptx"
# The driver compiles the PTX, and one of CUDA 13.0 reads none newer than this. Triton takes the newest that its own
# assembler knows, of which it makes no use.
PTX_VERSION = 9.0
# Shared memory of a block, in bytes, that no core holds twice. Of such ones the assembler need not save registers for a
# second: left to itself, for Blackwell that of CUDA 13.0 spills some where it comes close. For Hopper none does.
ALONE = 114 * 2**10


def launch(kernel, inputs, results, *, in_place=(), **options):
    """Launches a kernel; returns its results.

    Args:
      inputs: arrays, in the order of the kernel's first parameters. No result takes the memory of the first.
      results: their types, in the order of its next ones.
      in_place: pairs of an input and the result that takes its memory, by number. XLA copies an input that is not the
        last use of its array, else nothing.
      options: the grid, name, num_warps and num_stages, and the kernel's compile-time constants by name.
    """
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results)
    call = functools.partial(_triton_call, kernel=kernel, results=results, in_place=in_place, **options)
    return launch_p.bind(*inputs, call=call, results=results, in_place=tuple(in_place))


def _triton_call(*inputs, kernel, results, in_place, **options):
    import jax_triton

    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:
        # It would give the kernel a result that takes an operand's memory once. What memory is shared, `_lower` says.
        return jax_triton.triton_call(
            kernel=kernel, out_type=results, **dict(zip(kernel.arg_names, inputs)), **options
        )
    return jax_triton.triton_call(
        *inputs, kernel=kernel, out_shape=results, input_output_aliases=dict(in_place), **options
    )


def _lower(ctx, *operands, call, results, in_place):
    lowered = mlir.lower_fun(call)(ctx, *operands)
    theirs = lowered[0].owner
    if theirs.name != "stablehlo.custom_call" or theirs.attributes["call_target_name"].value not in TARGETS:
        return lowered  # a stand-in's
    old = theirs.attributes["call_target_name"].value == TARGETS[0]
    config = theirs.attributes["backend_config" if old else "mhlo.backend_config"]
    opaque = (config if old else config["opaque"]).value_bytes
    theirs.operation.erase()
    target, config = TARGETS[1], {"opaque": opaque}
    if ctx.module_context.platforms[0] == "cuda":
        target, config, hidden = PTX_TARGET, *_ptx(opaque, len(operands), len(results))
        operands += operands[:1] * hidden
        ctx = ctx.replace(avals_in=[*ctx.avals_in, *ctx.avals_in[:1] * hidden])
    return jax.ffi.ffi_lowering(target, operand_output_aliases=dict(in_place))(ctx, *operands, **config)


def _ptx(opaque: bytes, inputs: int, results: int):
    """What XLA's custom call takes of jax_triton's; and how many parameters follow the kernel's own.

    Triton adds those, for memory that a kernel may ask for. Ours do not, so it does not matter where they point.
    """
    launched = _fields(_fields(zlib.decompress(opaque))[1])
    compiled = _fields(launched[1])
    name, ptx = compiled[1].decode(), compiled[4].decode()
    declared = re.search(rf"\.entry {name}\(([^)]*)\)", ptx).group(1).count(".param")
    shared_bytes = compiled.get(3, 0)
    sizes = {f"grid_{axis}": launched[number] for number, axis in enumerate("xyz", 2)}
    sizes |= dict(block_x=32 * compiled[2], block_y=1, block_z=1, shared_mem_bytes=shared_bytes)
    config = dict(name=name, kernel_type="ptx", kernel_data=as_launched(ptx, shared_bytes))
    config |= {name: np.int32(size) for name, size in sizes.items()}
    config["output_indices"] = [np.int32(inputs + number) for number in range(results)]
    return config, declared - inputs - results


def as_launched(ptx: str, shared_bytes: int) -> str:
    """Triton's PTX as drivers are given it."""
    version, rest = re.search(r"(?<=\.version )(\S+)(.*)", ptx, re.DOTALL).groups()
    if shared_bytes > ALONE and ".target sm_1" in rest:
        rest = re.sub(r"(\.(?:max|req)ntid \d+)", r"\1 .minnctapersm 1", rest, count=1)
    return f".version {min(float(version), PTX_VERSION)}{rest}"


def _fields(message: bytes) -> dict:
    """A protocol buffer's fields by number: integers, and the bytes of what has a length. Of TritonAnyKernelCall:

    1 is a TritonKernelCall, of which 2 to 4 are the grid and 1 is a TritonKernel, of which 1 is the name, 2 the warps,
    3 the bytes of shared memory and 4 the PTX.
    """
    fields, at = {}, 0

    def integer():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(message):
        key, value = integer(), integer()
        if key % 8 == 2:
            value, at = message[at : at + value], at + value
        fields[key // 8] = value
    return fields


launch_p = Primitive("paged_prefill_triton")
launch_p.multiple_results = True
launch_p.def_abstract_eval(lambda *_, results, **kwargs: [jax.core.ShapedArray(x.shape, x.dtype) for x in results])
mlir.register_lowering(launch_p, _lower)


def reason_against(device: Device, cache_dtype: str) -> str | None:
    """None, or why no kernel for caches of that dtype can be built for a device."""
    for package in ("triton", "jax_triton"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is missing; {INSTALL}"
    if device.compute_capability is None:
        return f"there is no {device.platform} device in this process to compile for"
    if device.platform != "cuda":
        return None
    if capability(device) < 80:
        return f"it needs a GPU of compute capability 8.0 or newer, this one has {device.compute_capability}"
    if cache_dtype == "float8_e4m3fn" and capability(device) < 89:
        return (
            f"float8_e4m3fn caches need compute capability 8.9, this GPU has {device.compute_capability}; it takes "
            "float8_e5m2 and int8"
        )
    return None


def capability(device: Device) -> int:
    """The compute capability, 90 for 9.0; where it is not known, that of the GPU whose sizes fit every other."""
    major, minor = (device.compute_capability or "8.0").split(".")
    return 10 * int(major) + int(minor)


def power_of_2(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`: 16 is the smallest side of a matrix product."""
    return max(least, 1 << max(n - 1, 0).bit_length())
