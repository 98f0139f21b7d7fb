"""What the attention is, whatever it runs over: scale, soft cap, which keys a row sees, and how its results come about.

This is the one home of these formulas: reference, checks, schedules and kernels take them from here.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Attention:
    """The parameters that change the result, checked once (`checks.attention_of`); one static parameter of a call.

    Attributes:
      softmax_scale: multiplies query . key.
      attn_logits_soft_cap: logits become cap * tanh(logits / cap), before masking; None where they stay.
      sliding_window: how many keys a row sees, its own included; None where it sees all before it.
    """

    softmax_scale: float
    attn_logits_soft_cap: float | None = None
    sliding_window: int | None = None

    def visible_keys(self, position: Int[Array, "*rows"]) -> tuple[Int[Array, "*rows"], Int[Array, "*rows"]]:
        """The interval of keys, first to end, that rows at these positions see; see the function."""
        return visible_keys(position, self.sliding_window)


def visible_keys(
    position: Int[Array, "*rows"], sliding_window: int | Int[Array, ""] | None
) -> tuple[Int[Array, "*rows"], Int[Array, "*rows"]]:
    """The interval of keys, first to end, that rows at these positions see; empty for a row before key 0.

    Both grow with the position. The end is not cut at the context, which no position passes.
    """
    end = jnp.maximum(position + 1, 0)
    if sliding_window is None:
        return jnp.zeros_like(end), end
    return jnp.maximum(position - (sliding_window - 1), 0), end


def part_of_merge(
    out: Float[Array, "*rows value_dim"], lse: Float[Array, "*rows"], shift: Float[Array, "*rows"]
) -> tuple[Float[Array, "*rows value_dim"], Float[Array, "*rows"]]:
    """What a partial result adds to a merge: its output times its weight exp(lse - shift), and the weight.

    Nothing where it saw no key (lse -inf), whatever its output holds. In the dtype of `shift`.
    """
    weight = jnp.exp(lse.astype(shift.dtype) - shift)
    weighted = weight[..., None] * out.astype(shift.dtype)
    return jnp.where(jnp.isneginf(lse)[..., None], 0.0, weighted), weight


def normalised(
    unnormalised: Float[Array, "*rows value_dim"], total: Float[Array, "*rows"], largest: Float[Array, "*rows"]
) -> tuple[Float[Array, "*rows value_dim"], Float[Array, "*rows"]]:
    """Output and lse from the sums of weights exp(logit - largest), with values and without.

    A total of 0, and nothing else, says that no key was seen: output 0 and lse -inf. NaN in a row goes through to both.
    """
    factor, lse = factor_and_lse(total, largest)
    return jnp.where((total == 0)[..., None], 0.0, unnormalised * factor[..., None]), lse


def with_logit(total, largest, logit):
    """Adds a logit without a value, such as a sink's, to the sum and maximum of a softmax.

    `total` is the sum of exp(logit - largest) so far, 0 where no key was seen. A `logit` of -inf adds nothing; one of
    +inf makes the row NaN, as NaN does.

    Returns (total, largest, fade): the new sum and maximum, both 0 where nothing was seen at all, and the factor that
    turns weights by the old maximum into weights by the new one.
    """
    largest = jnp.where(total == 0, -jnp.inf, largest)
    together = jnp.maximum(largest, logit)
    together = jnp.where(together == -jnp.inf, 0.0, together)
    fade = jnp.exp(largest - together)
    return total * fade + jnp.exp(logit - together), together, fade


def factor_and_lse(total, largest):
    """As `normalised`, for kernels that hold rows in layouts of their own: the factor of the output, and the lse."""
    unseen = total == 0
    return jnp.where(unseen, 0.0, 1.0 / total), jnp.where(unseen, -jnp.inf, largest + jnp.log(total))
