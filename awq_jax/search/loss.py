"""The output error that a change of the weight causes, from moments alone."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.search.moments import Moments
from awq_jax.weights.spec import QuantSpec


def blocks(moments: Moments, size: int) -> Float[Array, "groups g g"]:
    """The mean Gram matrix's diagonal blocks of another `size`; what was not kept is zero."""
    gram = moments.mean_gram
    n, b, _ = gram.shape
    wanted = -(-moments.abs_sum.shape[-1] // size)
    if b % size:
        gram = jnp.einsum("nij,nm->nimj", gram, jnp.eye(n, dtype=gram.dtype)).reshape(1, n * b, n * b)
        pad = max(0, wanted * size - n * b)
        gram = jnp.pad(gram, ((0, 0), (0, pad), (0, pad)))[:, : wanted * size, : wanted * size]
        n, b = 1, wanted * size
    parts = gram.reshape(n, b // size, size, b // size, size)
    return jnp.einsum("ncicj->ncij", parts).reshape(-1, size, size)[:wanted]


def group_blocks(moments: Moments, spec: QuantSpec) -> Float[Array, "groups g g"]:
    """One diagonal block a quantization group."""
    return blocks(moments, spec.group(moments.abs_sum.shape[-1]))


def group_error(change: Float[Array, "groups g o"], gram: Float[Array, "groups g g"]) -> Float[Array, "groups o"]:
    """Mean squared output error of each column caused by the change of one group's weights."""
    return jnp.einsum("gio,gio->go", jnp.einsum("gij,gjo->gio", gram, change), change)


def output_error(change: Float[Array, "i o"], moments: Moments) -> Float[Array, " o"]:
    """Mean squared output error of each column, the diagonal of D' X'X D / tokens, on the blocks that were kept."""
    gram = moments.mean_gram
    n, b, _ = gram.shape
    change = jnp.pad(change, ((0, n * b - change.shape[0]), (0, 0))).reshape(n, b, -1)
    return group_error(change, gram).sum(0)
