"""Whether the arrays of a QuantizedTensor fit each other and what is static of it, as read from a file."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.weights.layout import Layout
from awq_jax.weights.tensor import QuantizedTensor


def check_leaves(name: str, w: QuantizedTensor) -> None:
    """Passes if `w` is what quantizing could have made, its codes in rows; the leaves are numpy arrays, or
    shapes.

    Raises:
      ValueError: shapes, types or values that do not fit; names the weight.
    """
    spec = w.spec
    if w.packing != "rows" or not all(type(n) is int for n in (spec.bits, spec.group_size, w.pad)):
        raise ValueError(f"{name}: packing {w.packing!r}, pad {w.pad!r} and {spec} are not what is written")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{name}: a weight of {w.dtype}")
    if np.ndim(w.codes) < 2 or w.codes.dtype != np.uint32:
        raise ValueError(f"{name}: codes of shape {np.shape(w.codes)} are no matrix of uint32")
    *lead, words, o = w.codes.shape
    rows = 32 * words // spec.bits
    i = rows - w.pad
    if rows * spec.bits != 32 * words or i < 1 or w.pad != spec.padding(i):
        raise ValueError(f"{name}: codes of shape {w.codes.shape} with {w.pad} rows of padding are none of {spec}")
    if (w.zeros is None) != spec.symmetric or w.scales is None:
        raise ValueError(f"{name}: scales or zeros are missing, or too many, for {spec}")
    groups = rows // spec.group(i)
    expected = {"scales": (*lead, groups, o), "zeros": (*lead, groups, o), "input_scale": (*lead, i)}
    for leaf, shape in expected.items():
        if (value := getattr(w, leaf)) is not None:
            if value.shape != shape:
                raise ValueError(f"{name}: {leaf} have shape {value.shape}, codes and {spec} ask for {shape}")
            check_values(f"{name}: {leaf}", value, spec.levels if leaf == "zeros" else None)
    if w.layout is not None and not fits(w.layout, tuple(lead), i, o):
        raise ValueError(f"{name}: {w.layout} is no way to read matrices of shape {w.matrix_shape}")


def check_values(name: str, value: Any, most: int | None) -> None:
    """Whole numbers up to `most`, or finite ones."""
    if value.dtype != np.uint8 if most is not None else not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} are of {value.dtype}")
    if isinstance(value, jax.ShapeDtypeStruct):
        return
    if most is not None and value.max(initial=0) > most:
        raise ValueError(f"{name} go up to {value.max()}, beyond the last code, {most}")
    if not jnp.isfinite(value).all():
        raise ValueError(f"{name} hold NaN or infinity")


def fits(layout: Layout, lead: tuple[int, ...], i: int, o: int) -> bool:
    """Whether matrices (*stack, *lead, i, o) are what the layout makes of a param."""
    sizes = [math.prod(n for k, n in layout.atoms if k == axis) for axis in range(len(layout.shape))]
    order = sorted(a for axis in layout.axes for a in axis)
    if order != [*range(len(layout.atoms))] or sizes != [*layout.shape] or len(layout.axes) < 2:
        return False
    return layout.seen == (*lead[len(lead) - layout.n_lead :], i, o)
