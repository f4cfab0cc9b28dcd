"""What two models predict, token by token, side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

LIKELIEST = 5
"""Tokens that are compared as the likeliest ones."""


class ByToken(NamedTuple):
    """Of each prediction: in nats the loss of both and KL(reference || model), whether the likeliest token is the same,
    what share of the `LIKELIEST` is, and the likeliest of both; the loss alone where there is no reference."""

    loss: Float[Array | np.ndarray, " t"]
    reference_loss: Any = None
    kl: Any = None
    same: Any = None
    shared: Any = None
    likeliest: Any = None
    reference_likeliest: Any = None


@jax.jit
def by_token(logits: Float[Array, "t v"], reference: Float[Array, "t v"] | None, targets: Int[Array, " t"]) -> ByToken:
    """How the logits of a model stand to a reference's, where `targets` are the tokens that came."""
    if reference is None:
        return ByToken(losses(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)), targets))
    found, wanted = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (logits, reference))
    loss, reference_loss = (losses(x, targets) for x in (found, wanted))
    kl = jnp.sum(jnp.exp(wanted) * (wanted - found), -1)
    few = min(LIKELIEST, logits.shape[-1])
    # Without the barrier XLA on a CPU compares within the sort of all logits: a hundred times slower.
    mine, theirs = jax.lax.optimization_barrier([jax.lax.top_k(x, few)[1] for x in (found, wanted)])
    shared = (mine[:, :, None] == theirs[:, None, :]).any(-1).astype(jnp.float32).mean(-1)
    return ByToken(loss, reference_loss, kl, mine[:, 0] == theirs[:, 0], shared, mine[:, 0], theirs[:, 0])


def losses(chances: Float[Array, "t v"], targets: Int[Array, " t"]) -> Float[Array, " t"]:
    """What logarithms of probabilities say of the tokens that came."""
    return -jnp.take_along_axis(chances, targets[:, None], -1)[:, 0]
