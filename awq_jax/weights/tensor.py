"""QuantizedTensor, the pytree that stands where a dense weight stood, and `dot`, the door to the kernels."""

from __future__ import annotations

import functools as ft
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Int4, Int16, UInt8, UInt32

import awq_jax.kernels as kernels
from awq_jax.kernels import INT4, PACKINGS, ROWS, TILES, Packing
from awq_jax.kernels.arithmetic import dequantized
from awq_jax.kernels.xla.dense import dense_grouped_matmul, dense_matmul
from awq_jax.weights.layout import Layout, layout_of_json
from awq_jax.weights.no_array import NoArray
from awq_jax.weights.spec import QuantSpec

SCALE_DTYPE = jnp.float16
HALF = np.finfo(np.float16)
SMALLEST_HALF, SMALLEST_NORMAL_HALF, LARGEST_HALF = map(float, (HALF.smallest_subnormal, HALF.tiny, HALF.max))
STATIC = ("spec", "dtype", "pad", "layout", "packing")
"""The fields of a QuantizedTensor that are no arrays."""


@ft.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "zeros", "input_scale"],
    meta_fields=[*STATIC],
)
@dataclass(frozen=True, repr=False)
class QuantizedTensor(NoArray):
    """A weight of logical shape (*lead, i, o) in `spec.bits` bits: `w = input_scale[:, None] * (q - z) * s`.

    Args:
      codes: q, packed down the input axis: (i + pad) * bits / 32 words; or as `packing` says.
      scales: the step s of each group; float16, or float32 where float16 has no normal number for one of them.
      zeros: the zero point z of each group; None when symmetric. Files of others may have float32 ones, which stay in
        rows.
      input_scale: what multiplies x before the matmul; None for one. Lets each site have its own AWQ scale.
      spec: bits, group size, symmetry.
      dtype: of the dense weight that this one replaced.
      pad: rows of padding in the last group.
      layout: how the param is read as matrices; None when it is stored as (*lead, i, o).
      packing: the name of one of kernels/packing: "rows", or after `prepare` "tiles": (i + pad) / 128 blocks of 32 * o
        int16 words; or "int4": (groups, o, g) int4 codes, minus 8.

    The logical shape follows from the leaves, so vmap, scan and stacking may add or take leading axes.
    """

    codes: UInt32[Array, "*lead w o"] | Int16[Array, "*lead blocks o32"] | Int4[Array, "*lead groups o g"]
    scales: Float[Array, "*lead groups o"]
    zeros: UInt8[Array, "*lead groups o"] | Float[Array, "*lead groups o"] | None
    input_scale: Float[Array, "*lead i"] | None
    spec: QuantSpec
    dtype: Any
    pad: int = 0
    layout: Layout | None = None
    packing: str = ROWS.name

    def __repr__(self) -> str:
        try:
            return f"QuantizedTensor(shape={self.shape}, {self.spec}, dtype={jnp.dtype(self.dtype).name})"
        except (AttributeError, LookupError, TypeError):  # What trees are mapped to may be anything.
            return f"QuantizedTensor(codes={self.codes}, scales={self.scales})"

    @property
    def in_features(self) -> int:
        return PACKINGS[self.packing].shape(self.codes.shape, self.spec.bits)[-2] - self.pad

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(*lead, i, o)."""
        return (*self.scales.shape[:-2], self.in_features, self.scales.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense param."""
        if self.layout is None:
            return self.matrix_shape
        return self.layout.param_shape(self.scales.shape[: self.scales.ndim - self.layout.n_lead - 2])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    def dequantize(self) -> Array:
        """The dense weight, in the shape and dtype it had."""
        return _dense(self)


def group_ranges(
    w: Float[Array, "*lead i o"], spec: QuantSpec
) -> tuple[Float[Array, "*lead groups o"], Float[Array, "*lead groups o"]]:
    """Smallest and largest weight of each group, zero always between them."""
    grouped = group(w, spec)
    return jnp.minimum(grouped.min(-2), 0), jnp.maximum(grouped.max(-2), 0)


