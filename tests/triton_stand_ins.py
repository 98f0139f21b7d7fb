"""Stands in for jax_triton where there is no GPU: interprets a kernel on the CPU, or compiles it for a target.

Triton decides when it is first imported whether kernels are interpreted, for the whole process. So the functions here
run in processes of their own, which import what they need after that is settled.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import types

import numpy as np


class HostTensor:
    """An array that Triton's interpreter takes for a torch tensor in host memory: it works in place."""

    alive = ()  # those of the launch in progress

    def __init__(self, array):
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.array is self.array, "the interpreter made a copy, which would lose the results"

    def new_empty(self, size, device):
        return HostTensor(self.array)

    def set_(self, storage, offset, size, stride):
        assert storage.array is self.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


def _interpret(*operands, kernel, out_shape, grid, name, num_warps, num_stages, **constants):
    """As `jax_triton.triton_call`, on the CPU. Results hold NaN wherever the kernel does not write."""
    import jax

    constants["PRECISION"] = "ieee"  # the only way of the interpreter, though it knows the names of some others

    def launch(*operands):
        results = [np.full(s.shape, np.nan, s.dtype) for s in out_shape]
        HostTensor.alive = [HostTensor(np.array(x)) for x in (*operands, *results)]
        kernel[grid](*HostTensor.alive, **constants)
        results = [x.array for x in HostTensor.alive[len(operands) :]]
        return results

    return jax.pure_callback(launch, list(out_shape), *operands)


def _extend_interpreter():
    """Adds to Triton's interpreter products of bfloat16, rounding to it, and a check that accesses stay inside."""
    import ml_dtypes
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl
    load, store = builder.create_masked_load, builder.create_masked_store

    def widened(handle):  # the interpreter holds bfloat16 as the upper halves of float32
        if handle.data.dtype != np.uint16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    def widened_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def rounding_cast(self, source, dtype):  # the interpreter's own cuts float32 off to bfloat16
        if source.dtype.scalar == interpreter.tl.float32 and dtype.scalar == interpreter.tl.bfloat16:
            return interpreter.TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), dtype.scalar)
        return cast(self, source, dtype)

    def check_inside(pointers, mask):
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = [(x.data_ptr() <= used) & (used + size <= x.data_ptr() + x.array.nbytes) for x in HostTensor.alive]
        assert np.any(inside, axis=0).all(), "the kernel looked outside its operands"

    def checked_load(self, pointers, mask, *rest):
        check_inside(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check_inside(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_dot, builder.cast_impl = widened_dot, rounding_cast
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store


def interpret_triton():
    """Makes platform="triton" run on this process's CPU, by Triton's interpreter. Once, before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    _extend_interpreter()
    sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=_interpret)
    from paged_prefill.lowering.choose import KERNELS

    triton = KERNELS["cpu"]["triton"] = KERNELS["cuda"]["triton"]
    triton.supports = lambda problem, device: None


def check_interpreted(case, columns=None, kv_head=None):
    """Holds a case to the reference, in a process prepared by `interpret_triton`.

    `columns`, if given, is how many columns of the page table are left: keys past it are not seen. `kv_head`, if given,
    is the one head of the cache that is attended to, by the query heads of its group, as on one device of several.
    """
    from paged_prefill.primitive.prefill import local_paged_prefill_p
    from paged_prefill.tests import packs

    pack = case.pack()
    group, start, num_kv_heads = case.q_heads // case.kv_heads, kv_head or 0, case.kv_heads
    if kv_head is not None:
        pack, num_kv_heads = pack._replace(query=pack.query[:, kv_head * group : (kv_head + 1) * group]), 1
    pack = pack._replace(page_indices=pack.page_indices[:, :columns])
    parameters = dict(case.parameters, platform="triton", config=case.cfg)
    results = local_paged_prefill_p.bind(*pack, np.int32(start), num_kv_heads=num_kv_heads, **parameters)
    if kv_head is not None:
        caches = (cache[kv_head : kv_head + 1] for cache in (pack.key_cache, pack.value_cache))
        pack = pack._replace(**dict(zip(("key_cache", "value_cache"), caches)))
    packs.assert_matches_reference(pack, *results, **case.parameters)


def check_broken_interpreted(case, numbers):
    """`cases.check_broken`, in a process prepared by `interpret_triton`."""
    from paged_prefill import ragged_paged_prefill
    from paged_prefill.tests import cases

    def attend(pack):
        return ragged_paged_prefill(*pack, **case.parameters, cfg=case.cfg, platform="triton", return_lse=True)

    cases.check_broken(attend, case, numbers)


def compile_launches(target, problems):
    """Compiles what `attend` launches at the heuristic sizes. For a process in which Triton is not interpreted.

    `target` is the arguments of Triton's GPUTarget and `problems` are (Problem, Device) pairs.
    Returns for each what the machine code takes: shared memory, the bytes (NVIDIA) or registers (AMD) it spills, and how
    often it has NVIDIA's instruction for tanh.
    """
    launches = []

    def record(*operands, out_shape, **launch):
        import jax.numpy as jnp

        launches.append((*operands, *out_shape, launch))  # one for NVIDIA, then one for AMD
        return [jnp.zeros(s.shape, s.dtype) for s in out_shape]

    sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=record)
    import jax

    from paged_prefill.lowering.call import Call, Sequences
    from paged_prefill.lowering.triton.host import Triton

    def of_type(shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    triton, resources = Triton(), []
    for p, device in problems:
        pages = (p.pools, p.cache_kv_heads, p.num_pages, p.page_size)
        sequences = Sequences(*[of_type((p.seqs,))] * 4, of_type((p.seqs, p.pages_per_seq)))
        query = of_type((p.tokens, p.q_heads, p.head_dim), p.dtype)
        caches = [of_type((*pages, features), p.dtype) for features in (p.head_dim, p.value_dim)]
        static = dict(num_kv_heads=p.num_kv_heads, attention=p.attention)
        call = Call.of(query, *caches, sequences, of_type(()), **static)
        jax.eval_shape(functools.partial(triton.attend, config=triton.heuristic(p, device), device=device), call)
        resources.append(_compile(target, *launches[-2 if target[0] == "cuda" else -1]))
    return resources


_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32"}


def _compile(target, *arrays_and_launch):
    """The resources of one launch's machine code. Pointers are multiples of 16 bytes, as jax_triton has them."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    *arrays, launch = arrays_and_launch
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
    kernel, _, _ = launch.pop("kernel"), launch.pop("grid"), launch.pop("name")
    signature = {n: _POINTERS[np.dtype(a.dtype).name] for n, a in zip(kernel.arg_names, arrays)}
    signature |= dict.fromkeys(launch, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    compiled = compile(ASTSource(kernel, signature, launch, attributes), target=GPUTarget(*target), options=options)
    resources = {
        "shared_bytes": compiled.metadata.shared,
        "tanh_instructions": sum(str(text).count("tanh.approx") for text in compiled.asm.values()),
    }
    if "cubin" in compiled.asm:
        return resources | _cubin_resources(compiled.asm["cubin"])
    found = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"]))
    return resources | {"spilled": int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])}


def _cubin_resources(cubin):
    """Registers and spilled bytes, as the cuobjdump that comes with Triton reads them."""
    import triton

    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return {"registers": int(registers), "spilled": int(stack) + int(local)}
