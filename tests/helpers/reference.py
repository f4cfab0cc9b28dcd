"""The search in plain numpy: replaying activations, one candidate at a time."""

from __future__ import annotations

import numpy as np

from awq_jax.search.moments import Moments, of
from awq_jax.weights.spec import QuantSpec


def problem(i: int = 64, o: int = 6, tokens: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Activations (tokens, i) that are correlated, some channels large, and a weight (i, o)."""
    rng = np.random.default_rng(seed)
    mixing = (
        np.eye(i)
        + 0.3 * rng.normal(size=(i, i)) / i**0.5
        + 0.5 * rng.normal(size=(i, 1)) * rng.normal(size=(1, i)) / i**0.5
    )
    sizes = np.exp(rng.normal(size=i))
    x = rng.normal(size=(tokens, i)) @ mixing * sizes
    w = rng.standard_t(4, size=(i, o)) / i**0.5
    return x.astype(np.float32), w.astype(np.float32)


def moments(x: np.ndarray, block: int | None = None) -> Moments:
    return of(x, block)


def groups(a: np.ndarray, spec: QuantSpec) -> list[slice]:
    """The rows of each group."""
    g = spec.group(len(a))
    return [slice(k, min(k + g, len(a))) for k in range(0, len(a), g)]


def steps_and_zeros(low: np.ndarray, high: np.ndarray, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    if spec.symmetric:
        step, zero = np.maximum(high / (spec.middle - 1), -low / spec.middle), np.full(low.shape, spec.middle)
    else:
        step = (high - low) / spec.levels
        zero = np.clip(np.round(-low / np.where(step > 0, step, 1)), 0, spec.levels)
    fraction, exponent = np.frexp(np.where(step > 0, step, 1))
    return np.ldexp(fraction.astype(np.float16).astype(np.float32), exponent), zero


def rounded(w: np.ndarray, low: np.ndarray, high: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """One group of weights (g, o) rounded to nearest within [low, high]."""
    step, zero = steps_and_zeros(low, high, spec)
    return (np.clip(np.round(w / step) + zero, 0, spec.levels) - zero) * step


def ranges(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)


def nearest(w: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """The whole weight (i, o) rounded to nearest."""
    return np.concatenate([rounded(w[rows], *ranges(w[rows]), spec) for rows in groups(w, spec)])


def output_errors(x: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Mean squared output error of each column."""
    return np.square(x.astype(np.float64) @ change).mean(0)


def scaled_error(x: np.ndarray, w: np.ndarray, s: np.ndarray, spec: QuantSpec) -> float:
    """What rounding `w * s` does to the output, each group's error on its own."""
    change = nearest(w * s[:, None], spec) / s[:, None] - w
    return sum(output_errors(x[:, rows], change[rows]).sum() for rows in groups(w, spec))


def gptq(
    w: np.ndarray, step: np.ndarray, zero: np.ndarray, gram: np.ndarray, order: np.ndarray, spec: QuantSpec
) -> np.ndarray:
    """Codes (i, o): rows rounded in `order`, each error undone by the rows left, whose inverse Gram is kept current.

    Args:
      step, zero: of each row, (i, o).
    """
    w, inverse = w.astype(np.float64).copy(), np.linalg.inv(gram.astype(np.float64))
    codes = np.zeros(w.shape)
    for j in order:
        codes[j] = np.clip(np.round(w[j] / step[j]) + zero[j], 0, spec.levels)
        error = (w[j] - (codes[j] - zero[j]) * step[j]) / inverse[j, j]
        w -= np.outer(inverse[:, j], error)
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0
    return codes
