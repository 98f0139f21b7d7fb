"""Stands in for jax_triton where there is no GPU: interprets a kernel on the CPU, or compiles it for a target.

Triton decides when it is first imported whether kernels are interpreted, for the whole process. So the functions here
run in processes of their own, which import what they need after that is settled.
"""

import functools
import os
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


def _interpret(
    *operands, kernel, out_shape, grid, name, num_warps, num_stages, input_output_aliases, **constants
):
    """As `jax_triton.triton_call`, on the CPU. Results hold NaN wherever the kernel does not write."""
    import jax

    if "SOFTMAX" in constants:
        constants["SOFTMAX"] = constants["SOFTMAX"]._replace(precision="ieee")  # the only way of the interpreter, though it knows the names of some others

    def launch(*operands):
        inputs = [HostTensor(np.array(x)) for x in operands]
        results = [HostTensor(_unwritten(s)) for s in out_shape]
        for number, result in input_output_aliases.items():
            results[result] = inputs[number]
        HostTensor.alive = inputs + results
        kernel[grid](*HostTensor.alive, **constants)
        return [x.array for x in results]

    return jax.pure_callback(launch, list(out_shape), *operands)


def _unwritten(result):
    """An array of what would be seen: NaN, or the largest integer."""
    dtype = np.dtype(result.dtype)
    return np.full(result.shape, np.iinfo(dtype).max if dtype.kind in "iu" else np.nan, dtype)


def _extend_interpreter():
    """Adds to Triton's interpreter products of bfloat16, rounding to any dtype, and a check that accesses stay inside."""
    import ml_dtypes
    from triton.runtime import interpreter

    builder, tl = interpreter.InterpreterBuilder, interpreter.tl
    dot = builder.create_dot
    load, store = builder.create_masked_load, builder.create_masked_store
    # The interpreter holds these as integers.
    real = {tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn, tl.float8e5: ml_dtypes.float8_e5m2}

    def widened(handle):  # the interpreter holds bfloat16 as the upper halves of float32
        if handle.data.dtype != np.uint16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    def widened_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def rounding_cast(self, source, dtype, *rounding):  # the interpreter's own cuts float32 off, or takes the integers
        numbers, to = source.data, dtype.scalar
        if source.dtype.scalar in real:
            numbers = numbers.view(real[source.dtype.scalar])
        if to not in real:
            return interpreter.TensorHandle(numbers.astype(interpreter._get_np_dtype(to)), to)
        return interpreter.TensorHandle(numbers.astype(real[to]).view(interpreter._get_np_dtype(to)), to)

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

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = widened_dot, rounding_cast, rounding_cast
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store


def _hasten_interpreter():
    """Leaves out what Triton's interpreter does for nothing, which is more than half of its time."""
    from triton.runtime import interpreter

    # Overflow is worked out for each sum and product, and asserted under `debug` alone.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    # Each call of a function looks for what there is to patch in the language that its module sees. Here that stays.
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        module = function.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            patch(function)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once