def group(w: Float[Array, "*lead i o"], spec: QuantSpec) -> Float[Array, "*lead groups g o"]:
    """`w` cut into groups down the input axis, the last one completed with zeros."""
    *lead, i, o = w.shape
    w = jnp.pad(w, [(0, 0)] * len(lead) + [(0, spec.padding(i)), (0, 0)])
    return w.reshape(*lead, -1, spec.group(i), o)


def rounded_step(step: Float[Array, "*g"]) -> Float[Array, "*g"]:
    """`step` with the 11 bits that float16 has, at any size; never zero."""
    return jnp.maximum(jax.lax.reduce_precision(step, 8, HALF.nmant), jnp.finfo(jnp.float32).tiny)


def half_step(step: Float[Array, "*g"]) -> Float[Array, "*g"]:
    """`step` as float16 holds it; up to the next of its subnormal numbers, so that codes still reach all weights."""
    subnormal = jnp.ceil(step / SMALLEST_HALF) * SMALLEST_HALF
    kept = jnp.where(step < SMALLEST_NORMAL_HALF, subnormal, jnp.minimum(step, LARGEST_HALF))
    return kept.astype(SCALE_DTYPE).astype(jnp.float32)


def step_dtype(smallest: float, largest: float) -> Any:
    """In which dtype `rounded_step`s of this range are stored: float16 where they are normal numbers of it."""
    return SCALE_DTYPE if smallest >= SMALLEST_NORMAL_HALF and largest <= LARGEST_HALF else jnp.float32


def affine(
    low: Float[Array, "*g"], high: Float[Array, "*g"], spec: QuantSpec
) -> tuple[Float[Array, "*g"], Float[Array, "*g"]]:
    """Steps (`rounded_step`s) and integer zero points that cover [low, high]; the step of a group of zeros is 1."""
    if spec.symmetric:
        step, zero = jnp.maximum(high / (spec.middle - 1), -low / spec.middle), jnp.float32(spec.middle)
        step = jnp.where(step > 0, step, 1)
    else:
        step = (high - low) / spec.levels
        step = jnp.where(step > 0, step, 1)
        zero = jnp.clip(jnp.round(-low / step), 0, spec.levels)
    return rounded_step(step), jnp.broadcast_to(zero, step.shape)


def nearest(
    grouped: Float[Array, "*lead groups g o"],
    steps: Float[Array, "*lead groups o"],
    zeros: Float[Array, "*lead groups o"],
    spec: QuantSpec,
) -> Float[Array, "*lead groups g o"]:
    """The codes, as floats, nearest to each weight."""
    return jnp.clip(jnp.round(grouped / steps[..., None, :]) + zeros[..., None, :], 0, spec.levels)


def round_trip(
    grouped: Float[Array, "*lead groups g o"],
    low: Float[Array, "*lead groups o"],
    high: Float[Array, "*lead groups o"],
    spec: QuantSpec,
) -> Float[Array, "*lead groups g o"]:
    """The weights after rounding to nearest within [low, high]."""
    steps, zeros = affine(low, high, spec)
    return dequantized(nearest(grouped, steps, zeros, spec), steps, zeros)


@ft.partial(jax.jit, static_argnames=("spec", "in_features", "dtype", "layout"))
def assemble(
    codes: Float[Array, "*lead groups g o"],
    steps: Float[Array, "*lead groups o"],
    zeros: Float[Array, "*lead groups o"],
    spec: QuantSpec,
    *,
    in_features: int,
    dtype: Any,
    input_scale: Float[Array, "*lead i"] | None = None,
    layout: Layout | None = None,
) -> QuantizedTensor:
    """A QuantizedTensor of codes that a search has chosen; its scales are the steps in the dtype they have."""
    *lead, groups, g, o = codes.shape
    flat = codes.astype(jnp.uint8).reshape(*lead, groups * g, o)
    return QuantizedTensor(
        codes=kernels.pack(flat, spec.bits),
        scales=steps,
        zeros=None if spec.symmetric else zeros.astype(jnp.uint8),
        input_scale=input_scale,
        spec=spec,
        dtype=jnp.dtype(dtype),
        pad=groups * g - in_features,
        layout=layout,
    )


