"""torch's dtypes and tensors as JAX's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array

from awq_jax.errors import InputError

DTYPES = {
    getattr(torch, name): jnp.dtype(getattr(jnp, name))
    for name in (
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
} | {torch.bool: jnp.dtype(bool)}


def dtype_of(dtype: torch.dtype) -> np.dtype:
    """JAX's dtype; of 64 bits those that JAX has, 32 unless jax_enable_x64 is set.

    Raises:
      InputError: there is none.
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype} has no counterpart here: bring the model to float32, bfloat16 or float16 first.")
    return jax.dtypes.canonicalize_dtype(DTYPES[dtype])


def shape_of(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(tensor.shape), dtype_of(tensor.dtype))


def array(name: str, tensor: torch.Tensor) -> Array:
    """A copy of a tensor, while JAX traces too: what is traced then is kept for later calls.

    Raises:
      InputError: its dtype is unknown, or its integers do not fit.
    """
    dtype, found = dtype_of(tensor.dtype), tensor.detach().cpu().resolve_conj().contiguous()
    values = found.view(torch.int16).numpy().view(jnp.bfloat16) if found.dtype == torch.bfloat16 else found.numpy()
    if np.issubdtype(dtype, np.integer) and values.size:
        limits = np.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise InputError(f"{name} holds integers beyond {dtype.name}: set jax_enable_x64.")
    with jax.ensure_compile_time_eval():
        return jnp.array(values.astype(dtype))


def param(name: str, tensor: torch.Tensor) -> Any:
    """A param as an array, or its shape and dtype where it is on the meta device.

    Raises:
      InputError: of a dtype that JAX does not have, which would round it.
    """
    dtype = dtype_of(tensor.dtype)
    if dtype != DTYPES[tensor.dtype] and tensor.is_floating_point():
        raise InputError(f"{name} is of {tensor.dtype}: call model.float() first, or set jax_enable_x64.")
    return shape_of(tensor) if tensor.is_meta else array(name, tensor)


def likeness(x: Any) -> torch.Tensor:
    """A tensor without storage, as an example is: a tensor, an array, or a shape and a dtype.

    Arrays of int32 stand for torch's int64, which JAX does not have by default.
    """
    if isinstance(x, torch.Tensor):
        return x.detach().to("meta")
    dtype = jnp.dtype(x.dtype)
    if np.issubdtype(dtype, np.integer):
        return torch.empty(tuple(x.shape), dtype=torch.int64, device="meta")
    known = {of: torch_dtype for torch_dtype, of in DTYPES.items()}
    if dtype not in known:
        raise InputError(f"an input of {dtype} has no counterpart in torch: give float32, integers or bool.")
    return torch.empty(tuple(x.shape), dtype=known[dtype], device="meta")
