"""Rotary positions (RoFormer, arXiv 2104.09864): pairs of channels turned by the position times a frequency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Factors = float | tuple[float, ...]


@dataclass(frozen=True)
class Rope:
    """Angles: position * theta ** (-2j / rotated) / divide; the first `rotated` channels of a head are turned.

    Args:
      divide: one factor, or one for each frequency.
      magnitude: multiplies cosines and sines.
      interleaved: channels 2j and 2j + 1 are a pair, else j and j + rotated / 2.
      trained: texts of more positions than that turn otherwise: divided by `beyond`, or with a theta that grows
        with the length by `growth`.

    Raises:
      ValueError: an odd number of rotated channels.
    """

    rotated: int
    theta: float = 10000.0
    divide: Factors = 1.0
    magnitude: float = 1.0
    interleaved: bool = False
    trained: int | None = None
    beyond: Factors | None = None
    growth: float | None = None

    def __post_init__(self) -> None:
        if self.rotated % 2:
            raise ValueError(f"head_dim={self.rotated}: rotary positions need an even one.")

    def frequencies(self, length: int = 1) -> Float[np.ndarray, " half"]:
        """Radians a position in a text of up to `length` positions, computed in float32 as transformers does."""
        theta, divide = self.theta, self.divide
        if self.trained is not None and length > self.trained:
            divide = divide if self.beyond is None else self.beyond
            if self.growth is not None:
                longer = self.growth * length / self.trained - (self.growth - 1)
                theta *= longer ** (self.rotated / (self.rotated - 2))
        exponents = np.arange(0, self.rotated, 2, dtype=np.float32) / np.float32(self.rotated)
        return 1 / np.float32(theta) ** exponents / np.asarray(divide, np.float32)


def angles(rope: Rope, t: int, position: Any, length: int) -> Float[Array, "t half"]:
    """Those of positions `position` .. `position + t - 1` (None: from 0 on) of a text of up to `length`."""
    positions = jnp.arange(t) + (0 if position is None else position)
    return positions[:, None].astype(jnp.float32) * rope.frequencies(length)[None]


def rotate(x: Float[Array, "*b t d"], rope: Rope, angles: Float[Array, "t half"]) -> Float[Array, "*b t d"]:
    """Each pair of channels turned by its angle, in float32; x's dtype comes back."""
    turned, rest = x[..., : rope.rotated].astype(jnp.float32), x[..., rope.rotated :]
    if rope.interleaved:
        left, right = turned[..., ::2], turned[..., 1::2]
    else:
        left, right = jnp.split(turned, 2, axis=-1)
    angles = jnp.expand_dims(angles, range(x.ndim - 2))
    cos, sin = (rope.magnitude * f(angles) for f in (jnp.cos, jnp.sin))
    pair = left * cos - right * sin, right * cos + left * sin
    turned = jnp.stack(pair, -1).reshape(turned.shape) if rope.interleaved else jnp.concatenate(pair, -1)
    turned = turned.astype(x.dtype)
    return turned if rope.rotated == x.shape[-1] else jnp.concatenate([turned, rest], -1)
