"""How tests compile. conftest.py and BUILD have programs compiled fast, without the passes that pay for many runs."""

import jax

# `compiler_options=` of programs whose memory is measured: JAX's own fusions, which decide what buffers there are. The
# passes of LLVM, most of the time, have no part in it.
FUSED_AS_USERS_DO = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
# Of those that hold the numbers users get: all of JAX's own defaults.
AS_USERS_DO = FUSED_AS_USERS_DO | {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