def interpret_triton():
    """Makes platform="triton" run on this process's CPU, by Triton's interpreter. Once, before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    _extend_interpreter()
    _hasten_interpreter()
    sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=_interpret)
    from paged_prefill.lowering.choose import KERNELS
    from paged_prefill.lowering.triton.append import TritonWriter

    triton = KERNELS["cpu"]["triton"] = KERNELS["cuda"]["triton"]
    triton.supports = lambda problem, device: None
    TritonWriter.supports = lambda self, operands, device, layout: None
    TritonWriter.pays = lambda self, operands: True
    TritonWriter.platforms = ("cpu",)


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


def check_second_form_interpreted(kind, parameters, vmapped=None):
    """Holds a call, arguments of `poisoned.make_call`, to the oracle, in a process prepared by `interpret_triton`.

    `vmapped` names operands that two calls, a vmap, have each its own of; they share the others. The call may have
    another `cache_layout` among its parameters.
    """
    import jax

    from paged_prefill import ragged_paged_prefill
    from paged_prefill.tests import layouts, oracle, poisoned

    attend = functools.partial(ragged_paged_prefill, platform="triton", return_lse=True, **parameters)
    layout = parameters.get("cache_layout")
    parameters = {name: x for name, x in parameters.items() if name not in ("cfg", "cache_layout")}
    call = poisoned.make_call(**kind)
    if vmapped is None:
        laid = layouts.lay(call, layout) if layout else call
        oracle.assert_matches(call, *jax.jit(lambda call: attend(**call))(laid), **parameters)
        return
    call = {name: x for name, x in call.items() if x is not None}
    other = poisoned.make_call(**kind | dict(seed=kind["seed"] + 1))
    calls = [call, call | {name: other[name] for name in vmapped}]
    stacked = {name: np.stack([each[name] for each in calls]) if name in vmapped else x for name, x in call.items()}
    axes = {name: 0 if name in vmapped else None for name in call}
    out, lse = jax.jit(jax.vmap(lambda call: attend(**call), (axes,)))(stacked)
    for i, each in enumerate(calls):
        oracle.assert_matches(each, out[i], lse[i], **parameters)


def check_appended_interpreted(kinds, layout=None):
    """Holds appends, arguments of `append_test.make_append`, to the definition, in a process of `interpret_triton`."""
    import jax

    from paged_prefill import append_to_pages
    from paged_prefill.tests import append_test, layouts

    for kind in kinds:
        call = append_test.make_append(**kind)
        if layout is None:
            append_test.assert_written(call, jax.jit(append_to_pages)(**call))
        else:
            layouts.check_written(call, layout)


def rounded_interpreted(cache_dtype, numbers):
    """Numbers as they are stored by a scale of 1, as float32."""
    import jax.numpy as jnp

    from paged_prefill import append_to_pages

    key = np.asarray(numbers, np.float32).reshape(1, 1, -1)
    cache = jnp.zeros((1, 1, 1, key.shape[-1]), cache_dtype)
    indices = dict(context_lens=np.int32([1]), page_indices=np.int32([[0]]), query_offsets=np.int32([0, 1]))
    written, _ = append_to_pages(key_cache=cache, value_cache=None, key=key, value=None, **indices)
    return np.asarray(written.astype(jnp.float32)).reshape(-1)


def _record():
    """Makes `jax_triton.triton_call` put what it is given into the list that this returns."""
    launches = []

    def record(*operands, out_shape, input_output_aliases, **launch):
        import jax.numpy as jnp

        launches.append((*operands, *out_shape, launch))
        return [jnp.zeros(s.shape, s.dtype) for s in out_shape]

    sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=record)
    return launches


def compile_launches(launches):
    """Compiles what `attend` launches at the heuristic sizes. For a process in which Triton is not interpreted.

    `launches` are arguments of Triton's GPUTarget, the Device, the Problem, and what `_call` takes beside. Returns for
    each what the machine code takes: shared memory, the bytes (NVIDIA) or registers (AMD) it spills, global memory of its
    own, and how often it has NVIDIA's instruction for tanh.
    """
    from paged_prefill.lowering.triton.host import Triton

    return [
        compile_one(target, problem, device, Triton().heuristic(problem, device), **optional)
        for target, device, problem, optional in launches
    ]


def compile_one(target, problem, device, config, **optional):
    """What `compile_launches` says of one call with these sizes."""
    launches = _record()
    import jax

    from paged_prefill.lowering.triton.host import Triton

    attend = jax.jit(functools.partial(Triton().attend, config=config, device=device))
    attend.trace(_call(problem, **optional)).lower(lowering_platforms=("cuda" if target[0] == "cuda" else "rocm",))
    resources = [_compile(target, *launch) for launch in launches]  # of the attention, and the merge where there is one
    return {name: max(each[name] for each in resources) for name in resources[0]}


def _call(p, scale=None, ranges=False, tree=False, sinks=False):
    """A call of a problem, without values; scales of this granularity, key_ranges, a tree of 64 tokens, sinks."""
    import jax

    from paged_prefill.lowering.call import Call, Sequences

    def of_type(shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    sizes = {"kv_heads": p.cache_kv_heads, "num_pages": p.num_pages, "page_size": p.page_size, "2": 2}
    pages = (p.pools, *(sizes[dim] for dim in p.layout.apart[:-1]))
    latent, absent = "latent" in p.features, p.layout.combined
    shapes = dict(tensor=(p.pools,), head=(p.pools, p.cache_kv_heads), slot=pages)
    scale = of_type(shapes[scale], "float32") if scale else None
    return Call.of(
        of_type((p.tokens, p.q_heads, p.head_dim), p.dtype),
        of_type((*pages, p.head_dim), p.cache_dtype),
        None if latent or absent else of_type((*pages, p.value_dim), p.cache_dtype),
        Sequences(*[of_type((p.seqs,))] * 4, of_type((p.seqs, p.pages_per_seq))),
        of_type(()),
        num_kv_heads=p.num_kv_heads,
        attention=p.attention,
        value_dim=p.value_dim,
        key_scale=scale,
        value_scale=None if latent or absent else scale,
        layout=p.layout,
        ranges=of_type((p.tokens, 2)) if ranges else None,
        tree=of_type((p.tokens, 2), "uint32") if tree else None,
        sinks=of_type((1, p.q_heads), "float32") if sinks else None,
    )


def compile_appends(target, calls):
    """Compiles appends whose operands have these (shape, dtype) by name; returns what each takes, as `compile_launches`."""
    launches = _record()
    import jax

    from paged_prefill.lowering.call import Device
    from paged_prefill.lowering.triton.append import TritonWriter

    for call in calls:
        operands = {name: jax.ShapeDtypeStruct(*of_type) for name, of_type in call.items()}
        device = Device("cuda", "a GPU", f"{target[1] // 10}.{target[1] % 10}") if target[0] == "cuda" else None
        jax.jit(lambda operands: TritonWriter().write(operands, 0, device)).lower(operands)
    return [_compile(target, *launch) for launch in launches]


_POINTERS = {
    "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32", "int8": "*i8", "uint32": "*u32",
    "float8_e4m3fn": "*fp8e4nv", "float8_e5m2": "*fp8e5",
}  # fmt: skip


def _compile(target, *arrays_and_launch):
    """The resources of one launch's machine code. Pointers are multiples of 16 bytes, as jax_triton has them."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from paged_prefill.lowering.triton.launch import as_launched

    *arrays, launch = arrays_and_launch
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
    kernel, _, _ = launch.pop("kernel"), launch.pop("grid"), launch.pop("name")
    signature = {n: _POINTERS[np.dtype(a.dtype).name] for n, a in zip(kernel.arg_names, arrays)}
    signature |= dict.fromkeys(launch, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    compiled = compile(ASTSource(kernel, signature, launch, attributes), target=GPUTarget(*target), options=options)
    resources = {
        "shared_bytes": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0),
        "tanh_instructions": sum(str(text).count("tanh.approx") for text in compiled.asm.values()),
        "converts": "cvt.rn.satfinite.e" in str(compiled.asm.get("ptx")),
        "scratch": getattr(compiled.metadata, "global_scratch_size", 0),
        "stores": set(re.findall(r"st\.global\.(v4\.b32|\w+)", str(compiled.asm.get("ptx")))),
    }
    if "ptx" in compiled.asm:
        ptx = as_launched(compiled.asm["ptx"], compiled.metadata.shared)
        return resources | _ptx_resources(ptx, target[1])
    found = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"]))
    return resources | {"spilled": int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])}


def _ptx_resources(ptx, capability):
    """Registers and spilled bytes by Triton's assembler, but as the PTX is launched: by no options.

    Triton 3.9 has its own machine code made with another allocation of registers, which spills more; nothing runs that.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file, tempfile.NamedTemporaryFile(suffix=".cubin") as out:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", file.name, "-o", out.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stack, stored = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said).groups())
    return {"registers": int(re.search(r"Used (\d+) registers", said).group(1)), "spilled": max(stack, stored)}
