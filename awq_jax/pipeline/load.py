"""`load`: any checkpoint, dense or quantized, as a model that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from awq_jax import models
from awq_jax.errors import InputError
from awq_jax.formats.chat import render
from awq_jax.formats.checkpoint import Checkpoint, open_checkpoint
from awq_jax.machine import fast_dtype
from awq_jax.memory import check_memory, matmul_bytes, to_be_read
from awq_jax.models.decoder import block, embed, head, layer_name
from awq_jax.models.family import Family
from awq_jax.models.generate import NO_TOKEN, Speed, generate, nbytes, no_numbers, stream
from awq_jax.models.inputs import check_tokens, without_rows
from awq_jax.models.layer import Config
from awq_jax.models.pieces import pieces
from awq_jax.pipeline.agreement import check_params, check_tensors
from awq_jax.pipeline.bridged import fallback
from awq_jax.text import encode
from awq_jax.weights.tensor import prepare

ACCELERATORS = ("gpu", "tpu")
EMBED, BLOCK, HEAD = (jax.jit(f, static_argnums=0) for f in (embed, block, head))


@dataclass(frozen=True)
class Model:
    """A decoder in memory.

    Args:
      family: of awq_jax.models, knows names.
      config: what its layers are.
      params: nested dict; kernels may be QuantizedTensors.
      tokenizer: a transformers tokenizer.
      stops: tokens that end a text, beside the tokenizer's.
    """

    family: Family
    config: Config
    params: Any
    tokenizer: Any
    stops: tuple[int, ...] = ()

    def hidden(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t h"]:
        """What the last layer gives; one compiled program a shape, whatever the number of layers.

        Raises:
          InputError: no tokens, more than the model was trained for, some beyond its embedding, or what is none.
        """
        if np.ndim(tokens) != 2:
            raise InputError(f"tokens have shape {np.shape(tokens)}: give [batch, length].")
        check_tokens(self.config, tokens, "tokens")
        h = EMBED(self.config, self.outer, jnp.asarray(tokens))
        for i, layer in enumerate(self.config.layers):
            h = BLOCK(layer, self.params[layer_name(i)], h)
        return h

    def head(self, hidden: Float[Array, "b t h"]) -> Float[Array, "b t v"]:
        """Logits of what the last layer gives, float32."""
        return HEAD(self.config, self.outer, hidden)

    def logits(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of every position, float32."""
        return self.head(self.hidden(tokens))

    def logits_at(self, tokens: Int[Array, "b t"], places: Int[np.ndarray, " n"]) -> Float[Array, "b n v"]:
        """Logits of some positions, float32."""
        return self.head(self.hidden(tokens)[:, places])

    def check_writes(self) -> None:
        """Passes if the model predicts the next token from those before it."""

    def nbytes_of_logits(self, tokens: int) -> int:
        """About what `logits` of so many tokens takes beside the params in memory: a layer, and the logits thrice."""
        c = self.config
        hidden = jax.eval_shape(partial(embed, c), self.outer, jax.ShapeDtypeStruct((1, tokens), jnp.int32))
        of = lambda i: matmul_bytes(partial(block, c.layers[i]), self.params[layer_name(i)], hidden)
        logits = matmul_bytes(partial(head, c), self.outer, hidden)
        return to_be_read(self.params) + max(map(of, map(c.layers.index, set(c.layers)))) + 3 * logits

    @property
    def outer(self) -> Any:
        """The params outside of the layers."""
        return {name: part for name, part in self.params.items() if not name.startswith("layers_")}

    def tokens_of(self, prompt: str, *, chat: bool = True) -> Int[np.ndarray, " t"]:
        """The tokens of a prompt, asked as a chat where the tokenizer has a template; see `stream`."""
        chat = chat and bool(self.tokenizer.chat_template)
        text = prompt
        if chat:
            asked = [{"role": "user", "content": prompt}]
            (text,) = render(self.tokenizer, [asked], add_generation_prompt=True, names=["The prompt"])
        return encode(self.tokenizer, text, special=not chat)

    def generate(self, prompt: str, **options: Any) -> str:
        """What `stream` gives, as one text; takes the same arguments."""
        return "".join(self.stream(prompt, **options))

    def stream(
        self,
        prompt: str | Int[Array | np.ndarray, " t"],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        chat: bool = True,
        seed: int = 0,
        speed: Speed | None = None,
    ) -> Iterator[str]:
        """The model's continuation of `prompt`, piece by piece; an answer to a chat where the tokenizer has a template.

        Args:
          prompt: a text, or its tokens.
          max_new_tokens: tokens of the answer at most.
          temperature: 0 takes the likeliest token.
          top_p: sample from the fewest tokens whose probabilities reach it.
          chat: False continues the prompt as it is.
          seed: of the samples.
          speed: `awq_jax.models.generate.Speed`, filled in with tokens and seconds.

        Raises:
          ValueError: a number out of range, or more tokens than the model has positions; at once.

        Example:
          >>> for piece in model.stream("Why is the sky blue?"):
          ...     print(piece, end="", flush=True)
        """
        tokens = self.tokens_of(prompt, chat=chat) if isinstance(prompt, str) else np.asarray(prompt)
        how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        return pieces(self.tokenizer, self.new_tokens(tokens, **how, speed=speed))

    def new_tokens(
        self,
        tokens: Int[Array | np.ndarray, " t"],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        speed: Speed | None = None,
    ) -> Iterator[int]:
        """The tokens of what `stream` gives, without the one that ends it."""
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        return stream(self.config, self.params, tokens, **how, key=key_of(seed), eos=self.eos, speed=speed)

    def sample(self, samples: int, seq_len: int, seed: int = 0) -> Int[np.ndarray, "n t"]:
        """Text that the model writes by itself from its first token on: calibration data without any text."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        start = next((i for i in ids if i is not None), None)
        if start is None:
            raise InputError("calib='self': the tokenizer names no first token (bos or eos): give a text instead.")
        what = f"calib='self' with samples={samples} sequences of seq_len={seq_len} tokens"
        check_memory(what, nbytes(self.config, self.params, samples, 1, seq_len), "give shorter ones, or fewer")
        first = np.full((samples, 1), start, np.int32)
        out = generate(
            self.config,
            self.params,
            jnp.asarray(first),
            max_new_tokens=seq_len,
            temperature=1.0,
            key=key_of(seed),
        )
        tokens = np.asarray(out)[:, 1:]
        if (tokens == NO_TOKEN).any():
            raise no_numbers(self.config, "calib='self'")
        return tokens

    @property
    def eos(self) -> tuple[int, ...]:
        """All tokens that end a text."""
        own = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys(self.stops if own is None else (int(own), *self.stops)))


def key_of(seed: int) -> Array:
    """The key of a seed, which jax takes as 64 bits."""
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"seed={seed}: give a number of 64 bits, -2**63 to 2**63 - 1.")
    return jax.random.key(seed)


def architecture(checkpoint: Checkpoint) -> tuple[Family, Config]:
    """The family of a checkpoint, and its Config.

    Raises:
      InputError: it is of none, a field of the checkpoint's config is missing or cannot be, or its tensors are not
        those that the family has.
    """
    try:
        family = models.for_config(checkpoint.config).named_as(checkpoint.names)
        config = family.config(checkpoint.config)
    except ValueError as e:
        raise InputError(f"{checkpoint.path}: {e}") from e
    check_tensors(checkpoint, family, config)
    return family, config


def load(path: str | Path, dtype: Any = None, told: Callable[[str], None] = lambda line: None) -> Model:
    """The model at `path`: a Hugging Face folder or hub id, a GGUF file, an AutoAWQ folder, or a folder of ours.

    Args:
      dtype: of the activations; None for bfloat16 on GPUs and TPUs that multiply it faster, else float32.
      told: called with a line on a tokenizer that has tokens without a row in the embedding.

    Raises:
      InputError: a file that is missing or damaged; an architecture that is not supported; tensors that are not
        those of the config.

    Example:
      >>> print(awq.load("smollm2-awq").generate("Why is the sky blue?"))
    """
    return opened(path, dtype, told)[1]()


def opened(
    path: str | Path, dtype: Any = None, told: Callable[[str], None] = lambda line: None
) -> tuple[Model, Callable[[], Model]]:
    """The model at `path` with jax.ShapeDtypeStructs for params, and what reads them: see `load`.

    What it refuses to do it refuses as it is, so ask before its weights are read.

    Example:
      >>> model, read = opened("smollm2-awq")
      >>> model.stream(prompt, max_new_tokens=10**9)  # raises
      >>> answer = read().stream(prompt)
    """
    checkpoint = open_checkpoint(path)
    if (other := fallback(checkpoint)) is not None:
        from awq_jax.pipeline.bridged_model import opened_bridged

        return opened_bridged(other, told)
    model = _described(checkpoint, dtype, told)
    shapes = checkpoint.shapes(model.family, model.config)
    check_params(checkpoint.path, shapes, model.config)
    return replace(model, params=jax.eval_shape(_prepared, shapes)), lambda: _read(checkpoint, model)


def _described(checkpoint: Checkpoint, dtype: Any, told: Callable[[str], None]) -> Model:
    """The model of a checkpoint without params."""
    family, config = architecture(checkpoint)
    tokenizer = checkpoint.tokenizer()
    if beyond := without_rows(config, tokenizer):
        told(beyond)
    accelerated = jax.default_backend() in ACCELERATORS
    config = replace(config, dtype=dtype or (fast_dtype() if accelerated else jnp.float32))
    return Model(family, config, None, tokenizer, checkpoint.stops)


def _read(checkpoint: Checkpoint, model: Model) -> Model:
    params = checkpoint.params(model.family, model.config)
    check_params(checkpoint.path, params, model.config)
    return replace(model, params=_prepared(params))


def _prepared(params: Any) -> Any:
    return prepare(params) if jax.default_backend() in ACCELERATORS else params
