"""The GPUs that tests of real ones need."""

import jax


def gpus_for(test, hopper: bool = False) -> list[jax.Device]:
    """Those of this machine; skips `test` where there is none, or with `hopper` where the first is no Hopper GPU."""
    try:
        gpus = jax.devices("cuda")
    except RuntimeError as error:
        test.skipTest(f"no CUDA GPU here: {error}".splitlines()[0])
    if hopper and gpus[0].compute_capability != "9.0":
        test.skipTest(f"Mosaic GPU's are for compute capability 9.0, this GPU has {gpus[0].compute_capability}")
    return gpus
