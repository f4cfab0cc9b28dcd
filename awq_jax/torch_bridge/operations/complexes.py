"""Complex numbers, which some write rotary embeddings with."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from awq_jax.torch_bridge.operations.table import operation

operation("real")(jnp.real)
operation("imag")(jnp.imag)
operation("_conj", "_conj_physical", "conj_physical")(jnp.conj)
operation("complex")(lax.complex)


@operation("angle")
def angle(x: Array) -> Array:
    # torch has the real -0 at 0, not at pi.
    return jnp.angle(x if jnp.iscomplexobj(x) else jnp.where(x == 0, 0, x))


@operation("polar")
def polar(size: Array, angle: Array) -> Array:
    return lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))


@operation("view_as_complex", "view_as_complex_copy")
def view_as_complex(x: Array) -> Array:
    return lax.complex(x[..., 0], x[..., 1])


@operation("view_as_real", "view_as_real_copy")
def view_as_real(x: Array) -> Array:
    return jnp.stack([x.real, x.imag], -1)
