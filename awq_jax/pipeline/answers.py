"""What a model answers, and how far another model is from it along that answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from awq_jax.errors import InputError
from awq_jax.formats.chat import render
from awq_jax.models.generate import ROUNDED, Speed
from awq_jax.pipeline.by_token import by_token
from awq_jax.pipeline.chats import BETWEEN
from awq_jax.pipeline.load import Model
from awq_jax.pipeline.not_finite import origin
from awq_jax.records.prompt import Prompt
from awq_jax.text import decode, encode

IMPOSSIBLE = 50.0
"""Nats that stand for what a model cannot say: to end without a stop token, or to go on after one."""


def tokens_of(model: Model, prompts: Sequence[Prompt]) -> list[Int[np.ndarray, " t"]]:
    """The tokens of each prompt as this model is asked, through its own chat template if it has one."""
    chats = {k: prompt.asked for k, prompt in enumerate(prompts) if not isinstance(prompt.asked, str)}
    texts = [prompt.asked if isinstance(prompt.asked, str) else "" for prompt in prompts]
    templated = bool(model.tokenizer.chat_template)
    if templated:
        names = [prompts[k].name for k in chats]
        written = render(model.tokenizer, list(chats.values()), add_generation_prompt=True, names=names)
    else:
        written = [BETWEEN.join(m["content"] for m in messages) for messages in chats.values()]
    for k, text in zip(chats, written, strict=True):
        texts[k] = text
    return [encode(model.tokenizer, text, special=not (templated and k in chats)) for k, text in enumerate(texts)]


def answer(model: Model, tokens: Int[np.ndarray, " t"], settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the model says to a prompt: the text, its tokens and where in the text each ends, whether it ended by
    itself, and the seconds that it took."""
    speed, new = Speed(), []
    most, temperature = settings["max_new_tokens"], settings.get("temperature", 0.0)
    options = {"temperature": temperature, "top_p": settings.get("top_p", 1.0), "seed": settings.get("seed", 0)}
    try:
        for token in model.new_tokens(tokens, max_new_tokens=most, speed=speed, **options):
            new.append(token)
    except InputError as e:
        whole = np.concatenate([tokens, np.asarray(new, np.int32)])
        where = origin(model, whole[None])
        blamed = f" (not finite from {where} on)" if where and where != "the head" else ""
        raise InputError(f"{name}: {e}{blamed}") from e
    ends = [len(decode(model.tokenizer, new[: k + 1]).rstrip("\ufffd")) for k in range(len(new))]
    return {
        "text": decode(model.tokenizer, new),
        "tokens": new,
        "ends": ends,
        "stopped": len(new) < most,
        "asked": len(tokens),
        "prefill": round(speed.prefill, 4),
        "decode": round(speed.decode, 4),
    }


def distance(
    model: Model,
    base: Model,
    asked: tuple[Int[np.ndarray, " t"], Int[np.ndarray, " u"]],
    said: Mapping[str, Any],
    name: str,
) -> dict[str, Any]:
    """How far a model is from a base along what the base said, each asked as it is by itself.

    To end is one outcome, whatever token does it: so a model whose stop tokens are others is far at the end, and one
    whose template is another all along.

    Args:
      asked: the prompt's tokens of both.
      said: what `answer` gave of the base.

    Returns:
      By outcome: in nats KL(base || model) and how much more the loss is than the base's; whether the likeliest is
        the same.
    """
    vocab = model.config.vocab
    targets = np.asarray([*said["tokens"], *([vocab] if said["stopped"] else [])], np.int32)
    rows = [
        outcomes_of(one, tokens, said["tokens"], len(targets)) for one, tokens in zip((model, base), asked, strict=True)
    ]
    n = rows[0].shape[0]
    both = by_token(*rows, jnp.asarray(np.pad(targets, (0, n - len(targets)))))
    kl, more = (np.asarray(x)[: len(targets)] for x in (both.kl, both.loss - both.reference_loss))
    for whose, one, tokens in (("the model's", model, asked[0]), ("the base's", base, asked[1])):
        if not np.isfinite(kl).all() and (where := origin(one, tokens[None])):
            raise InputError(f"{name}: {whose} logits are NaN or infinite (from {where} on). The weights are damaged.")
    rounded = lambda values: [float(f"{x:.4g}") for x in values]
    return {"kl": rounded(kl), "more": rounded(more), "same": [int(x) for x in both.same[: len(targets)]]}


def outcomes_of(model: Model, prompt: Int[np.ndarray, " t"], new: Sequence[int], n: int) -> Float[Array, "rows v1"]:
    """The outcomes that a model predicts at the `n` places from the end of a prompt on, and some rows more."""
    tokens = np.concatenate([prompt, np.asarray(new, np.int32)])
    up = lambda k: -(-k // ROUNDED) * ROUNDED
    length = min(up(len(tokens)), model.config.positions or up(len(tokens)))
    # What follows is not seen by what stands before.
    whole = jnp.asarray(np.pad(tokens, (0, length - len(tokens)))[None])
    at = np.minimum(len(prompt) - 1 + np.arange(up(n)), length - 1)
    return outcomes(model.logits_at(whole, at)[0], jnp.asarray(model.eos, jnp.int32))


@jax.jit
def outcomes(logits: Float[Array, "t v"], stops: Int[Array, " s"]) -> Float[Array, "t v1"]:
    """Logits with one more for the end, which takes those of all stop tokens."""
    never = jax.nn.logsumexp(logits, -1) - IMPOSSIBLE
    end = jnp.maximum(jax.nn.logsumexp(logits[:, stops], -1), never) if stops.size else never
    return jnp.concatenate([logits.at[:, stops].set(never[:, None]), end[:, None]], -1)
