"""The machine that tests run on: 8 virtual CPU devices, unless the caller's environment says otherwise. As in BUILD."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# The library must pass under JAX's strictest flags, and so the tests write their promotions out.
os.environ |= {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
# libtpu compiles for TPUs that are not here: it must not ask a cloud for them, and each test process loads it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
