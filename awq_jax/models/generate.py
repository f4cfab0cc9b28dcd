"""Text from a model with a cache: `first` fills the cache with a prompt, `following` reads one token more.

Two drivers of the same two functions: `generate` runs a batch in one jitted while_loop, `stream` hands over each token
of one text as soon as it is there.
"""

from __future__ import annotations

import functools as ft
import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from awq_jax.errors import InputError
from awq_jax.machine import free_memory
from awq_jax.memory import check_memory, matmul_bytes, to_be_read
from awq_jax.models.decoder import Cache, Decoder, init_cache, layer_name
from awq_jax.models.inputs import check_length, check_tokens
from awq_jax.models.layer import Config
from awq_jax.weights.tensor import is_quantized

NO_TOKEN = -1
"""What is drawn from logits that are no numbers; `stream` refuses it."""

ROUNDED = 64
"""`stream` makes prompts and caches a multiple of this long, so that texts of other lengths run the same programs."""


class Sampling(NamedTuple):
    """How a token is drawn: from the fewest tokens whose probabilities at `temperature` reach `top_p`, None for all."""

    key: Array
    temperature: Any
    top_p: Any = None


@dataclass
class Speed:
    """Tokens of a prompt and of its answer, and the seconds that they took; compiling apart."""

    prompt: int = 0
    tokens: int = 0
    compiling: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    def __str__(self) -> str:
        told = [f"prompt: {self.prompt} tokens, {self.prompt / self.prefill:.1f} tokens/s"] if self.prefill else []
        if self.decode:
            told.append(f"answer: {self.tokens} tokens, {(self.tokens - 1) / self.decode:.1f} tokens/s")
        if self.compiling >= 1:
            told.append(f"compiling, once: {self.compiling:.0f} s")
        return "; ".join(told)