def round_to_nearest(w: Float[Array, "*lead i o"], spec: QuantSpec, *, steps: Any = None) -> QuantizedTensor:
    """`w` rounded to nearest in groups down axis -2; a group's range is its smallest to largest weight.

    Args:
      steps: their dtype. None for float16 where its normal numbers hold them all, else float32; in a traced function,
        which cannot ask, float32. With float16 those below 6e-8 or above 65504 are these, and small weights are lost.
    """
    found = _round_to_nearest(w, spec, half=steps is not None and jnp.dtype(steps) == SCALE_DTYPE)
    if steps is None and not isinstance(found.scales, Tracer):
        steps = step_dtype(*map(float, jax.device_get((found.scales.min(initial=1), found.scales.max(initial=1)))))
    return found if steps is None else replace(found, scales=found.scales.astype(steps))


@ft.partial(jax.jit, static_argnames=("spec", "half"))
def _round_to_nearest(w: Float[Array, "*lead i o"], spec: QuantSpec, half: bool) -> QuantizedTensor:
    """See `round_to_nearest`; steps are float32, with numbers that float16 has if they are to be `half`."""
    wide = jnp.asarray(w, jnp.float32)
    steps, zeros = affine(*group_ranges(wide, spec), spec)
    steps = half_step(steps) if half else steps
    codes = nearest(group(wide, spec), steps, zeros, spec)
    return assemble(codes, steps, zeros, spec, in_features=w.shape[-2], dtype=w.dtype)


def dequantize(params: Any) -> Any:
    """`params` with the dense weight, in the shape and dtype it had, where a QuantizedTensor is; or that of one alone.

    Example:
      >>> logits = model.apply(awq.dequantize(qparams), tokens)  # as awq.quantized(model.apply)(qparams, tokens)
    """
    return jax.tree.map(lambda leaf: _dense(leaf) if is_quantized(leaf) else leaf, params, is_leaf=is_quantized)


def _dense(w: QuantizedTensor) -> Array:
    dense = kernels.dequantize(w)
    if w.input_scale is not None:
        dense = dense * w.input_scale[..., :, None]
    if w.layout is not None:
        dense = w.layout.undo(dense)
    return dense.astype(w.dtype)


def dot(
    x: Float[Array, "*b i"],
    w: Float[Array, "*lead i o"] | QuantizedTensor,
    group_sizes: Int[Array, " e"] | None = None,
    *,
    dtype: Any = None,
) -> Float[Array, "*b o"]:
    """`x @ w`, dense or quantized; the leading axes of w, if any, are leading axes of x too.

    Args:
      x: integers are multiplied as what they are in w's dtype.
      group_sizes: x is (rows, i), w (e, i, o), and of the rows the first group_sizes[0] are multiplied with w[0], and
        so on, as in jax.lax.ragged_dot.
      dtype: of the result, float32, bfloat16 or float16; None for x's. Sums are float32 in any case.

    Example:
      >>> y = dot(x, params["kernel"])  # the only matmul a quantizable layer needs
    """
    x = as_floats(x, w.dtype)
    if isinstance(w, QuantizedTensor):
        if group_sizes is None:
            return kernels.int4_matmul(x, w, dtype=dtype)
        return kernels.grouped_int4_matmul(x, w, group_sizes, dtype=dtype)
    if group_sizes is None:
        return dense_matmul(x, w, dtype=dtype)
    return dense_grouped_matmul(x, w, group_sizes, dtype=dtype)


def dots(x: Float[Array, "*b i"], *ws: Float[Array, "i o"] | QuantizedTensor) -> tuple[Float[Array, "*b o"], ...]:
    """`dot` of x with each of ws; quantized ones in one launch where that can be.

    Example:
      >>> q, k, v = dots(x, *(params[name]["kernel"] for name in ("q", "k", "v")))
    """
    quantized = [w for w in ws if isinstance(w, QuantizedTensor)]
    if len(quantized) < len(ws):
        return tuple(dot(x, w) for w in ws)
    return kernels.shared_int4_matmul(as_floats(x, ws[0].dtype), *quantized)


def plus(y: Float[Array, "*b o"], bias: Float[Array, " o"] | None) -> Float[Array, "*b o"]:
    """y and a bias, if there is one."""
    return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - 1))


