"""`append_to_pages` through Triton: one launch for keys and values, in the memory of the caches that it is given."""

import math

import jax
import jax.numpy as jnp

from paged_prefill.lowering.triton.launch import launch, power_of_2, reason_against
from paged_prefill.lowering.writer import MANY_TOKENS, Writer, places_of
from paged_prefill.primitive.layout import OWN_LAYOUT
from paged_prefill.primitive.packing import MAX_CONTEXT
from paged_prefill.primitive.quantised import largest_number

BLOCK = 16  # tokens of a program
ELEMENTS = 2**13  # of a token's features, times tokens, that a program holds in its registers
OFFSETS = 256  # that a program compares with its tokens at a time


class TritonWriter(Writer):
    """Where Triton and a GPU that it compiles for are present."""

    name = "triton"
    platforms = ("cuda", "rocm")

    def _reason_against(self, operands, device, layout):
        return reason_against(device, operands["key_cache"].dtype.name)

    def pays(self, operands):
        """XLA puts its scatters, and what Pallas makes, into a CUDA graph; Triton's launch takes 6 us of the host."""
        return math.prod(operands["key"].shape[:-2]) >= MANY_TOKENS

    def write(self, operands, cache_batch_dims, device, layout=OWN_LAYOUT):
        """Leading dimensions are folded on the way in and out, which moves nothing."""
        key, caches = operands["key"], {}
        names = [name for name in ("key", "value") if f"{name}_cache" in operands]
        granularity = {name: _granularity(operands, name, layout) for name in ("key", "value")}
        for name in names:
            caches[f"{name}_cache"] = operands[f"{name}_cache"]
        for name in names:
            if granularity[name] == "slot":
                caches[f"{name}_scales"] = operands[f"{name}_scale"]
        if layout.combined and granularity["key"] == "slot":
            granularity["value"] = "slot"
        if 0 in (*key.shape, *operands["key_cache"].shape, *operands["page_indices"].shape):
            return list(caches.values())
        written = _launch(operands, caches, granularity, cache_batch_dims, layout, _converts(device))
        return [written[name] for name in caches]


def _converts(device) -> bool:
    """Whether it has an instruction that turns float32 into float8, by itself to the nearest."""
    capability = device and device.platform == "cuda" and device.compute_capability
    return bool(capability) and tuple(map(int, capability.split("."))) >= (8, 9)


def _granularity(operands, name, layout) -> str:
    """What one scale is for; "one" where there is none."""
    scale = operands.get(f"{name}_scale")
    if scale is None:
        return "one"
    return {0: "tensor", 1: "head"}.get(scale.ndim - len(layout.lead(operands["key_cache"].shape)), "slot")


def _launch(operands, caches, granularity, cache_batch_dims, layout, fast):
    """The results of the kernel by name; `caches` are what it writes."""
    from paged_prefill.lowering.triton.append_kernel import append_tokens

    key, value, key_cache = (operands.get(name) for name in ("key", "value", "key_cache"))
    (tokens, kv_heads, head_dim), places = key.shape[-3:], places_of(operands, cache_batch_dims, layout)
    packs = places.pop("packs")
    value_dim = None if value is None else value.shape[-1]
    wide = max(power_of_2(head_dim, least=1), power_of_2(value_dim or 1, least=1))
    block = max(1, min(BLOCK, power_of_2(tokens, least=1), ELEMENTS // wide))

    # What is absent is never looked at: another array stands in for it, and a result of one element.
    absent, nothing = operands["context_lens"], jax.ShapeDtypeStruct((1,), jnp.int32)
    given = [
        absent if granularity[name] in ("one", "slot") else operands[f"{name}_scale"] for name in ("key", "value")
    ]
    results = ("key_cache", "value_cache", "key_scales", "value_scales")
    inputs = [
        key,
        absent if value is None else value,
        operands["context_lens"],
        operands["page_indices"],
        operands["query_offsets"],
        operands.get("layer", absent),
        *given,
        *(caches.get(name, absent) for name in results),
    ]
    first = len(inputs) - len(results)
    written = launch(
        append_tokens,
        inputs,
        tuple(caches.get(name, nothing) for name in results),
        in_place=[(first + i, i) for i, name in enumerate(results) if name in caches],
        grid=(packs * -(-tokens // block) * kv_heads,),
        name="append_to_pages",
        num_warps=4,
        num_stages=1,
        **{name.upper(): number for name, number in places.items()},
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=power_of_2(head_dim, least=1),
        VALUE_DIM=value_dim,
        VALUE_DIM_PADDED=power_of_2(value_dim or 1, least=1),
        KEY_SCALE=granularity["key"],
        VALUE_SCALE=granularity["value"],
        LARGEST=largest_number(key_cache.dtype) if key_cache.dtype.itemsize == 1 else None,
        FAST=fast,
        MAX_CONTEXT=MAX_CONTEXT,
        BLOCK=block,
        OFFSETS=min(OFFSETS, power_of_2(places["seqs"] + 1, least=1)),
    )
    return dict(zip(results, written))
