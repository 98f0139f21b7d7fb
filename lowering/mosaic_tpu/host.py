"""The TPU kernels, in Pallas Mosaic: flash attention with pages fetched by asynchronous copies.

A pack takes two launches: of kernel.py for sequences of several new tokens, and of decode.py for those of one. Here is
what the rest of lowering/ calls: which problems they support, and the sizes they run with.

It reads caches in row-major layout, rows padded to whole registers. A cache in another layout, as XLA prefers where
the last dimension is no multiple of 128, is copied before the call; docs/serving.md says how to allocate it.
"""

import dataclasses

import jax.numpy as jnp

from paged_prefill.lowering.call import FEATURES, Call, Device, Problem, nothing_seen
from paged_prefill.lowering.kernel import Kernel
from paged_prefill.lowering.mosaic_tpu import decode, fetching, kernel, schedule
from paged_prefill.lowering.mosaic_tpu.chips import SMEM_BYTES, kind_reason, vmem_budget
from paged_prefill.lowering.mosaic_tpu.schedule import LANES, power_of_2_up_to, round_up, sublanes
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy

BYTES_IN_FLIGHT = 4 * 2**20  # keys and values of one block that the heuristics aim at


class MosaicTpu(Kernel):
    """Takes bfloat16 and float32, over caches of them or quantised, and pages of whole tiles, on v4 and later."""

    name = "mosaic_tpu"
    version = 9
    platforms = ("tpu",)
    features = frozenset(FEATURES)
    invariant = True

    def _reason_against(self, problem: Problem, device: Device) -> str | None:
        if reason := kind_reason(device):
            return reason
        if problem.dtype not in ("bfloat16", "float32"):
            return f"TPU matrix units take bfloat16 and float32, not {problem.dtype}"
        dims = problem.layout.apart
        if dims.index("kv_heads") > dims.index("page_size"):
            return (
                f"cache_layout={problem.layout.name!r} has the slots of a head apart, and the chip copies whole tiles of "
                'them: it takes those with slots behind heads, "kpsd", "pksd" and "p2ksd"'
            )
        packing = sublanes(problem.dtype)
        if problem.page_size % packing:
            return f"page_size {problem.page_size} must be a multiple of {packing} for {problem.dtype}"
        if "slot_scales" in problem.features and problem.seqs * problem.columns > 2 * problem.pools * problem.num_pages:
            return (
                f"scales of each slot are gathered by page_indices, and {problem.seqs} rows of {problem.pages_per_seq} are "
                f"more than twice the {problem.pools * problem.num_pages} pages of the caches: give it fewer columns, as "
                "many as the longest context needs"
            )
        return self.misfit(problem, device, self.heuristic(problem, device))

    def heuristic(self, problem: Problem, device: Device) -> PrefillPageAttentionConfig:
        """Rows enough to keep the matrix unit's weights busy, keys enough to hide the memory's latency, within VMEM.

        Of these, bits depend on the chunks of keys alone. Under the policy "invariant" there is one size of them, and
        calls for which it is too large are another kernel's.
        """
        packing = sublanes(problem.dtype)
        block_q = 2 * max(power_of_2_up_to(schedule.ROWS // problem.group), packing)
        block_q = min(block_q, round_up(problem.tokens, packing))
        itemsize = jnp.dtype(problem.cache_dtype).itemsize
        bytes_per_key = problem.num_kv_heads * (problem.head_dim + problem.value_dim) * itemsize
        block_kv = min(max(power_of_2_up_to(BYTES_IN_FLIGHT // bytes_per_key), schedule.CHUNK), 4 * schedule.CHUNK)
        block_kv = min(block_kv, round_up(problem.capacity, LANES))
        if invariant := current_policy() == "invariant":
            block_kv = schedule.CHUNK
        config = PrefillPageAttentionConfig(block_q=block_q, block_kv=block_kv)
        while vmem_bytes(problem, config) > vmem_budget(device):
            if not invariant and (block_kv > schedule.CHUNK or block_q <= packing < block_kv):
                block_kv = round_up(block_kv // 2, packing)
            elif block_q > packing:
                block_q = round_up(block_q // 2, packing)
            else:
                break
            config = PrefillPageAttentionConfig(block_q=block_q, block_kv=block_kv)
        return config

    def candidates(self, problem: Problem, device: Device) -> list[PrefillPageAttentionConfig]:
        """The heuristic configuration and its neighbours, of those that fit."""
        best = self.heuristic(problem, device)
        candidates = [best]
        for rows in (1, 2, 0.5):
            for keys in (1, 2, 0.5):
                config = PrefillPageAttentionConfig(
                    block_q=round_up(int(best.block_q * rows), sublanes(problem.dtype)),
                    block_kv=round_up(int(best.block_kv * keys), LANES),
                )
                if config not in candidates and self.misfit(problem, device, config) is None:
                    candidates.append(config)
        return candidates

    def choices(self, problem: Problem, device: Device) -> dict[str, tuple[int, ...]]:
        """Halves of the heuristic's, which the chip's memories have room for."""
        first, packing = self.heuristic(problem, device), sublanes(problem.dtype)
        halves = lambda size: tuple(round_up(max(size >> i, 1), packing) for i in range(size.bit_length()))
        return dict(block_q=halves(first.block_q), block_kv=halves(first.block_kv))

    def misfit(self, problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> str | None:
        """How sizes pass the chip's memories, or None."""
        if vmem_bytes(problem, config) > vmem_budget(device):
            return (
                f"{problem.q_heads} query heads and {problem.num_kv_heads} KV heads of head_dim {problem.head_dim} and "
                f"value_dim {problem.value_dim}, with block_q {config.block_q} and block_kv {config.block_kv}, need "
                f"{vmem_bytes(problem, config)} bytes of VMEM, more than the {vmem_budget(device)} here"
            )
        if smem_bytes(problem, config) > SMEM_BYTES:
            return (
                f"{problem.seqs} sequences of {problem.tokens} tokens with {problem.pages_per_seq} pages each, with "
                f"block_q {config.block_q}, need {smem_bytes(problem, config)} bytes of SMEM, more than {SMEM_BYTES}"
            )
        return None

    def attend(self, call: Call, config: PrefillPageAttentionConfig, device: Device):
        """Uses block_q and block_kv."""
        problem = call.problem
        if problem.attention.softmax_scale <= 0:  # the sign goes to the query: the maximum is taken before scaling
            sign = jnp.sign(problem.attention.softmax_scale).astype(call.query.dtype)
            call = dataclasses.replace(call, query=call.query * sign)
        sizes = schedule.sizes_of(config, problem)
        # A chip whose two cores are one device splits the KV heads between them.
        splits = schedule.largest_divisor(problem.num_kv_heads, device.cores)
        # With the eighth that the budget leaves to the compiler, which spills masks of each row's own.
        limit = max(vmem_bytes(problem, config) * 9 // 8, 16 * 2**20)
        out, lse = kernel.attend(call, sizes, splits, limit) if problem.tokens > 1 else nothing_seen(problem)
        out, lse = decode.attend(call, sizes, splits, limit, out, lse)
        _, owned = schedule.owners(call.sequences, problem.tokens)  # other rows were not written
        return call.with_sinks(out, jnp.where(owned[:, None], lse, -jnp.inf))


def vmem_bytes(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """VMEM that a configuration takes, from above."""
    sizes = schedule.sizes_of(config, problem)
    launches = max(kernel.vmem_bytes(problem, sizes), decode.vmem_bytes(problem, sizes))
    return fetching.vmem_bytes(problem, sizes) + launches


def smem_bytes(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """SMEM that the items and two rows of the page table take."""
    sizes = schedule.sizes_of(config, problem)
    items = max(schedule.max_items(problem.tokens, problem.seqs, sizes.block_q), problem.seqs)
    return 4 * (len(schedule.Items._fields) * round_up(items, LANES) + 2 * round_up(problem.pages_per_seq, LANES))
