"""The only file that imports a private JAX name. Each says which JAX versions need it, and why."""


def tpu_interpreter_found_races() -> bool:
    """Whether the last kernel run in TPU interpret mode with `detect_races=True` raced.

    JAX 0.10 to 0.12 have no public name for what the detector found; it only prints it.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # for tests only, so not loaded before

    return interpret_pallas_call.races.races_found
