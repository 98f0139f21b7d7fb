"""The machine that tests run on: 8 virtual CPU devices, unless the caller's environment says otherwise. As in BUILD."""

import gc
from importlib import metadata
import os

import pytest

flags = ["--xla_force_host_platform_device_count=8"]
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    # Compiling is most of what tests cost here, and most programs run once; compiling.py has the way of users.
    flags += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    flags += ["--xla_cpu_parallel_codegen_split_count=1"]
    if metadata.version("jaxlib").startswith("0.10."):  # later versions have no other emitters
        flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
# The library must pass under JAX's strictest flags, and so the tests write their promotions out.
os.environ |= {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
# libtpu compiles for TPUs that are not here: it must not ask a cloud for them, and each test process loads it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.fixture(autouse=True, scope="session")
def _collect_seldom():
    """Tracing makes so many objects that Python would look for garbage among them a tenth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs are mapped into memory, some 30 maps a test, and Linux gives a process 65,530."""
    yield
    import jax  # reads the environment above

    jax.clear_caches()
    gc.collect()  # programs that a cycle holds
