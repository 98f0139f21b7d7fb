"""What the warpgroups of a thread block share, as those that compute have it."""

from typing import NamedTuple

import jax

from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan


class Ring(NamedTuple):
    """Blocks of keys or values as products read them, and two barriers of each."""

    blocks: jax.Array
    here: jax.Array  # it has been filled
    free: jax.Array  # it may be filled again


class Places(NamedTuple):
    """Places for queries, seen in three ways (scratch.py), and likewise two barriers of each."""

    slots: jax.Array  # as copies fill them
    loaded: jax.Array  # in the call's dtype, and in that of products, as those read them
    taken: jax.Array
    here: jax.Array
    free: jax.Array


class Shared(NamedTuple):
    """What a thread block's warpgroups read and write together, where a piece is computed."""

    optional: dict[str, jax.Array]  # operands in global memory
    sources: list  # of `loading.Source`: keys and values, as they are loaded
    queries: Places
    keys: Ring
    values: Ring  # of a latent cache, its keys once more: the first features of a key are its value
    scales: list[jax.Array | None]  # of keys' slots and of values', where each has its own
    scratch: dict[str, jax.Array]  # all of shared memory by name: some that the loops have, each its own

    @classmethod
    def of(cls, plan: Plan, optional, sources, scratch) -> "Shared":
        views = (view for [view] in scratch["query_views"])
        names = ("keys", "keys" if plan.latent else "values")
        return cls(
            optional,
            sources,
            Places(*views, scratch["query_here"], scratch["query_free"]),
            *(Ring(scratch[name], scratch[f"{name}_here"], scratch[f"{name}_free"]) for name in names),
            [scratch.get(f"{name}_scales") for name in names],
            scratch,
        )
