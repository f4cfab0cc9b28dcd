"""What stands in an array's place and is none says so, whatever is done with it as with an array."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
from numpy.lib.mixins import NDArrayOperatorsMixin


class NotAnArrayError(TypeError, AttributeError):
    """Something was done with a QuantizedTensor that only arrays can; to `hasattr` it says no, as ever."""


def _told(w: Any) -> str:
    return (
        f"{w!r} is no array: wrap the function that reads it, awq.quantized(apply_fn)(params, ...), or make it dense, "
        "w.dequantize() (awq.dequantize(params) for all)."
    )


def _refuse(self: Any, *_: Any, **__: Any) -> NoReturn:
    raise NotAnArrayError(_told(self))


def _refuse_jax(self: Any) -> NoReturn:
    # jax asks for __jax_array__ wherever it takes arrays, and hides a TypeError.
    raise ValueError(_told(self))


def _attribute(self: Any, name: str) -> NoReturn:
    if hasattr(jax.Array, name) and not name.startswith("_") and not hasattr(type(self), name):
        _refuse(self)
    raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class NoArray(NDArrayOperatorsMixin):
    """Operators, indexing, truth, conversions and attributes of arrays raise an error with the remedy."""

    __jax_array__ = property(_refuse_jax)
    __array_ufunc__ = __array__ = __float__ = __int__ = __bool__ = _refuse
    __getitem__ = __iter__ = __len__ = __contains__ = _refuse
    __getattr__ = _attribute
    __ne__: Any = object.__ne__
