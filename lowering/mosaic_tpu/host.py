"""The TPU kernel, in Pallas Mosaic: flash attention with pages fetched by asynchronous copies.

One pallas_call runs a whole pack. Its grid walks over the items of schedule.py, the rows of one sequence in one tile of
the query; what it does with one is in kernel.py. Here is what the rest of lowering/ calls: which problems it supports,
the sizes it runs with, and the call itself.

It reads caches in row-major layout, rows padded to whole registers. A cache in another layout, as XLA prefers where
the last dimension is no multiple of 128, is copied before the call; docs/serving.md says how to allocate it.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from paged_prefill.lowering.call import Call, Device, Problem
from paged_prefill.lowering.kernel import Kernel
from paged_prefill.lowering.mosaic_tpu import schedule
from paged_prefill.lowering.mosaic_tpu.kernel import Scratch, kernel
from paged_prefill.lowering.mosaic_tpu.schedule import LANES, power_of_2, round_up, sublanes
from paged_prefill.primitive.config import PrefillPageAttentionConfig

BYTES_IN_FLIGHT = 4 * 2**20  # keys and values of one block that the heuristics aim at
SMEM_BYTES = 3 * 2**18  # of the chip's 1 MiB, what items and page tables may take

CHIPS = {
    "TPU v4": pltpu.ChipVersion.TPU_V4,
    "TPU v5e": pltpu.ChipVersion.TPU_V5E,
    "TPU v5 lite": pltpu.ChipVersion.TPU_V5E,
    "TPU v5": pltpu.ChipVersion.TPU_V5P,
    "TPU v5p": pltpu.ChipVersion.TPU_V5P,
    "TPU v6e": pltpu.ChipVersion.TPU_V6E,
    "TPU v6 lite": pltpu.ChipVersion.TPU_V6E,
    "TPU7": pltpu.ChipVersion.TPU_7,
    "TPU7x": pltpu.ChipVersion.TPU_7X,
}


class MosaicTpu(Kernel):
    """Takes bfloat16 and float32, and page sizes that are multiples of the chip's tile, on v4 and later."""

    name = "mosaic_tpu"
    version = 2
    platforms = ("tpu",)

    def _reason_against(self, problem: Problem, device: Device) -> str | None:
        if device.kind is None:
            return (
                "Mosaic must know the TPU that it compiles for, and there is none here: lower within "
                "jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, 'tpu')))"
            )
        if device.kind not in CHIPS:
            return f"it is built for {', '.join(CHIPS)}, not for {device.kind}"
        if problem.dtype not in ("bfloat16", "float32"):
            return f"TPU matrix units take bfloat16 and float32, not {problem.dtype}"
        packing = sublanes(problem.dtype)
        if problem.page_size % packing:
            return f"page_size {problem.page_size} must be a multiple of {packing} for {problem.dtype}"
        return self.misfit(problem, device, self.heuristic(problem, device))

    def heuristic(self, problem: Problem, device: Device) -> PrefillPageAttentionConfig:
        """Rows enough to keep the matrix unit's weights busy, keys enough to hide the memory's latency, within VMEM."""
        packing = sublanes(problem.dtype)
        block_q = 2 * max(power_of_2(schedule.ROWS // problem.group), packing)
        block_q = min(block_q, round_up(problem.tokens, packing))
        itemsize = jnp.dtype(problem.dtype).itemsize
        bytes_per_key = problem.num_kv_heads * (problem.head_dim + problem.value_dim) * itemsize
        block_kv = min(max(power_of_2(BYTES_IN_FLIGHT // bytes_per_key), schedule.CHUNK), 4 * schedule.CHUNK)
        block_kv = min(block_kv, round_up(problem.capacity, LANES))
        config = PrefillPageAttentionConfig(block_q=block_q, block_kv=block_kv)
        while vmem_bytes(problem, config) > _vmem_budget(device):
            if block_kv > schedule.CHUNK or block_q <= packing < block_kv:
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

    def misfit(self, problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> str | None:
        """How sizes pass the chip's memories, or None."""
        if vmem_bytes(problem, config) > _vmem_budget(device):
            return (
                f"{problem.q_heads} query heads and {problem.num_kv_heads} KV heads of head_dim {problem.head_dim} and "
                f"value_dim {problem.value_dim}, with block_q {config.block_q} and block_kv {config.block_kv}, need "
                f"{vmem_bytes(problem, config)} bytes of VMEM, more than the {_vmem_budget(device)} here"
            )
        if smem_bytes(problem, config) > SMEM_BYTES:
            return (
                f"{problem.seqs} sequences of {problem.tokens} tokens with {problem.pages_per_seq} pages each, with "
                f"block_q {config.block_q}, need {smem_bytes(problem, config)} bytes of SMEM, more than {SMEM_BYTES}"
            )
        return None

    def attend(self, call: Call, config: PrefillPageAttentionConfig, device: Device):
        """Uses block_q and block_kv."""
        problem, sequences = call.problem, call.sequences
        tokens, q_heads, num_kv_heads, group = problem.tokens, problem.q_heads, problem.num_kv_heads, problem.group
        head_dim, value_dim = problem.head_dim, problem.value_dim
        sizes = schedule.sizes_of(config, group, problem.page_size, problem.dtype)
        block_q, attention = sizes.block_q, problem.attention
        items, count = schedule.work_items(sequences, tokens, problem.capacity, block_q, attention)

        # With a scale that is not positive, the sign goes to the query: the maximum is taken before scaling.
        query = call.query
        if attention.softmax_scale <= 0:
            query = query * jnp.sign(attention.softmax_scale).astype(query.dtype)
        tiles = -(-tokens // block_q)
        query = jnp.pad(query, ((0, tiles * block_q - tokens), (0, 0), (0, 0)))
        query = query.reshape(-1, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        table = jnp.pad(sequences.page_indices, ((0, 0), (0, -problem.pages_per_seq % LANES)))[:, None]

        def in_runs(pages):
            pools, heads, num_pages, _, features = pages.shape
            return pages.reshape(pools, heads, num_pages * sizes.runs_per_page, sizes.run, features)

        # A chip whose two cores are one device splits the KV heads between them.
        splits = schedule.largest_divisor(num_kv_heads, device.cores)
        heads = num_kv_heads // splits

        def tile_of(split, item, head_start, tile, *_):
            return (split, 0, tile[item], 0)

        def lse_tile_of(split, item, head_start, tile, *_):
            return (split, tile[item], 0)

        in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
        out, lse = pl.pallas_call(
            functools.partial(
                kernel,
                sizes=sizes,
                softmax_scale=abs(attention.softmax_scale) or 1.0,
                soft_cap=attention.attn_logits_soft_cap,
                window=attention.sliding_window,
            ),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1 + len(items),
                grid=(splits, jnp.maximum(count, 1)),
                in_specs=[pl.BlockSpec((heads, group, block_q, head_dim), tile_of), in_hbm, in_hbm, in_hbm],
                out_specs=[
                    pl.BlockSpec((heads, group, block_q, value_dim), tile_of),
                    pl.BlockSpec((None, block_q, q_heads // splits), lse_tile_of),
                ],
                scratch_shapes=list(_scratch(problem, sizes, heads)),
            ),
            out_shape=[
                jax.ShapeDtypeStruct((num_kv_heads, group, tiles * block_q, value_dim), query.dtype),
                jax.ShapeDtypeStruct((splits, tiles * block_q, q_heads // splits), jnp.float32),
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=max(vmem_bytes(problem, config), 16 * 2**20),
                disable_bounds_checks=True,  # every index was clamped by call.flatten
            ),
            name="paged_prefill",
        )(call.kv_head_start.reshape(1), *items, query, in_runs(call.key_pages), in_runs(call.value_pages), table)

        # Rows that no sequence owns were not written.
        owned = schedule.owned_tokens(sequences, tokens)
        out = out[:, :, :tokens].transpose(2, 0, 1, 3).reshape(tokens, q_heads, value_dim)
        lse = lse[:, :tokens].transpose(1, 0, 2).reshape(tokens, q_heads)
        return jnp.where(owned[:, None, None], out, 0), jnp.where(owned[:, None], lse, -jnp.inf)


def _scratch(problem: Problem, sizes: schedule.Sizes, heads: int) -> Scratch:
    """What the kernel keeps on the chip, for so many KV heads."""
    rows, part_rows = problem.group * sizes.block_q, problem.group * sizes.part
    cache_dtype = jnp.dtype(problem.cache_dtype)

    def buffer(features):
        return pltpu.VMEM((2, sizes.runs_per_block, heads, sizes.run, features), cache_dtype)

    return Scratch(
        keys=buffer(problem.head_dim),
        values=buffer(problem.value_dim),
        table=pltpu.SMEM((2 * round_up(problem.pages_per_seq, LANES),), jnp.int32),
        acc=pltpu.VMEM((heads, rows, problem.value_dim), jnp.float32),
        m=pltpu.VMEM((heads, rows, LANES), jnp.float32),
        l=pltpu.VMEM((heads, rows, LANES), jnp.float32),
        logits=pltpu.VMEM((2, part_rows, sizes.chunk), jnp.float32),
        weights=pltpu.VMEM((2, part_rows, sizes.chunk), cache_dtype),
        fade=pltpu.VMEM((2, part_rows, LANES), jnp.float32),
        sums=pltpu.VMEM((2, -(-sizes.chunk // schedule.DEPTH), part_rows, problem.value_dim), jnp.float32),
        slot=pltpu.SMEM((1,), jnp.int32),
        page_sems=pltpu.SemaphoreType.DMA((2,)),
        table_sems=pltpu.SemaphoreType.DMA((2,)),
    )


def _vmem_budget(device: Device) -> int:
    """Bytes of VMEM the kernel may plan with: what JAX reports for one core, less an eighth for the compiler."""
    return pltpu.get_tpu_info_for_chip(CHIPS[device.kind], 1).vmem_capacity_bytes * 7 // 8


def vmem_bytes(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """VMEM that a configuration takes, from above: buffers, running values, and one step's intermediates."""
    sizes = schedule.sizes_of(config, problem.group, problem.page_size, problem.dtype)
    itemsize = jnp.dtype(problem.dtype).itemsize
    features = round_up(problem.head_dim, LANES) + round_up(problem.value_dim, LANES)
    rows = problem.q_heads * sizes.block_q
    pages = 2 * problem.num_kv_heads * sizes.run * sizes.runs_per_block * features * itemsize
    tiles = 2 * rows * features * itemsize + 2 * sizes.block_q * round_up(problem.q_heads, LANES) * 4
    running = rows * (round_up(problem.value_dim, LANES) + 2 * LANES) * 4
    per_row = sizes.chunk * (4 + itemsize) + LANES * 4
    per_row += -(-sizes.chunk // schedule.DEPTH) * round_up(problem.value_dim, LANES) * 4
    buffers = 2 * problem.group * sizes.part * per_row
    # What the compiler keeps of a masked step besides.
    step = 2 * problem.group * sizes.part * (round_up(sizes.chunk, LANES) + features) * 4
    return pages + tiles + running + buffers + step


def smem_bytes(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """SMEM that the items and two rows of the page table take."""
    sizes = schedule.sizes_of(config, problem.group, problem.page_size, problem.dtype)
    items = schedule.max_items(problem.tokens, problem.seqs, sizes.block_q)
    return 4 * (len(schedule.Items._fields) * round_up(items, LANES) + 2 * round_up(problem.pages_per_seq, LANES))