def as_floats(x: Array, dtype: Any) -> Array:
    """x, in `dtype` if it is of integers or booleans."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype)


def in_tiles(w: QuantizedTensor) -> QuantizedTensor:
    """`w` with its 4-bit codes in the order that the GPU kernels read."""
    return packed_as(w, TILES)


def in_int4(w: QuantizedTensor) -> QuantizedTensor:
    """`w` with its 4-bit codes as an array of int4, which XLA reads."""
    return packed_as(w, INT4)


def in_rows(w: QuantizedTensor) -> QuantizedTensor:
    """`w` with its codes as the canonical bit stream; undoes `in_tiles` and `in_int4`."""
    return packed_as(w, ROWS)


@ft.partial(jax.jit, static_argnames="packing")
def packed_as(w: QuantizedTensor, packing: Packing) -> QuantizedTensor:
    """`w` with its codes laid out otherwise.

    Raises:
      ValueError: the packing does not hold codes of so many bits.
    """
    bits, i = w.spec.bits, w.in_features
    if w.packing == packing.name:
        return w
    if bits not in packing.bits:
        raise ValueError(f"{w} has {bits}-bit codes, {packing.name} holds those of {list(packing.bits)}: leave it.")
    if not whole_zeros(w):
        raise ValueError(f"{w} has zero points that are no whole numbers, {packing.name} has room for those: leave it.")
    codes = packing.pack(kernels.unpacked(w), bits, w.spec.group(i))
    return replace(w, codes=codes, packing=packing.name, pad=packing.shape(codes.shape, bits)[-2] - i)


def prepare(qparams: Any) -> Any:
    """`qparams` for a GPU or TPU: every 4-bit QuantizedTensor with its codes packed as they are read there.

    In tiles for the Triton kernels; as int4 arrays for XLA on a TPU, or an NVIDIA GPU on which the kernels cannot run
    (`awq-jax doctor` says which). Once, after loading. Values, shapes and bytes stay, and what runs elsewhere runs on.
    Other leaves stay as they are.

    Example:
      >>> params = awq.prepare(awq.load("folder").params)
    """
    best = kernels.best_packing()
    fits = lambda leaf: is_quantized(leaf) and leaf.spec.bits in best.bits and whole_zeros(leaf)
    return jax.tree.map(lambda leaf: packed_as(leaf, best) if fits(leaf) else leaf, qparams, is_leaf=is_quantized)


def whole_zeros(w: QuantizedTensor) -> bool:
    """Whether zero points are whole numbers, as the kernels read them."""
    return w.zeros is None or not jnp.issubdtype(w.zeros.dtype, jnp.floating)


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def with_input_scale(w: QuantizedTensor, input_scale: Float[Array, "*lead i"]) -> QuantizedTensor:
    return replace(w, input_scale=input_scale)


def static_json(w: QuantizedTensor) -> dict[str, Any]:
    """What of a QuantizedTensor is not an array, as JSON; `static_fields` is the inverse."""
    layout = None if w.layout is None else w.layout.as_json()
    dtype = jnp.dtype(w.dtype).name
    return {"spec": asdict(w.spec), "dtype": dtype, "pad": w.pad, "layout": layout, "packing": w.packing}


def static_fields(found: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of QuantizedTensor that are not arrays, from `static_json`."""
    layout: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in (found["layout"] or {}).items()}
    return {
        "spec": QuantSpec(**found["spec"]),
        "dtype": jnp.dtype(found["dtype"]),
        "pad": found["pad"],
        "layout": layout_of_json(**layout) if layout else None,
        "packing": found.get("packing", ROWS.name),
    }


def _packed(values: tuple[Any, ...]) -> bytes:
    nothing: Any = None
    w = QuantizedTensor(nothing, nothing, nothing, nothing, **dict(zip(STATIC, values, strict=True)))
    return json.dumps(static_json(w)).encode()


# So that jax.export can serialize functions of QuantizedTensors.
export.register_pytree_node_serialization(
    QuantizedTensor,
    serialized_name="awq_jax.QuantizedTensor",
    serialize_auxdata=_packed,
    deserialize_auxdata=lambda data: tuple(static_fields(json.loads(data))[name] for name in STATIC),
)