def generate(
    config: Config,
    params: Any,
    tokens: Int[Array, "b t"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Array | None = None,
    eos: int | Sequence[int] = (),
) -> Int[Array, "b total"]:
    """`tokens` continued by `max_new_tokens` more, [b, t + max_new_tokens].

    Args:
      params: of `Decoder(config)`; kernels may be QuantizedTensors.
      tokens: prompts of equal length; there is no padding, so give prompts of other lengths in calls of their own.
      max_new_tokens: 1 or more.
      temperature: 0 takes the likeliest token, otherwise logits / temperature are sampled from.
      top_p: sample from the fewest tokens whose probabilities reach it.
      key: for sampling.
      eos: tokens that end a row. What follows in the row is `eos[0]`; once all rows have ended nothing is
        computed any more. A row whose logits are NaN or infinite goes on with NO_TOKEN.

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
    check_tokens(config, tokens, "tokens")
    b, t = jnp.shape(tokens)
    how = sampling(config, t, max_new_tokens, temperature, key, top_p)
    what = f"max_new_tokens={max_new_tokens} after {b} prompts of {t}"
    check_memory(what, nbytes(config, params, b, t, max_new_tokens), "give fewer, or shorter prompts")
    return _generate(
        config,
        made_dense(config, params),
        jnp.asarray(tokens, jnp.int32),
        how,
        max_new_tokens=max_new_tokens,
        eos=(int(eos),) if isinstance(eos, int) else tuple(map(int, eos)),
    )


def stream(
    config: Config,
    params: Any,
    tokens: Int[Array | np.ndarray, " t"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Array | None = None,
    eos: Sequence[int] = (),
    speed: Speed | None = None,
) -> Iterator[int]:
    """The tokens that `generate` would continue one prompt by, each as soon as it is there; without that of `eos`.

    Args:
      speed: filled in with what it took, up to the token that was handed over last.

    Raises:
      ValueError: see `generate`; before the first token is asked for.
      InputError: logits that are NaN or infinite; when their token is asked for.
    """
    t = check_prompt(config, tokens)
    how = sampling(config, t, max_new_tokens, temperature, key, top_p)
    what = f"max_new_tokens={max_new_tokens} after a prompt of {t}"
    check_memory(what, nbytes(config, params, 1, t, max_new_tokens), "give fewer, or a shorter prompt")
    return _stream(config, params, tokens, how, max_new_tokens, frozenset(eos), speed or Speed())


def check_prompt(config: Any, tokens: Int[Array | np.ndarray, " t"]) -> int:
    """How many tokens a prompt has that a model can take."""
    if np.ndim(tokens) != 1:
        raise InputError(f"the prompt's tokens have shape {np.shape(tokens)}: give those of one prompt, [length].")
    check_tokens(config, tokens, "the prompt")
    return len(tokens)


def _stream(
    config: Config,
    params: Any,
    tokens: Int[Array | np.ndarray, " t"],
    how: Sampling | None,
    most: int,
    eos: frozenset[int],
    speed: Speed,
) -> Iterator[int]:
    t = jnp.shape(tokens)[0]
    up = lambda n: -(-n // ROUNDED) * ROUNDED
    params = jax.block_until_ready(made_dense(config, params))
    prompt = jnp.zeros((1, up(t)), jnp.int32).at[0, :t].set(jnp.asarray(tokens, jnp.int32))
    start = (config, params, prompt, jnp.asarray(t), how)
    began = time.perf_counter()
    token, cache = jax.eval_shape(ft.partial(first, config, length=up(t + most)), *start[1:])
    _first.lower(*start, length=up(t + most)).compile()
    _following.lower(config, params, token, start[3], cache, how).compile()
    speed.compiling = time.perf_counter() - began

    def drawn() -> Iterator[Int[Array, " b"]]:
        token, cache = _first(*start, length=up(t + most))
        for k in range(most - 1):
            # The next step is on its way before the token is waited for.
            new, cache = _following(config, params, token, jnp.asarray(t + k), cache, how)
            yield token
            token = new
        yield token

    yield from handed_over(drawn(), config, t, eos, speed)


def handed_over(
    drawn: Iterator[Int[Array, " b"]], config: Any, t: int, eos: Collection[int], speed: Speed
) -> Iterator[int]:
    """The tokens of one text as they are drawn after a prompt of `t`, up to one of `eos`; timed.

    Raises:
      InputError: one is NO_TOKEN.
    """
    began = time.perf_counter()
    for k, token in enumerate(drawn):
        found = int(token[0])
        if k == 0:
            speed.prompt, speed.prefill = t, -began + (began := time.perf_counter())
        speed.tokens, speed.decode = k + 1, time.perf_counter() - began if k else 0.0
        if found == NO_TOKEN:
            raise no_numbers(config, f"token {t + k}")
        if found in eos:
            return
        yield found


def sampling(
    config: Config, t: int, max_new_tokens: int, temperature: float, key: Array | None, top_p: float
) -> Sampling | None:
    """How tokens are drawn, None for the likeliest one; refuses what is out of range."""
    check_drawn(max_new_tokens, temperature, top_p)
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} samples and needs a key: pass key=jax.random.key(seed).")
    # The last token is not read again.
    what = f"max_new_tokens={max_new_tokens} after a prompt of {t}"
    fits = (config.positions or 0) - t + 1
    check_length(config, t + max_new_tokens - 1, what, f"give max_new_tokens={fits} or fewer, or a shorter prompt")
    return Sampling(key, temperature, top_p if top_p < 1 else None) if key is not None and temperature > 0 else None


def check_drawn(max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0) -> None:
    """Refuse numbers with which no model draws tokens."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: give 1 or more.")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature={temperature}: give 0 (greedy) or more.")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: give a probability above 0 and at most 1 (all tokens).")
    if top_p < 1 and temperature == 0:
        raise InputError(f"top_p={top_p} chooses nothing at temperature 0: give a temperature above it.")


def no_numbers(config: Config, where: str) -> InputError:
    """The error for a NO_TOKEN."""
    return InputError(
        f"{where}: the model's logits are NaN or infinite. The weights are damaged, or too large for "
        f"{jnp.dtype(config.dtype).name}."
    )


def nbytes(config: Config, params: Any, batch: int, t: int, max_new_tokens: int) -> int:
    """About what `generate` takes beside the params that are in memory: the cache, and what `first` computes in a layer
    and the head."""
    length = t + max_new_tokens - 1
    cache = jax.eval_shape(ft.partial(init_cache, config, batch, length))
    prompt = jax.ShapeDtypeStruct((batch, t), jnp.int32)
    dense = lambda w: jax.ShapeDtypeStruct(w.shape, config.dtype) if is_quantized(w) else w
    whole = jax.tree.map(dense, params, is_leaf=is_quantized)

    def with_layer(i: int) -> int:
        one = ft.partial(first, replace(config, layers=config.layers[i : i + 1]), end=t, how=None, length=length)
        return matmul_bytes(one, whole | {layer_name(0): whole[layer_name(i)]}, prompt)

    matmuls = max(map(with_layer, map(config.layers.index, set(config.layers))))
    return to_be_read(params) + to_be_read(cache) + matmuls


def made_dense(config: Config, params: Any) -> Any:
    """`params`, on a CPU with matrices dense in the config's dtype if half of the free memory holds them."""
    if jax.default_backend() != "cpu" or 2 * dense_bytes(params, config.dtype) >= free_memory():
        return params
    whole = lambda w: _as_dtype(w, config.dtype) if is_other(w, config.dtype) else w
    return jax.tree.map(whole, params, is_leaf=is_quantized)


