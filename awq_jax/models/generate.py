"""Text from a model with a cache: one jitted program fills the cache and decodes in a while_loop."""

from __future__ import annotations

import functools as ft
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from awq_jax.machine import free_memory
from awq_jax.models.inputs import check_length, check_tokens
from awq_jax.models.llama import Config, Llama, init_cache
from awq_jax.tensor import is_quantized


def generate(
    config: Config,
    params: Any,
    tokens: Int[Array, "b t"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: Array | None = None,
    eos: int | Sequence[int] = (),
) -> Int[Array, "b total"]:
    """`tokens` continued by `max_new_tokens` more, [b, t + max_new_tokens].

    Args:
      params: of `Llama(config)`; kernels may be QuantizedTensors.
      tokens: prompts of equal length; there is no padding, so give prompts of other lengths in calls of their own.
      max_new_tokens: 1 or more.
      temperature: 0 takes the likeliest token, otherwise logits / temperature are sampled from.
      key: for sampling.
      eos: tokens that end a row. What follows in the row is `eos[0]`; once all rows have ended nothing is
        computed any more.

    On a CPU, where nothing multiplies codes or half floats faster than floats, matrices are made dense in the config's
    dtype once, before the first token, if half of the free memory holds them; else at every token.

    Compiled once for each config, prompt shape, `max_new_tokens`, `eos`, and once for sampling; the host waits for
    the last token only.

    Raises:
      ValueError: an argument out of range, tokens beyond the embedding, more tokens than positions, or a temperature
        without a key.
    """
    if jnp.ndim(tokens) != 2 or jnp.shape(tokens)[1] < 1:
        raise ValueError(f"tokens have shape {jnp.shape(tokens)}: give [batch, length], length 1 or more.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: give 1 or more.")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: give 0 (greedy) or more.")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} samples and needs a key: pass key=jax.random.key(seed).")
    check_tokens(config, tokens, "tokens")
    # The last token is not read again.
    check_length(config, jnp.shape(tokens)[1] + max_new_tokens - 1, f"max_new_tokens={max_new_tokens} after the prompt")
    return _generate(
        config,
        params,
        jnp.asarray(tokens, jnp.int32),
        temperature,
        key if temperature > 0 else None,
        max_new_tokens=max_new_tokens,
        eos=(int(eos),) if isinstance(eos, int) else tuple(map(int, eos)),
        dense=jax.default_backend() == "cpu" and 2 * dense_bytes(params, config.dtype) < free_memory(),
    )


def dense_bytes(params: Any, dtype: Any) -> int:
    """What the matrices of `params` that are not arrays of `dtype` would take as such."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    return sum(w.size for w in leaves if is_other(w, dtype)) * jnp.dtype(dtype).itemsize


def is_other(w: Any, dtype: Any) -> bool:
    """Whether a param is a matrix that is no array of `dtype`."""
    return is_quantized(w) or (w.ndim > 1 and w.dtype != dtype)


@ft.partial(jax.jit, static_argnames=("config", "max_new_tokens", "eos", "dense"))
def _generate(
    config: Config,
    params: Any,
    prompt: Int[Array, "b t"],
    temperature: Any,
    key: Array | None,
    *,
    max_new_tokens: int,
    eos: tuple[int, ...],
    dense: bool,
) -> Int[Array, "b total"]:
    if dense:
        of_dtype = lambda w: (w.dequantize() if is_quantized(w) else w).astype(config.dtype)
        whole = lambda w: of_dtype(w) if is_other(w, config.dtype) else w
        params = jax.tree.map(whole, params, is_leaf=is_quantized)
    b, t = prompt.shape
    total = t + max_new_tokens
    run: Any = ft.partial(Llama(config).apply, {"params": params})

    def put(end: Any, text: Array, ended: Array, logits: Float[Array, "b v"]) -> tuple[Array, Array]:
        """`text` with its token number `end`, and which rows have ended."""
        if key is None:
            token = logits.argmax(-1)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, end), logits / temperature)
        if eos:
            token = jnp.where(ended, eos[0], token)
            ended = ended | jnp.isin(token, jnp.asarray(eos))
        return lax.dynamic_update_slice(text, token[:, None].astype(text.dtype), (0, end)), ended

    def step(state: tuple) -> tuple:
        end, text, ended, cache = state
        last = lax.dynamic_slice(text, (0, end - 1), (b, 1))
        logits, cache = run(last, cache=cache, position=end - 1)
        return end + 1, *put(end, text, ended, logits[:, 0]), cache

    hidden, cache = run(prompt, cache=init_cache(config, b, total - 1), method="hidden")
    text = jnp.pad(prompt, [(0, 0), (0, max_new_tokens)], constant_values=eos[0] if eos else 0)
    text, ended = put(t, text, jnp.zeros(b, bool), run(hidden[:, -1], method="logits"))
    going = lambda state: (state[0] < total) & ~state[2].all()
    return lax.while_loop(going, step, (jnp.asarray(t + 1), text, ended, cache))[1]
