"""A clear refusal to differentiate: this operation serves inference."""

import jax
from jax.interpreters import ad

from paged_prefill.primitive.prefill import paged_prefill_p, typed_paged_prefill_p


def _jvp(primals, tangents, **params):
    def moves(tangent):
        return type(tangent) is not ad.Zero and tangent.dtype != jax.dtypes.float0

    if any(map(moves, tangents)):
        raise NotImplementedError(
            "paged_prefill serves inference and has no derivative; "
            "apply jax.lax.stop_gradient to its query and its caches"
        )
    results = paged_prefill_p.bind(*primals, **params)
    return results, [ad.Zero(jax.typeof(result).to_tangent_aval()) for result in results]


for primitive in (paged_prefill_p, typed_paged_prefill_p):
    ad.primitive_jvps[primitive] = _jvp
