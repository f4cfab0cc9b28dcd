"""Which code each weight gets, once its group's range is fixed."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.moments import Moments
from awq_jax.search.loss import blocks
from awq_jax.spec import QuantSpec
from awq_jax.tensor import affine, group, nearest, stored_step

Codes = tuple[Float[Array, "groups g o"], Float[Array, "groups o"], Float[Array, "groups o"]]


def to_nearest(
    w: Float[Array, "i o"],
    low: Float[Array, "groups o"],
    high: Float[Array, "groups o"],
    moments: Moments,
    spec: QuantSpec,
) -> Codes:
    """Each weight to its nearest code."""
    del moments
    steps, zeros = affine(low, high, spec)
    return nearest(group(w, spec), steps, zeros, spec), steps, zeros


@dataclass(frozen=True)
class Feedback:
    """Row by row, each row's rounding error made up for by the rows that follow (GPTQ, arXiv 2210.17323).

    Args:
      shrink: how far the Gram matrix is shrunk towards its diagonal. What is estimated from some thousand tokens
        of one text overfits otherwise: the error on other text falls by a third of what it does on this one.
      refit: least-squares steps for the chosen codes, per group.
    """

    shrink: float = 0.1
    refit: bool = True

    def __call__(
        self,
        w: Float[Array, "i o"],
        low: Float[Array, "groups o"],
        high: Float[Array, "groups o"],
        moments: Moments,
        spec: QuantSpec,
    ) -> Codes:
        steps, zeros = affine(low, high, spec)
        grouped = group(w, spec)
        n, g, o = grouped.shape
        b = max(moments.gram.shape[-1], g)
        b = -(-b // g) * g
        gram = shrunk(blocks(moments, b), self.shrink)
        rows = jnp.pad(grouped.reshape(n * g, o), ((0, len(gram) * b - n * g), (0, 0)))
        per_block = b // g
        fill = ((0, len(gram) * per_block - n), (0, 0))
        block_steps = jnp.pad(steps, fill, constant_values=1).reshape(-1, per_block, o)
        block_zeros = jnp.pad(zeros, fill).reshape(-1, per_block, o)
        codes, steps = jax.lax.map(
            lambda a: _round_block(*a, g, spec, self.refit),
            (rows.reshape(-1, b, o), block_steps, block_zeros, gram),
        )
        return codes.reshape(-1, g, o)[:n], steps.reshape(-1, o)[:n], zeros


def shrunk(gram: Float[Array, "n b b"], shrink: float) -> Float[Array, "n b b"]:
    """`gram` shrunk towards its diagonal; channels that were never seen count as a thousandth of the mean."""
    diagonal = jnp.einsum("nii->ni", gram)
    mean = diagonal.mean(-1, keepdims=True)
    diagonal = jnp.maximum(diagonal, jnp.where(mean > 0, 1e-3 * mean, 1.0))
    eye = jnp.eye(gram.shape[-1])
    return gram * (1 - eye) * (1 - shrink) + diagonal[..., None] * eye


def _round_block(
    w: Float[Array, "b o"],
    steps: Float[Array, "k o"],
    zeros: Float[Array, "k o"],
    gram: Float[Array, "b b"],
    g: int,
    spec: QuantSpec,
    refit: bool,
) -> tuple[Float[Array, "k g o"], Float[Array, "k o"]]:
    """Codes and steps of one block of the Gram matrix, group after group, errors inside a group spread row by row."""
    b, o = w.shape
    # The rows of the upper Cholesky factor of the inverse are how an error spreads to the rows after it.
    lower = jnp.linalg.cholesky(gram[::-1, ::-1])
    spread = jax.scipy.linalg.solve_triangular(lower, jnp.eye(b), lower=True)[::-1, ::-1]

    def one_group(w: Float[Array, "b o"], k: Array) -> tuple[Float[Array, "b o"], Float[Array, "g o"]]:
        start = k * g
        upper = jax.lax.dynamic_slice(spread, (start, 0), (g, b))
        inside = jax.lax.dynamic_slice(upper, (0, start), (g, g))
        step, zero = steps[k], zeros[k]

        def one_row(
            state: tuple[Float[Array, "g o"], Float[Array, "g o"], Float[Array, "g o"]], j: Array
        ) -> tuple[tuple[Float[Array, "g o"], Float[Array, "g o"], Float[Array, "g o"]], None]:
            rows, codes, errors = state
            row = rows[j]
            code = jnp.clip(jnp.round(row / step) + zero, 0, spec.levels)
            error = (row - (code - zero) * step) / inside[j, j]
            after = jnp.where(jnp.arange(g) > j, inside[j], 0)
            return (rows - after[:, None] * error, codes.at[j].set(code), errors.at[j].set(error)), None

        rows = jax.lax.dynamic_slice(w, (start, 0), (g, o))
        (_, codes, errors), _ = jax.lax.scan(one_row, (rows, jnp.zeros_like(rows), jnp.zeros_like(rows)), jnp.arange(g))
        later = jnp.where(jnp.arange(b) >= start + g, upper, 0)
        return w - later.T @ errors, codes

    _, codes = jax.lax.scan(one_group, w, jnp.arange(b // g))
    return codes, _refitted(w, codes, steps, zeros, gram) if refit else steps


def _refitted(
    w: Float[Array, "b o"],
    codes: Float[Array, "k g o"],
    steps: Float[Array, "k o"],
    zeros: Float[Array, "k o"],
    gram: Float[Array, "b b"],
) -> Float[Array, "k o"]:
    """The steps with the least output error for the codes: one least-squares sweep, group after group."""
    k, g, o = codes.shape
    levels = codes - zeros[:, None]

    def one_group(error: Float[Array, "b o"], i: Array) -> tuple[Float[Array, "b o"], Float[Array, " o"]]:
        rows = jax.lax.dynamic_slice(gram, (i * g, 0), (g, len(w)))
        own = jax.lax.dynamic_slice(rows, (0, i * g), (g, g))
        level = levels[i]
        slope = (level * (rows @ error)).sum(0)
        curve = (level * (own @ level)).sum(0)
        step = jnp.clip(steps[i] - slope / jnp.maximum(curve, 1e-30), 0.8 * steps[i], 1.2 * steps[i])
        step = stored_step(step)
        moved = jax.lax.dynamic_slice(error, (i * g, 0), (g, o)) + level * (step - steps[i])
        return jax.lax.dynamic_update_slice(error, moved, (i * g, 0)), step

    error = (levels * steps[:, None]).reshape(w.shape) - w
    return jax.lax.scan(one_group, error, jnp.arange(k))[1]
