"""How kernels reach the compiler: the one place that knows jax_triton, in either form, and where it can be used.

Its 0.3 gives a kernel each result that takes an operand's memory twice, as that operand and as a result; 0.4 once. Here
a kernel's parameters are always its inputs, then its results; of an input whose memory a result takes it makes no use.
"""

import importlib.util
import inspect
import warnings

from paged_prefill.lowering.call import Device

INSTALL = 'install it with pip install "paged_prefill[cuda]"'


def launch(kernel, inputs, results, *, in_place=(), zeroed=(), **launch):
    """Launches a kernel; returns its results.

    Args:
      inputs: arrays, in the order of the kernel's first parameters.
      results: their types, in the order of its next ones.
      in_place: pairs of an input and the result that takes its memory, by number. XLA copies an input that is not the
        last use of its array, else nothing.
      zeroed: the results, by number, that hold zeros when the kernel begins.
      launch: the grid, name, num_warps and num_stages, and the kernel's compile-time constants by name.
    """
    import jax_triton

    if "out_type" not in inspect.signature(jax_triton.triton_call).parameters:
        aliases = dict(in_place)
        return jax_triton.triton_call(
            *inputs, kernel=kernel, out_shape=results, input_output_aliases=aliases, zeroed_outputs=zeroed, **launch
        )
    operands = dict(zip(kernel.arg_names, inputs))
    result_names = kernel.arg_names[len(inputs) :]
    for number, result in in_place:
        operands[result_names[result]] = inputs[number]
        operands[kernel.arg_names[number]] = inputs[0]
    order = [name for name in kernel.arg_names if name in operands]
    aliases = {order.index(result_names[result]): result for _, result in in_place}
    with warnings.catch_warnings():
        # Refs are to take the place of both; those are not known to be free of copies.
        warnings.filterwarnings("ignore", "(input_output_aliases|zeroed_outputs) is deprecated", DeprecationWarning)
        return jax_triton.triton_call(
            kernel=kernel, out_type=results, input_output_aliases=aliases, zeroed_outputs=zeroed, **operands, **launch
        )


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
