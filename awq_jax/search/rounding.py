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

CHUNK = 32
"""Rows that are rounded one by one before their errors go to all later rows at once; divides every group size."""

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
      ordered: rows with the largest inputs first, instead of first to last.
    """

    shrink: float = 0.1
    refit: bool = True
    ordered: bool = True

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
        b = -(-moments.gram.shape[-1] // g) * g
        gram = shrunk(blocks(moments, b), self.shrink)
        extra = ((0, len(gram) * (b // g) - n), (0, 0))
        rows = jnp.pad(grouped, (*extra, (0, 0))).reshape(-1, b, o)
        block_steps = jnp.pad(steps, extra, constant_values=1).reshape(-1, b // g, o)
        block_zeros = jnp.pad(zeros, extra).reshape(-1, b // g, o)

        def one_block(
            block: tuple[Float[Array, "b o"], Float[Array, "k o"], Float[Array, "k o"], Float[Array, "b b"]],
        ) -> tuple[Float[Array, "k g o"], Float[Array, "k o"]]:
            w, steps, zeros, gram = block
            order = jnp.argsort(-jnp.diagonal(gram)) if self.ordered else jnp.arange(b)
            number = order // g
            codes = _round_rows(w[order], steps[number], zeros[number], gram[order][:, order], spec)
            codes = codes[jnp.argsort(order)].reshape(-1, g, o)
            return codes, _refitted(w, codes, steps, zeros, gram) if self.refit else steps

        codes, steps = jax.lax.map(one_block, (rows, block_steps, block_zeros, gram))
        return codes.reshape(-1, g, o)[:n], steps.reshape(-1, o)[:n], zeros


def shrunk(gram: Float[Array, "n b b"], shrink: float) -> Float[Array, "n b b"]:
    """`gram` shrunk towards its diagonal; channels that were never seen count as a thousandth of the mean."""
    diagonal = jnp.einsum("nii->ni", gram)
    mean = diagonal.mean(-1, keepdims=True)
    diagonal = jnp.maximum(diagonal, jnp.where(mean > 0, 1e-3 * mean, 1.0))
    eye = jnp.eye(gram.shape[-1])
    return gram * (1 - eye) * (1 - shrink) + diagonal[..., None] * eye


def _round_rows(
    w: Float[Array, "b o"],
    steps: Float[Array, "b o"],
    zeros: Float[Array, "b o"],
    gram: Float[Array, "b b"],
    spec: QuantSpec,
) -> Float[Array, "b o"]:
    """The codes of rows that are rounded from first to last; inside a chunk row by row, between chunks by a matmul."""
    b, o = w.shape
    # Row i of the upper Cholesky factor of the inverse says how the error of row i spreads to the rows after it.
    lower = jnp.linalg.cholesky(gram[::-1, ::-1])
    spread = jax.scipy.linalg.solve_triangular(lower, jnp.eye(b), lower=True)[::-1, ::-1]
    chunks = lambda a: a.reshape(b // CHUNK, CHUNK, -1)

    def one_chunk(
        errors: Float[Array, "b o"], chunk: tuple[Array, ...]
    ) -> tuple[Float[Array, "b o"], Float[Array, "c o"]]:
        start, rows, steps, zeros, into = chunk
        rows = rows - into @ errors
        inside = jax.lax.dynamic_slice(into, (0, start), (CHUNK, CHUNK)).T

        def one_row(
            state: tuple[Float[Array, "c o"], Float[Array, "c o"]], row: tuple[Array, ...]
        ) -> tuple[tuple[Float[Array, "c o"], Float[Array, "c o"]], Float[Array, " o"]]:
            rows, errors = state
            j, step, zero, out = row
            code = jnp.clip(jnp.round(rows[j] / step) + zero, 0, spec.levels)
            error = (rows[j] - (code - zero) * step) / out[j]
            return (rows - out[:, None] * error, errors.at[j].set(error)), code

        (_, found), codes = jax.lax.scan(
            one_row, (rows, jnp.zeros_like(rows)), (jnp.arange(CHUNK), steps, zeros, inside)
        )
        return jax.lax.dynamic_update_slice(errors, found, (start, 0)), codes

    starts = jnp.arange(0, b, CHUNK)
    _, codes = jax.lax.scan(
        one_chunk, jnp.zeros((b, o)), (starts, chunks(w), chunks(steps), chunks(zeros), chunks(spread.T))
    )
    return codes.reshape(b, o)


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
