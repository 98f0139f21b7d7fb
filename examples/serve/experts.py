"""Mixtures of experts: tokens sorted by their expert, one product of ragged groups for each matrix, and back.

A routing takes the router's logits [tokens, experts] in float32 and gives (chosen [tokens, k], weights [tokens, k]).
"""

from jax import lax
import jax
import jax.numpy as jnp

from paged_prefill.examples.serve.config import Experts


def softmax_of_chosen(experts: Experts, w: dict, logits):
    """gpt-oss: the largest k, weighed by a softmax over them."""
    top, chosen = lax.top_k(logits, experts.per_token)
    return chosen, jax.nn.softmax(top, axis=-1)


def sigmoid_of_chosen(experts: Experts, w: dict, logits):
    """Llama 4: the largest k, each by itself."""
    top, chosen = lax.top_k(logits, experts.per_token)
    return chosen, jax.nn.sigmoid(top)


def sigmoid_in_groups(experts: Experts, w: dict, logits):
    """DeepSeek V3 (arXiv 2412.19437): the best k of the best groups; a correction counts for the choice alone."""
    scores = jax.nn.sigmoid(logits)
    eligible = scores + w["router_correction"][None]
    grouped = eligible.reshape(logits.shape[0], experts.groups, -1)
    best_two, _ = lax.top_k(grouped, 2)
    _, groups = lax.top_k(best_two.sum(axis=-1), experts.top_groups)
    taken = jnp.any(groups[:, :, None] == jnp.arange(experts.groups)[None, None], axis=1)
    eligible = jnp.where(taken[:, :, None], grouped, -jnp.inf).reshape(logits.shape)
    _, chosen = lax.top_k(eligible, experts.per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalised:
        weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
    return chosen, weights * experts.scale


ROUTINGS = dict(
    softmax_of_chosen=softmax_of_chosen, sigmoid_of_chosen=sigmoid_of_chosen, sigmoid_in_groups=sigmoid_in_groups
)  # fmt: skip


def mixture(experts: Experts, w: dict, x, activation):
    """What the experts make of x [tokens, width], summed by their weights.

    Under vmap the tokens of all packs are one: JAX cannot map products of ragged groups, and experts know no packs.
    """

    @jax.custom_batching.custom_vmap
    def mixed(w, x):
        return _mixture(experts, w, x, activation)

    @mixed.def_vmap
    def of_packs(axis_size, in_batched, w, x):
        return mixed(w, x.reshape(-1, x.shape[-1])).reshape(x.shape), True

    return mixed({name: weight for name, weight in w.items() if name.startswith(("expert", "router"))}, x)


def _mixture(experts: Experts, w: dict, x, activation):
    logits = jnp.einsum("tw,we->te", x, w["router"], preferred_element_type=jnp.float32)
    if "router_bias" in w:
        logits += w["router_bias"].astype(jnp.float32)[None]
    chosen, weights = ROUTINGS[experts.routing](experts, w, logits)
    weights = weights.astype(x.dtype)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    owner = chosen.reshape(-1)[order]
    sizes = jnp.sum(owner[:, None] == jnp.arange(logits.shape[-1])[None], axis=0, dtype=jnp.int32)
    rows = x[order // experts.per_token]
    if experts.scales_inputs:
        rows, weights = rows * weights.reshape(-1)[order][:, None], jnp.ones_like(weights)

    def product(rows, name):
        out = lax.ragged_dot(rows, w[name], sizes)
        return out + w[f"{name}_bias"][owner] if f"{name}_bias" in w else out

    gate, up = product(rows, "expert_gate"), product(rows, "expert_up")
    hidden = activation(gate) * up if experts.swiglu_limit is None else clamped_swiglu(experts, gate, up)
    out = product(hidden, "expert_down")[jnp.argsort(order)]  # back in the order of the tokens: sums in a fixed order
    return jnp.einsum("tkw,tk->tw", out.reshape(*chosen.shape, -1), weights)


def clamped_swiglu(experts: Experts, gate, up):
    """gpt-oss' activation."""
    gate = jnp.minimum(gate, experts.swiglu_limit)
    up = jnp.clip(up, -experts.swiglu_limit, experts.swiglu_limit)
    return (up + 1) * gate * jax.nn.sigmoid(experts.swiglu_alpha * gate)
