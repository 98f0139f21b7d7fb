"""How kernels reach the compiler: the one place that knows jax_triton, in either form, and where it can be used.

Its 0.3 gives a kernel each result that takes an operand's memory twice, as that operand and as a result; 0.4 once. Here
a kernel's parameters are always its inputs, then its results; of an input whose memory a result takes it makes no use.
And 0.3 launches by XLA's old interface for custom calls: some 20 us of the host's time for each, where the new one that
0.4 uses takes 6. Its custom call is turned into that of 0.4, with the same contents.
"""

import functools
import importlib.util
import inspect
import warnings

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from paged_prefill.lowering.call import Device

INSTALL = 'install it with pip install "paged_prefill[cuda]"'
TARGET, NEW_TARGET = "triton_kernel_call", "triton_kernel_call_ffi"


def launch(kernel, inputs, results, *, in_place=(), **options):
    """Launches a kernel; returns its results.

    Args:
      inputs: arrays, in the order of the kernel's first parameters.
      results: their types, in the order of its next ones.
      in_place: pairs of an input and the result that takes its memory, by number. XLA copies an input that is not the
        last use of its array, else nothing.
      options: the grid, name, num_warps and num_stages, and the kernel's compile-time constants by name.
    """
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results)
    call = functools.partial(_triton_call, kernel=kernel, results=results, in_place=in_place, **options)
    return launch_p.bind(*inputs, call=call, results=results)


def _triton_call(*inputs, kernel, results, in_place, **options):
    import jax_triton

    if "out_type" not in inspect.signature(jax_triton.triton_call).parameters:
        return jax_triton.triton_call(
            *inputs, kernel=kernel, out_shape=results, input_output_aliases=dict(in_place), **options
        )
    operands = dict(zip(kernel.arg_names, inputs))
    result_names = kernel.arg_names[len(inputs) :]
    for number, result in in_place:
        operands[result_names[result]] = inputs[number]
        operands[kernel.arg_names[number]] = inputs[0]
    order = [name for name in kernel.arg_names if name in operands]
    aliases = {order.index(result_names[result]): result for _, result in in_place}
    with warnings.catch_warnings():
        # Refs are to take its place; those are not known to be free of copies.
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated", DeprecationWarning)
        return jax_triton.triton_call(
            kernel=kernel, out_type=results, input_output_aliases=aliases, **operands, **options
        )


def _lower(ctx, *operands, call, results):
    lowered = mlir.lower_fun(call)(ctx, *operands)
    operation = lowered[0].owner
    attributes, text = operation.attributes, mlir.ir.StringAttr
    if operation.name == "stablehlo.custom_call" and attributes["call_target_name"] == text.get(TARGET):
        attributes["call_target_name"] = text.get(NEW_TARGET)
        attributes["backend_config"] = mlir.ir.DictAttr.get({"opaque": attributes["backend_config"]})
        attributes["api_version"] = mlir.i32_attr(4)
    return lowered


launch_p = Primitive("paged_prefill_triton")
launch_p.multiple_results = True
launch_p.def_abstract_eval(lambda *_, call, results: [jax.core.ShapedArray(x.shape, x.dtype) for x in results])
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
