"""Two thread blocks of a cluster that copy keys and values for one another, since their tiles are of the same tokens.

The tiles are two heads' of one KV head. Each copies half of every block of keys, to both (multicast): so the second
cache is asked for it once. A place is free again once both have read it: each warp that has says so to both. Both go
through the same steps, and neither ends before the other.
"""

from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper.arrivals import SPLAT, barrier_of, wait
from paged_prefill.lowering.mosaic_gpu.hopper.plan import MATES, WARP_LANES, WARPGROUP_THREADS

arith, llvm = compat.mlir_dialects("arith", "llvm")


def cluster_of(thread_blocks: int) -> dict:
    """How so many are launched."""
    return dict(grid=(thread_blocks // MATES,), cluster=(MATES,), cluster_names=("mate",))


def number_of(block):
    """A thread block's number among all, of its cluster's; and among the two."""
    mate = lax.axis_index("mate")
    return MATES * block + mate, mate


def readers(warpgroups: int) -> int:
    """Warps that let go of a place."""
    return MATES * warpgroups * (WARPGROUP_THREADS // WARP_LANES)


def fence_initialised() -> None:
    """By who initialised barriers, before `meet`: the other block finds them so behind it."""
    _do("fence.mbarrier_init.release.cluster;")


def meet() -> None:
    """All threads of both blocks wait for one another: none is told of anything before it has begun, or once it has ended."""
    _do("barrier.cluster.arrive.release;", "barrier.cluster.wait.acquire;")


def wait_for_place(free, place, step, places: int) -> None:
    """Until both blocks have read what a step that many places before this one's brought."""
    wait(free, place, lax.div(step, jnp.int32(places)) - 1)


def let_go(free, place) -> None:
    """One lane of each warp says to each block that the warp has read what is in a place."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def arrive(_, free, place):
        i32 = ir.IntegerType.get_signless(32)
        lane = arith.remui(utils.thread_idx(), arith.constant(i32, WARP_LANES))
        # What was read is not written but by copies: without a scope no memory is waited for, which takes as long as a
        # fifth of a step.
        assembly = (
            f"{{ .reg .pred p; .reg .b32 there; setp.lt.u32 p, $1, {MATES}; mapa.shared::cluster.u32 there, $0, $1; "
            "@p mbarrier.arrive.shared::cluster.b64 _, [there]; }"
        )
        address = barrier_of(free, place).get_ptr()
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [address, lane], assembly, "r,r,~{memory}", has_side_effects=True)

    arrive(free, place)


def _do(*instructions: str) -> None:
    @plgpu.inline_mgpu(arg_types=())
    def do(_):
        for text in instructions:
            llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, "~{memory}", has_side_effects=True)

    do()
