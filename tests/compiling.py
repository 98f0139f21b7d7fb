"""How tests compile. conftest.py and BUILD have programs compiled fast, without the passes that pay for many runs."""

import jax

# `compiler_options=` of programs that are measured, or that hold the numbers users get: JAX's own defaults.
AS_USERS_DO = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
if jax.__version_info__ < (0, 11):
    AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True
