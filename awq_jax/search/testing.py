"""Checks for a new strategy: what the search asks of it, tried on awkward problems.

Example:
  >>> from awq_jax.search import testing
  >>> testing.check_scale(my_scale)  # or check_clip, check_rounding; raises AssertionError that says what is wrong
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from awq_jax.kernels.arithmetic import dequantized, ungrouped
from awq_jax.search.loss import output_error
from awq_jax.search.moments import Moments, of
from awq_jax.search.solve import find_scale
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import group_ranges

SPECS = (QuantSpec(4, 32), QuantSpec(3, 64), QuantSpec(4, -1), QuantSpec(8, 32, symmetric=True))
Problem = tuple[str, Float[Array, "i o"], Moments, QuantSpec]


def problems(spec: QuantSpec) -> Iterator[Problem]:
    """Name, weight, moments and spec: usual ones, and ones with a trap each."""
    rng = np.random.default_rng(0)

    def inputs(i: int) -> np.ndarray:
        channels = np.exp(rng.normal(size=i))
        return (rng.normal(size=(96, i)) @ (np.eye(i) + 0.3 * rng.normal(size=(i, i)) / i**0.5) * channels).astype("f4")

    for name, i, change in (
        ("usual", 128, lambda x, w: (x, w)),
        ("not whole groups", 80, lambda x, w: (x, w)),
        ("dead channels", 128, lambda x, w: (x * (np.arange(128) % 5 > 0), w)),
        ("no tokens", 128, lambda x, w: (x * 0, w)),
        ("one huge channel", 128, lambda x, w: (np.where(np.arange(128) == 7, 1e3 * x, x), w)),
        ("weights all positive", 128, lambda x, w: (x, np.abs(w))),
        ("a column of zeros", 128, lambda x, w: (x, w * (np.arange(12) > 0))),
        ("tiny weights", 128, lambda x, w: (x, w * 1e-3)),
    ):
        x, w = change(inputs(i), (rng.normal(size=(i, 12)) / i**0.5).astype("f4"))
        yield name, jnp.asarray(w, jnp.float32), of(jnp.asarray(x, jnp.float32), None), spec


def check_scale(strategy: Callable[..., Any]) -> None:
    """A scale strategy gives positive finite scales (i,), and what `find_scale` makes of them is finite."""

    def run(w: Array, m: Moments, spec: QuantSpec) -> Any:
        s = strategy(w, m, spec)
        factors, _, error = find_scale(w, m, jnp.arange(len(w)), n=len(w), spec=spec, strategy=strategy)
        return s, factors, error

    for name, found, w, _, _ in _each(strategy, run):
        s, factors, error = found
        assert s.shape == (len(w),), f"{name}: the scale has shape {s.shape}, the weight {w.shape}"
        assert np.isfinite(s).all(), f"{name}: the scale is not finite"
        assert (s > 0).all(), f"{name}: the scale is not positive everywhere"
        assert np.isfinite(factors).all(), f"{name}: the factors are not finite"
        assert np.isfinite(error), f"{name}: the error is not finite"


def check_clip(strategy: Callable[..., Any]) -> None:
    """A clip strategy gives finite ranges (groups, o) that are no wider than 1.5 times the weights'."""
    for name, (low, high), w, _, spec in _each(strategy, strategy):
        widest = np.stack(group_ranges(w, spec))
        assert low.shape == high.shape == widest.shape[1:], f"{name}: ranges have shape {low.shape}, {high.shape}"
        most = 1.5 * np.abs(widest).max(0)
        assert (low <= high).all(), f"{name}: a range ends before it starts"
        for found in (low, high):
            assert np.isfinite(found).all(), f"{name}: a range is not finite"
            assert (np.abs(found) <= most).all(), f"{name}: too wide a range"
    _columns_apart(strategy, lambda low, high: jnp.stack([low, high]))


def check_rounding(strategy: Callable[..., Any]) -> None:
    """A rounding strategy gives whole codes in range, positive steps, and a moderate error."""

    def run(w: Array, m: Moments, spec: QuantSpec) -> Any:
        return strategy(w, *group_ranges(w, spec), m, spec)

    for name, (codes, steps, zeros), w, m, spec in _each(strategy, run):
        assert codes.shape[::2] == steps.shape == zeros.shape, f"{name}: shapes {codes.shape, steps.shape, zeros.shape}"
        assert (codes == np.round(codes)).all(), f"{name}: codes are not whole"
        assert ((codes >= 0) & (codes <= spec.levels)).all(), f"{name}: codes out of 0 to {spec.levels}"
        assert np.isfinite(steps).all(), f"{name}: steps are not finite"
        assert (steps > 0).all(), f"{name}: steps are not positive"
        rounded = ungrouped(dequantized(codes, steps, zeros), len(w))
        error, energy = (float(output_error(d, m).sum()) for d in (rounded - w, w))
        assert error <= 0.2 * energy + 1e-9, f"{name}: rounding loses {error / max(energy, 1e-30):.0%} of the output"
    _columns_apart(run, lambda codes, steps, zeros: jnp.concatenate([codes.reshape(-1, codes.shape[-1]), steps, zeros]))


def _each(strategy: Any, run: Callable[..., Any]) -> Iterator[tuple[str, Any, Array, Moments, QuantSpec]]:
    assert isinstance(strategy, Hashable), "a strategy is static in jit: make it hashable (a frozen dataclass)"
    jitted = jax.jit(run, static_argnums=2)
    for spec in SPECS:
        for name, w, m, _ in problems(spec):
            yield f"{name}, {spec}", jax.tree.map(np.asarray, jitted(w, m, spec)), w, m, spec


def _columns_apart(run: Callable[..., Any], joined: Callable[..., Array]) -> None:
    """Columns are independent of each other: sites that share an input are solved side by side."""
    name, w, m, spec = next(iter(problems(SPECS[0])))
    whole = joined(*run(w, m, spec))
    part = joined(*run(w[:, :5], m, spec))
    agree = np.isclose(whole[..., :5], part, rtol=1e-4, atol=1e-5).mean()
    assert agree > 0.95, f"{name}: a column's result depends on the other columns"
