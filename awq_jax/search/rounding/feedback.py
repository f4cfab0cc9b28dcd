"""Which code each weight gets, once its group's range is fixed."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.kernels.arithmetic import dequantized
from awq_jax.search.loss import blocks
from awq_jax.search.moments import Moments
from awq_jax.search.rounding.descent import CHUNK, descended_rows
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import affine, group, nearest, rounded_step

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
      sweeps: how often to go on with coordinate descent on the codes, each time followed by the refit.
    """

    shrink: float = 0.3
    refit: bool = True
    ordered: bool = True
    sweeps: int = 1

    def __call__(
        self,
        w: Float[Array, "i o"],
        low: Float[Array, "groups o"],
        high: Float[Array, "groups o"],
        moments: Moments,
        spec: QuantSpec,
    ) -> Codes:
        steps, zeros = affine(low, high, spec)
        gram = shrunk_blocks(moments, spec, self.shrink)
        groups, g = len(steps), spec.group(len(w))
        rows, row_steps, row_zeros = in_rows(w, steps, zeros, gram, spec)
        codes = rounded_rows(rows, row_steps, row_zeros, gram, spec, ordered=self.ordered)
        row_steps = self._fitted(rows, codes, row_steps, row_zeros, gram, g)
        for _ in range(self.sweeps):
            codes = descended_rows(rows, codes, row_steps, row_zeros, gram, spec)
            row_steps = self._fitted(rows, codes, row_steps, row_zeros, gram, g)
        grouped = lambda a: a.reshape(-1, g, w.shape[1])[:groups]
        return grouped(codes), grouped(row_steps)[:, 0], zeros

    def _fitted(
        self,
        rows: Float[Array, "n b o"],
        codes: Float[Array, "n b o"],
        steps: Float[Array, "n b o"],
        zeros: Float[Array, "n b o"],
        gram: Float[Array, "n b b"],
        g: int,
    ) -> Float[Array, "n b o"]:
        if not self.refit:
            return steps

        def one_block(block: tuple[Array, ...]) -> Float[Array, "b o"]:
            w, gram = block[0], block[-1]
            codes, steps, zeros = (a.reshape(-1, g, a.shape[-1]) for a in block[1:-1])
            return jnp.repeat(_refitted(w, codes, steps, zeros, gram), g, 0)

        return jax.lax.map(one_block, (rows, codes, steps, zeros, gram))


