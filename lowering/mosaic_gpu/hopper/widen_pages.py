"""The kernel that widens what a call sees of a quantised cache, once and before all of its tiles.

Keys and values of each sequence are written out in the order of its page table, times their scales, in bfloat16. What
a table has room for beyond its contexts is neither read nor written, nor are keys that have left every row's window.
"""

from dataclasses import dataclass
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper import threads
from paged_prefill.lowering.mosaic_gpu.hopper.widen import CHUNK, HALVES
from paged_prefill.primitive.packing import harmless_contexts

(llvm,) = compat.mlir_dialects("llvm")

THREADS = 128
ROWS = 64  # of keys, and of values, that a block widens
AT_ONCE = 8  # chunks that a thread asks for before it waits for the first
WORDS = CHUNK // 4  # of a chunk in 8 bits

# From two numbers of float16 in $1, times $2, to two of bfloat16 in $0.
_SCALED = """{
    .reg .b16 low, high;
    .reg .f32 first, second;
    mov.b32 {low, high}, $1;
    cvt.f32.f16 first, low;
    cvt.f32.f16 second, high;
    mul.f32 first, first, $2;
    mul.f32 second, second, $2;
    cvt.rn.bf16x2.f32 $0, second, first;
}"""


@dataclass(frozen=True)
class Kind:
    """Keys, or values."""

    features: int
    beside: int  # rows from those of keys to these
    scale: str | None  # one for a "tensor", a "head" or a "slot"

    @property
    def chunks(self) -> int:
        """Of a row."""
        return self.features // CHUNK


@dataclass(frozen=True)
class Launch:
    """Everything static about it. A cache is a matrix of rows of features; `*_rows` are those from one to the next."""

    kinds: tuple[Kind, ...]
    cache_dtype: str
    seqs: int
    seqs_of_pool: int  # that have one entry among the pools
    capacity: int  # keys that a sequence's row of the page table has room for
    last_keys: int  # of a context: no others are seen, whatever tokens are new
    pages_per_seq: int
    kv_heads: int  # whose keys and values are wanted
    cache_kv_heads: int
    pools: int
    num_pages: int
    page_size: int
    pool_rows: int
    head_rows: int
    page_rows: int
    slot_rows: int

    @property
    def rows(self) -> int:
        """Of the results."""
        return self.kv_heads * self.seqs * self.capacity


def widen_pages(launch: Launch, indices, caches, scales):
    """Keys, and values if they are apart, [kv_heads * seqs * capacity, features] in bfloat16.

    `indices` are page_indices, pools (of each pack, or sequence), context_lens, kv_head_start, in one dimension each;
    of `caches` [rows, features] there is one for each kind, and of `scales` one for each kind that has any.
    """
    kernel = plgpu.kernel(
        functools.partial(_kernel, launch),
        out_type=tuple(jax.ShapeDtypeStruct((launch.rows, kind.features), jnp.bfloat16) for kind in launch.kinds),
        grid=(launch.seqs, -(-launch.capacity // ROWS), launch.kv_heads),
        grid_names=("seq", "part", "head"),
        num_threads=THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="widen_pages",
    )
    return kernel(*indices, *caches, *scales)


def _kernel(launch: Launch, *arrays):
    block = [lax.axis_index(axis) for axis in ("seq", "part", "head")]
    indices, kinds = arrays[:4], len(launch.kinds)
    caches, scales, results = arrays[4 : 4 + kinds], arrays[4 + kinds : -kinds], arrays[-kinds:]
    *_, has_work = keys_of(launch, block, indices)
    pl.when(has_work)(lambda: widen_rows(launch, threads, in_bfloat16, block, indices, caches, scales, results))


def keys_of(launch: Launch, block, indices):
    """A block's first key, where those of its sequence end, and whether the block has any that may be seen."""
    (seq, part, _), (_, _, contexts, _) = block, indices
    first, context = part * ROWS, harmless_contexts(contexts[seq])
    end = jnp.minimum(context, launch.capacity)
    return first, end, (first < end) & (first + ROWS > context - launch.last_keys)


def widen_rows(launch: Launch, threads, in_bfloat16, block, indices, caches, scales, results):
    """What a thread does of a block's rows, those of one KV head's next keys: there is one at least.

    `threads` and `in_bfloat16` have the words for it.
    """
    (seq, _, head), (pages, pools, _, kv_head_start) = block, indices
    first, end, _ = keys_of(launch, block, indices)
    pool, cache_head = jnp.clip(pools[lax.div(seq, launch.seqs_of_pool)], 0, launch.pools - 1), kv_head_start[0] + head
    pool_head = pool * launch.cache_kv_heads + cache_head
    first_row = pool * launch.pool_rows + cache_head * launch.head_rows
    scales = iter(scales)
    for kind, cache, result in zip(launch.kinds, caches, results, strict=True):
        its_scales = None if kind.scale is None else next(scales)
        turns = ROWS * kind.chunks // THREADS
        for turn in range(0, turns, AT_ONCE):
            numbers = [(turn + i) * THREADS + threads.number() for i in range(min(AT_ONCE, turns - turn))]
            keys = [first + lax.div(number, kind.chunks) for number in numbers]
            columns = [lax.rem(number, kind.chunks) * CHUNK for number in numbers]
            here = [jnp.where(key < end, key, first) for key in keys]  # what is asked for in place of a key that is not
            columns_of_pages = [seq * launch.pages_per_seq + lax.div(key, launch.page_size) for key in here]
            found = [jnp.clip(threads.load(pages, place), 0, launch.num_pages - 1) for place in columns_of_pages]
            rows = [
                first_row + kind.beside + page * launch.page_rows + lax.rem(key, launch.page_size) * launch.slot_rows
                for page, key in zip(found, here)
            ]
            words = [threads.load_words(cache, *place, WORDS) for place in zip(rows, columns)]
            match kind.scale:
                case "slot":
                    factors = [threads.load(its_scales, row) for row in rows]
                case None:
                    factors = [jnp.float32(1)] * len(rows)
                case scale:
                    factors = [threads.load(its_scales, pool if scale == "tensor" else pool_head)] * len(rows)
            for key, column, chunk, factor in zip(keys, columns, words, factors):
                widened = [wide for word in chunk for wide in in_bfloat16(word, launch.cache_dtype, factor)]
                row = (head * launch.seqs + seq) * launch.capacity + key
                threads.store_words(widened, result, row, column, key < end)


def in_bfloat16(word, dtype, scale):
    """The 4 numbers of 8 bits in a word, times a scale, as two words of bfloat16."""
    own = plgpu.Layout.WG_SPLAT
    word_type = plgpu.ShapeDtypeStruct((), jnp.int32, layout=own)

    @plgpu.inline_mgpu(arg_types=(own, own), return_type=[word_type] * 2)
    def turn(_, word, scale):
        i32 = ir.IntegerType.get_signless(32)
        pair = llvm.StructType.get_literal([i32, i32])
        halves = llvm.inline_asm(pair, [word.registers.item()], "{" + HALVES[dtype] + "}", "=&r,=&r,r")
        found = []
        for i in range(2):
            operands = [llvm.extractvalue(i32, halves, [i]), scale.registers.item()]
            scaled = llvm.inline_asm(i32, operands, _SCALED, "=r,r,f")
            found.append(mgpu.FragmentedArray.splat(scaled, (), is_signed=True))
        return found

    return turn(word, scale)
