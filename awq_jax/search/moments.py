"""What calibration keeps of a site's input: sums that are enough to score any change of the weight.

The squared output error of `x @ W` when W changes by D is exactly tr(D' X'X D), so the Gram matrix X'X, or its
diagonal blocks, stands for any number of tokens. Moments are sums: batches, devices and hosts add up.
"""

from __future__ import annotations

import functools as ft
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from awq_jax.compat import vary, varying

GRAM_BLOCK = 2048
"""Largest size of the Gram matrix's blocks: at this size they cost a quarter of an 8B Llama's forward pass."""

UNIT = 2.0**20
"""Of inputs in the Gram matrix: so float32 holds the squares of what is from 1e-25 to 1e12, not from 1e-19 to 1e18."""


@ft.partial(jax.tree_util.register_dataclass, data_fields=["count", "abs_sum", "gram"], meta_fields=[])
@dataclass(frozen=True)
class Moments:
    """Sums over tokens, each token counted with its weight (1 unless a mask is given).

    Args:
      count: number of tokens.
      abs_sum: sum of |x| per input channel.
      gram: sum of u u', u = x * UNIT, in diagonal blocks of size b; one block of size i when full. Padding rows are
        zero.
    """

    count: Float[Array, "*lead"]
    abs_sum: Float[Array, "*lead i"]
    gram: Float[Array, "*lead blocks b b"]

    def __add__(self, other: Moments) -> Moments:
        return jax.tree.map(jnp.add, self, other)

    @property
    def reached(self) -> Bool[Array, "*lead"]:
        """Whether there was an input other than zeros."""
        return (self.abs_sum > 0).any(-1)

    @property
    def diagonal(self) -> Float[Array, "*lead i"]:
        """Of the Gram matrix."""
        squares = jnp.einsum("...bii->...bi", self.gram)
        return squares.reshape(*squares.shape[:-2], -1)[..., : self.abs_sum.shape[-1]]

    @property
    def large(self) -> Float[Array, ""]:
        """A size that some input has at least, near the largest where few are large: sum x^2 / sum |x| of a channel."""
        return (self.diagonal / jnp.where(self.abs_sum > 0, self.abs_sum, 1)).max() / UNIT**2

    @property
    def mean_abs(self) -> Float[Array, "*lead i"]:
        return self.abs_sum / jnp.maximum(self.count, 1)[..., None]

    @property
    def mean_gram(self) -> Float[Array, "*lead blocks b b"]:
        return self.gram / UNIT**2 / jnp.maximum(self.count, 1)[..., None, None, None]

    def scaled(self, factor: Float[Array, "*lead i"]) -> Moments:
        """The moments of `x * factor`."""
        *_, blocks, b, _ = self.gram.shape
        rows = jnp.pad(factor, [(0, 0)] * (factor.ndim - 1) + [(0, blocks * b - factor.shape[-1])])
        rows = rows.reshape(*factor.shape[:-1], blocks, b)
        gram = self.gram * rows[..., :, None] * rows[..., None, :]
        return Moments(self.count, self.abs_sum * jnp.abs(factor), gram)


def of(x: Float[Array, "*lead_and_tokens i"], block: int | None, lead: int = 0, weights: Any = None) -> Moments:
    """The moments of activations.

    Rows of zeros are no tokens where there are experts.

    Args:
      x: activations; the first `lead` axes (experts) are kept, all others but the last are tokens. Products of
        unweighted ones are taken in x's dtype, all are summed in float32.
      block: largest size of the diagonal blocks of the Gram matrix; None for the full matrix.
      weights: one weight a token, in the shape of x's token axes, or None.
    """
    i = x.shape[-1]
    block = block_size(i, block)
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    x = x.reshape(*x.shape[:lead], -1, i)
    tokens = jnp.ones(x.shape[:-1], jnp.float32)
    if weights is not None:
        tokens = jnp.broadcast_to(weights.reshape(-1).astype(jnp.float32), x.shape[:-1])
    # Experts get rows of zeros where fewer tokens reach them than they have room for.
    count = (jnp.where((x != 0).any(-1), tokens, 0) if lead else tokens).sum(-1)
    abs_sum = jnp.einsum("...ti,...t->...i", jnp.abs(x), tokens, preferred_element_type=jnp.float32)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -i % block)])
    x = x.reshape(*x.shape[:-1], -1, block)
    # Which float16 has no room for, and float32 no need for after float16.
    early = 1.0 if x.dtype == jnp.float16 else UNIT
    x = x * early
    weighted = x if weights is None else x.astype(jnp.float32) * tokens[..., None, None]
    gram = jnp.einsum("...tbi,...tbj->...bij", weighted, x.astype(weighted.dtype), preferred_element_type=jnp.float32)
    return Moments(count, abs_sum, gram * (UNIT / early) ** 2)


def unit(a: Float[Array, "*n"], axis: int | None = None) -> Float[Array, "*n"]:
    """The power of two below the largest |a|, of all or along an axis, which is kept: dividing by it rounds nothing."""
    _, exponent = jnp.frexp(jnp.abs(a).max(axis, keepdims=axis is not None))
    return jnp.ldexp(jnp.ones(exponent.shape, jnp.float32), exponent - 1)


TILE = 256
"""Rows of one expert that are multiplied at once."""


def of_sorted(x: Float[Array, "m i"], sizes: Int[Array, " e"], block: int | None) -> Moments:
    """The moments of each expert's rows: the first sizes[0] rows are those of the first, and so on.

    Tile after tile of one expert's rows: costs what the moments of m + e * TILE rows cost.
    """
    m, experts, sizes = len(x), len(sizes), jnp.asarray(sizes)
    ends = jnp.cumsum(sizes)
    tiles = -(-sizes // TILE)
    last = jnp.cumsum(tiles)
    padded = jnp.pad(x, ((0, TILE), (0, 0)))

    def one_tile(k: Array, total: Moments) -> Moments:
        expert = jnp.minimum(jnp.searchsorted(last, k, side="right"), experts - 1)
        start = ends[expert] - sizes[expert] + (k - last[expert] + tiles[expert]) * TILE
        rows = jax.lax.dynamic_slice(padded, (start, 0), (TILE, x.shape[1]))
        own = (start + jnp.arange(TILE) < ends[expert]) & (k < last[-1])
        found = of(jnp.where(own[:, None], rows, 0), block)
        found = Moments(own.sum().astype(jnp.float32), found.abs_sum, found.gram)
        return jax.tree.map(lambda all, new: all.at[expert].add(new), total, found)

    like = jax.eval_shape(lambda: of(x[:1], block))
    differs = varying(x) | varying(sizes)
    none = jax.tree.map(lambda a: vary(jnp.zeros((experts, *a.shape), a.dtype), differs), like)
    return jax.lax.fori_loop(0, m // TILE + experts, one_tile, none)


def block_size(features: int, most: int | None) -> int:
    """The size of equal blocks of at most `most` (None: no limit) covering `features`; multiples of 128 if possible."""
    if most is None or features <= most:
        return features
    even = -(-features // -(-features // most))
    return min(-(-even // 128) * 128, most)