def shrunk_blocks(moments: Moments, spec: QuantSpec, shrink: float) -> Float[Array, "n b b"]:
    """The Gram matrix's blocks as they were kept, each of whole groups, shrunk towards their diagonals."""
    g = spec.group(moments.abs_sum.shape[-1])
    return shrunk(blocks(moments, -(-moments.gram.shape[-1] // g) * g), shrink)


def in_blocks(rows: Float[Array, "i o"], gram: Float[Array, "n b b"], fill: float) -> Float[Array, "n b o"]:
    """Rows as the blocks of the Gram matrix cut them, the last one completed with `fill`."""
    n, b, _ = gram.shape
    missing = ((0, n * b - len(rows)), (0, 0))
    return jnp.pad(rows, missing, constant_values=fill).reshape(n, b, -1)


def in_rows(
    w: Float[Array, "i o"],
    steps: Float[Array, "groups o"],
    zeros: Float[Array, "groups o"],
    gram: Float[Array, "n b b"],
    spec: QuantSpec,
) -> tuple[Float[Array, "n b o"], Float[Array, "n b o"], Float[Array, "n b o"]]:
    """Weights, and the step and zero point of every single one, as the blocks of the Gram matrix cut them."""
    g = spec.group(len(w))
    rows = in_blocks(group(w, spec).reshape(len(steps) * g, -1), gram, 0)
    by_row = lambda a, fill: in_blocks(jnp.repeat(a, g, 0), gram, fill)
    return rows, by_row(steps, 1), by_row(zeros, 0)


def rounded_rows(
    rows: Float[Array, "n b o"],
    steps: Float[Array, "n b o"],
    zeros: Float[Array, "n b o"],
    gram: Float[Array, "n b b"],
    spec: QuantSpec,
    *,
    ordered: bool,
) -> Float[Array, "n b o"]:
    """The codes of rows rounded one after the other; block by block, columns apart from each other.

    Args:
      steps, zeros: of every single weight; an input scale s makes a row's steps finer by s.
      ordered: rows with the largest inputs first.
    """

    def one_block(block: tuple[Array, ...]) -> Float[Array, "b o"]:
        w, steps, zeros, gram = block
        if not ordered:
            return _round_rows(w, steps, zeros, gram, spec)
        order = jnp.argsort(-jnp.diagonal(gram))
        codes = _round_rows(w[order], steps[order], zeros[order], gram[order][:, order], spec)
        return codes[jnp.argsort(order)]

    return jax.lax.map(one_block, (rows, steps, zeros, gram))


def shrunk(gram: Float[Array, "n b b"], shrink: float) -> Float[Array, "n b b"]:
    """`gram` shrunk towards its diagonal; channels that were never seen count as a thousandth of the mean."""
    diagonal = jnp.einsum("nii->ni", gram)
    mean = diagonal.mean(-1, keepdims=True)
    diagonal = jnp.maximum(diagonal, jnp.where(mean > 0, 1e-3 * mean, 1.0))
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
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
    # G = U U' with U upper triangular: row j's error belongs into row k > j by U[j, k] / U[k, k]. The same codes as
    # from GPTQ's inverse (QuIP, arXiv 2307.13304, theorem 6), without the inverse.
    upper = jnp.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    into = jnp.triu(upper / jnp.diagonal(upper)[None], 1).T
    chunks = lambda a: a.reshape(b // CHUNK, CHUNK, -1)

    def one_chunk(
        errors: Float[Array, "b o"], chunk: tuple[Array, ...]
    ) -> tuple[Float[Array, "b o"], Float[Array, "c o"]]:
        start, rows, steps, zeros, into = chunk
        inside = jax.lax.dynamic_slice(into, (0, start), (CHUNK, CHUNK)).T

        def one_row(
            state: tuple[Float[Array, "c o"], Float[Array, "c o"]], row: tuple[Array, ...]
        ) -> tuple[tuple[Float[Array, "c o"], Float[Array, "c o"]], Float[Array, " o"]]:
            targets, errors = state
            j, w, step, zero, out = row
            code = jnp.clip(jnp.round(targets[j] / step) + zero, 0, spec.levels)
            error = w - dequantized(code, step, zero)
            return (targets + out[:, None] * error[None], errors.at[j].set(error)), code

        (_, found), codes = jax.lax.scan(
            one_row, (rows + into @ errors, jnp.zeros_like(rows)), (jnp.arange(CHUNK), rows, steps, zeros, inside)
        )
        return jax.lax.dynamic_update_slice(errors, found, (start, 0)), codes

    starts = jnp.arange(0, b, CHUNK)
    _, codes = jax.lax.scan(
        one_chunk, jnp.zeros_like(w), (starts, chunks(w), chunks(steps), chunks(zeros), chunks(into))
    )
    return codes.reshape(b, o)


def _refitted(
    w: Float[Array, "b o"],
    codes: Float[Array, "k g o"],
    steps: Float[Array, "k g o"],
    zeros: Float[Array, "k g o"],
    gram: Float[Array, "b b"],
) -> Float[Array, "k o"]:
    """The steps with the least output error for the codes: one least-squares sweep, group after group."""
    k, g, o = codes.shape
    levels = codes - zeros

    def one_group(error: Float[Array, "b o"], i: Array) -> tuple[Float[Array, "b o"], Float[Array, " o"]]:
        rows = jax.lax.dynamic_slice(gram, (i * g, 0), (g, len(w)))
        own = jax.lax.dynamic_slice(rows, (0, i * g), (g, g))
        level, before = levels[i], steps[i, 0]
        slope = (level * (rows @ error)).sum(0)
        curve = (level * (own @ level)).sum(0)
        move = slope / jnp.where(curve > 0, curve, 1)
        step = rounded_step(jnp.clip(before - move, 0.8 * before, 1.2 * before))
        moved = jax.lax.dynamic_slice(error, (i * g, 0), (g, o)) + level * (step - before)[None]
        return jax.lax.dynamic_update_slice(error, moved, (i * g, 0)), step

    error = (levels * steps).reshape(w.shape) - w
    return jax.lax.scan(one_group, error, jnp.arange(k))[1]
