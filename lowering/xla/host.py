"""What the rest of lowering/ calls of the streaming lowering: its sizes, and in which dtype it multiplies."""

import functools

import jax.numpy as jnp

from paged_prefill.lowering.call import FEATURES, Call, Device, Problem
from paged_prefill.lowering.kernel import Kernel
from paged_prefill.lowering.xla.kernel import attend
from paged_prefill.lowering.xla.walks import ACCELERATOR_TURNS, CPU_TURNS
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy

# From so many keys on, large tiles and blocks pay: in shorter contexts, they compute too much that no row sees. What two
# threads of a CPU share must be larger. There up to so many keys are a single block, for which no loop over blocks runs.
LONG_TABLE, CPU_LONG_TABLE, CPU_ONLY_BLOCK = 4096, 1024, 640
# Up to so many, tiles of half the height leave fewer rows idle, and the first has half the keys.
CPU_LOW_TABLE = 128
# A CPU's products are fastest of so many rows, of all heads that share keys, and 256 keys. From so many keys on, tiles
# may be that tall.
CPU_PRODUCT_ROWS, CPU_TALL_TABLE = 4096, 4096
# The most bytes of one KV head's logits in a turn on a CPU.
CPU_LOGITS_BYTES = 2**22


class Xla(Kernel):
    """Runs every call, anywhere."""

    name = "xla"
    version = 19
    platforms = ("cpu", "tpu", "cuda", "rocm")
    features = frozenset(FEATURES)
    invariant = True

    def _reason_against(self, problem: Problem, device: Device) -> str | None:
        return None

    def heuristic(self, problem: Problem, device: Device) -> PrefillPageAttentionConfig:
        """The sizes that were best on the whole in benchmarks/results/cpu.md.

        They follow the page table's width, and nothing else that differs between a sequence alone and in a pack: so its
        bits do not either, for one width, where both are cut into the same heights (`walks.heights_of_call`). Under the
        policy "invariant" they follow not even that.
        """
        keys = problem.capacity
        if current_policy() == "invariant" or not isinstance(keys, int):
            return PrefillPageAttentionConfig(block_q=256, block_kv=512)
        if device.platform == "cpu":
            return _cpu_sizes(keys, problem.group)
        if keys > LONG_TABLE:
            return PrefillPageAttentionConfig(block_q=256, block_kv=512)
        return PrefillPageAttentionConfig(block_q=128, block_kv=min(_in_eights(keys), 256))

    def candidates(self, problem: Problem, device: Device) -> list[PrefillPageAttentionConfig]:
        """The heuristic sizes and their neighbours."""
        first = self.heuristic(problem, device)
        times = [(1, 1), (1, 0.5), (1, 2), (2, 0.5), (2, 1), (0.5, 1), (0.25, 1)]
        sizes = [(int(first.block_q * q), _in_eights(int(first.block_kv * kv))) for q, kv in times]
        return [PrefillPageAttentionConfig(block_q=q, block_kv=kv) for q, kv in dict.fromkeys(sizes)]

    def misfit(self, problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> str | None:
        """Any sizes will do."""
        return None

    def attend(self, call: Call, config: PrefillPageAttentionConfig, device: Device):
        """Uses block_q and block_kv."""
        turns = CPU_TURNS if device.platform == "cpu" else ACCELERATOR_TURNS
        return attend(call, config, _product_dtype(call.query.dtype, device), turns)


def _cpu_sizes(keys: int, group: int) -> PrefillPageAttentionConfig:
    """A CPU's sizes for tables of so many keys, where so many heads share each."""
    if keys <= CPU_ONLY_BLOCK:
        block_q, block_kv = 64 if keys <= CPU_LOW_TABLE else 128, _in_eights(keys)
    elif keys <= CPU_TALL_TABLE:
        block_q, block_kv = 256, 512 if keys > CPU_LONG_TABLE and group < 4 else 256
    else:
        block_q, block_kv = max(256, min(1024, CPU_PRODUCT_ROWS // group // 256 * 256)), 256
    while block_q > 32 and 4 * block_q * group * block_kv > CPU_LOGITS_BYTES:
        block_q //= 2
    if 4 * block_q * group * block_kv > CPU_LOGITS_BYTES:
        block_kv = min(block_kv, 256)
    return PrefillPageAttentionConfig(block_q=block_q, block_kv=block_kv)


def _product_dtype(dtype, device: Device):
    """That of products' operands. Where a CPU cannot multiply 16-bit floats, XLA would convert them one by one."""
    wide = device.platform == "cpu" and not (dtype == jnp.bfloat16 and _cpu_multiplies_bfloat16())
    return jnp.dtype(jnp.float32) if wide else dtype


def _in_eights(keys: int) -> int:
    """The next multiple of 8."""
    return -(-keys // 8) * 8


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU of this machine does it faster than it multiplies float32, as far as Linux says.

    Without AMX, which a virtual machine may hide, Intel's takes half as long again as for float32, and AMD's half.
    """
    try:
        with open("/proc/cpuinfo") as lines:
            fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    except OSError:
        return False
    flags = fields.get("flags", "").split()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and fields.get("vendor_id") == "AuthenticAMD")
