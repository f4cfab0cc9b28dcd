"""Coordinate descent on codes: each row takes the codes with the least output error, all other rows as they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.kernels.arithmetic import dequantized
from awq_jax.weights.spec import QuantSpec

CHUNK = 32
"""Rows that go one by one before what they did reaches all later rows at once; divides every group size."""


def descended_rows(
    rows: Float[Array, "n b o"],
    codes: Float[Array, "n b o"],
    steps: Float[Array, "n b o"],
    zeros: Float[Array, "n b o"],
    gram: Float[Array, "n b b"],
    spec: QuantSpec,
) -> Float[Array, "n b o"]:
    """The codes after one sweep from first row to last, block by block; the error never grows.

    Args:
      rows: the weights.
      codes, steps, zeros: of every single weight.
    """

    def one_block(block: tuple[Array, ...]) -> Float[Array, "b o"]:
        w, codes, steps, zeros, gram = block
        b, o = w.shape
        chunks = lambda a: a.reshape(b // CHUNK, CHUNK, -1)

        def one_chunk(
            change: Float[Array, "b o"], chunk: tuple[Array, ...]
        ) -> tuple[Float[Array, "b o"], Float[Array, "c o"]]:
            start, codes, steps, into = chunk
            inside = jax.lax.dynamic_slice(into, (0, start), (CHUNK, CHUNK))

            def one_row(
                state: tuple[Float[Array, "c o"], Float[Array, "c o"]], row: tuple[Array, ...]
            ) -> tuple[tuple[Float[Array, "c o"], Float[Array, "c o"]], Float[Array, " o"]]:
                slope, change = state
                j, code, step, out = row
                new = jnp.clip(jnp.round(code - slope[j] / (out[j] * step)), 0, spec.levels)
                moved = (new - code) * step
                return (slope + out[:, None] * moved[None], change.at[j].add(moved)), new

            own = jax.lax.dynamic_slice(change, (start, 0), (CHUNK, o))
            (_, own), new = jax.lax.scan(one_row, (into @ change, own), (jnp.arange(CHUNK), codes, steps, inside.T))
            return jax.lax.dynamic_update_slice(change, own, (start, 0)), new

        starts = jnp.arange(0, b, CHUNK)
        change = dequantized(codes, steps, zeros) - w
        return jax.lax.scan(one_chunk, change, (starts, chunks(codes), chunks(steps), chunks(gram)))[1].reshape(b, o)

    return jax.lax.map(one_block, (rows, codes, steps, zeros, gram))