@ft.partial(jax.jit, static_argnames="dtype")
def _as_dtype(w: Any, dtype: Any) -> Float[Array, "*shape"]:
    return (w.dequantize() if is_quantized(w) else w).astype(dtype)


def dense_bytes(params: Any, dtype: Any) -> int:
    """What the matrices of `params` that are not arrays of `dtype` would take as such."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    return sum(w.size for w in leaves if is_other(w, dtype)) * jnp.dtype(dtype).itemsize


def is_other(w: Any, dtype: Any) -> bool:
    """Whether a param is a matrix that is no array of `dtype`."""
    return is_quantized(w) or (w.ndim > 1 and w.dtype != dtype and jnp.issubdtype(w.dtype, jnp.floating))


@ft.partial(jax.jit, static_argnames=("config", "max_new_tokens", "eos"))
def _generate(
    config: Config,
    params: Any,
    prompt: Int[Array, "b t"],
    how: Sampling | None,
    *,
    max_new_tokens: int,
    eos: tuple[int, ...],
) -> Int[Array, "b total"]:
    b, t = prompt.shape
    total = t + max_new_tokens

    def put(end: Any, text: Array, ended: Array, token: Int[Array, " b"]) -> tuple[Array, Array]:
        """`text` with its token number `end`, and which rows have ended."""
        if eos:
            token = jnp.where(ended, eos[0], token)
            ended = ended | jnp.isin(token, jnp.asarray(eos))
        return lax.dynamic_update_slice(text, token[:, None], (0, end)), ended

    def step(state: tuple) -> tuple:
        end, text, ended, cache = state
        last = lax.dynamic_slice(text, (0, end - 1), (b, 1))[:, 0]
        token, cache = following(config, params, last, end - 1, cache, how)
        return end + 1, *put(end, text, ended, token), cache

    token, cache = first(config, params, prompt, t, how, length=total - 1)
    text = jnp.pad(prompt, [(0, 0), (0, max_new_tokens)], constant_values=eos[0] if eos else 0)
    text, ended = put(t, text, jnp.zeros(b, bool), token)
    going = lambda state: (state[0] < total) & ~state[2].all()
    return lax.while_loop(going, step, (jnp.asarray(t + 1), text, ended, cache))[1]


def first(
    config: Config, params: Any, prompt: Int[Array, "b t"], end: Any, how: Sampling | None, *, length: int
) -> tuple[Int[Array, " b"], Cache]:
    """The token at position `end`, and a cache for `length` positions with those before it.

    What stands in the prompt from `end` on is not seen: the tokens that follow take its place in the cache.
    """
    run: Any = ft.partial(Decoder(config).apply, {"params": params})
    hidden, cache = run(prompt, cache=init_cache(config, prompt.shape[0], length), method="hidden")
    last = lax.dynamic_index_in_dim(hidden, end - 1, 1, keepdims=False)
    return draw(run(last, method="logits"), end, how), cache


def following(
    config: Config, params: Any, token: Int[Array, " b"], position: Any, cache: Cache, how: Sampling | None
) -> tuple[Int[Array, " b"], Cache]:
    """The token after `token`, which stands at `position`, and the cache with it."""
    run: Any = ft.partial(Decoder(config).apply, {"params": params})
    logits, cache = run(token[:, None], cache=cache, position=position)
    return draw(logits[:, 0], position + 1, how), cache


def draw(logits: Float[Array, "b v"], position: Any, how: Sampling | None) -> Int[Array, " b"]:
    """The likeliest tokens, or random ones; `position` makes the draws of one key independent.

    NO_TOKEN where a logit is NaN or infinite.
    """
    return jnp.where(jnp.isfinite(logits).all(-1), _drawn(logits, position, how), NO_TOKEN)


def _drawn(logits: Float[Array, "b v"], position: Any, how: Sampling | None) -> Int[Array, " b"]:
    if how is None:
        return logits.argmax(-1).astype(jnp.int32)
    key = jax.random.fold_in(how.key, position)
    # The likeliest stays at 0, so that a temperature near 0 takes the others to -inf and leaves it finite.
    logits -= logits.max(-1, keepdims=True)
    logits /= jnp.maximum(how.temperature, jnp.finfo(logits.dtype).tiny)
    if how.top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    ranks = jnp.argsort(logits, descending=True)
    ranked = jnp.take_along_axis(logits, ranks, -1)
    chances = jax.nn.softmax(ranked)
    before = jnp.cumsum(chances, -1) - chances
    rank = jax.random.categorical(key, jnp.where(before < how.top_p, ranked, -jnp.inf))
    return jnp.take_along_axis(ranks, rank[:, None], -1)[:, 0].astype(jnp.int32)


_first = jax.jit(first, static_argnames=("config", "length"))
_following = jax.jit(following, static_argnames="config", donate_argnames="cache")
