"""`compare`: every prompt through a base and the checkpoints made of it; what a store has is not run again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.memory import check_memory, to_be_read
from awq_jax.models.generate import check_drawn, made_dense
from awq_jax.pipeline.answers import answer, distance, tokens_of
from awq_jax.pipeline.identity import digest_of, sites_of
from awq_jax.pipeline.load import Model, key_of, opened
from awq_jax.pipeline.prompts import read_prompts
from awq_jax.pipeline.same_tokens import check_same_tokens
from awq_jax.records.comparison import Comparison, Setting, compared
from awq_jax.records.prompt import Prompt
from awq_jax.records.store import Key, Known, Store, store

Told = Callable[[str], None]
Progress = Callable[[str, int, int], None]
Steps = Callable[[int, int], None]


@dataclass(frozen=True)
class Party:
    """A checkpoint to compare: what is known of it, and what opens it; `reads` is None for one that is not there."""

    known: Known
    prompts: tuple[Prompt, ...]
    described: Model | None = None
    reads: Callable[[], Model] | None = None

    @cached_property
    def model(self) -> Model:
        """The model in memory, read on first use."""
        assert self.described is not None
        assert self.reads is not None
        what = f"Comparing {self.known.name}"
        check_memory(what, to_be_read(self.described.params), "compare smaller ones, or take more memory")
        model = self.reads()
        return replace(model, params=made_dense(model.config, model.params))

    @cached_property
    def tokens(self) -> dict[str, Any]:
        """The tokens of each prompt by its version."""
        assert self.described is not None
        found = tokens_of(self.described, self.prompts)
        return {prompt.version: tokens for prompt, tokens in zip(self.prompts, found, strict=True)}


def compare(
    base: str | Path,
    others: str | Path | Iterable[str | Path],
    prompts: str | Path,
    kept: str | Path,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    seed: int = 0,
    told: Told = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """How checkpoints answer beside the model that they were made of; computed in float32.

    Args:
      base, others: checkpoints, see `load`; or names or digests of some that the store has met.
      prompts: a file, see `pipeline.prompts.read_prompts`.
      kept: the store's file, made if it is not there. Results are kept there by what is asked, by the checkpoint's
        content and by the settings, and nothing is run twice.
      max_new_tokens: of each answer, at most.
      temperature: of the sampled answer that is taken beside the greedy one; 0 leaves it out.
      seed: of what is sampled.

    Raises:
      InputError: a file that cannot be read, prompts that are none, models of different tokens, a model whose logits
        are no numbers. What was answered by then is kept.

    Example:
      >>> found = awq.compare("smollm2", "smollm2-awq", "prompts.jsonl", "runs.sqlite")
      >>> found.others[0].kl
    """
    asked = read_prompts(Path(prompts))
    names = [str(base), *dict.fromkeys(map(str, [others] if isinstance(others, str | Path) else others))]
    if len(names) < 2:
        raise InputError("There is nothing to compare with: give a base and one checkpoint or more.")
    settings = settings_of(max_new_tokens, temperature, seed)
    with store(Path(kept)) as results:
        parties = [party(name, asked, results, told) for name in names]
        check_parties(parties, asked)
        results.note(asked)
        first, *rest = parties
        for k, one in enumerate(parties):
            fill_answers(results, one, settings, told, partial(progress, f"{names[k]} answers"))
            if one is not first:
                fill_distances(results, one, first, settings, told, partial(progress, f"{names[k]} is measured"))
                vars(one).pop("model", None)
        return compared(results, asked, first.known, [one.known for one in rest], settings)


def settings_of(max_new_tokens: int, temperature: float, seed: int) -> tuple[Setting, ...]:
    """The greedy way, and the sampled one if there is a temperature."""
    check_drawn(max_new_tokens, temperature)
    if temperature >= 100:
        raise InputError(f"temperature={temperature}: give less than 100, or 0 for the greedy answer alone.")
    key_of(seed)
    greedy = Setting("greedy", {"max_new_tokens": max_new_tokens})
    sampled = Setting("sampled", {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed})
    return (greedy, sampled) if temperature else (greedy,)


def party(name: str, prompts: tuple[Prompt, ...], results: Store, told: Told) -> Party:
    """The checkpoint of a name: that on disk, or one that the store has met."""
    known = results.named(name)
    try:
        checkpoint = open_checkpoint(name)
    except InputError:
        if known is None or Path(name).expanduser().exists():
            raise
        told(f"{name} is not there: what the store has of it is shown.")
        return Party(known, prompts)
    path = checkpoint.path
    met = Known(digest_of(path), name, checkpoint.nbytes, sites_of(path), time.time())
    before = next((one for one in results.checkpoints() if one.digest == met.digest), None)
    if before:
        met = met._replace(seen=before.seen)
    results.meet(met)
    described, reads = opened(name, jnp.float32, told)
    described.check_writes()
    return Party(met, prompts, described, reads)


def check_parties(parties: Sequence[Party], prompts: Sequence[Prompt]) -> None:
    """Refuse the same content twice, and models to which words are other tokens."""
    base, *others = parties
    words = "\n".join(prompt.text for prompt in prompts)
    for one in others:
        if one.known.digest == base.known.digest:
            raise InputError(f"{one.known.name} holds the same as {base.known.name}: give another checkpoint.")
        if one.described and base.described:
            check_same_tokens(one.described, base.described, words, base.known.name)


def fill_answers(results: Store, one: Party, settings: Sequence[Setting], told: Told, progress: Steps) -> None:
    """Asks a checkpoint what the store has no answer to."""
    values = {setting.key: setting for setting in settings}
    names = {prompt.version: prompt.name for prompt in one.prompts}
    keys = [Key(version, one.known.digest, "", key) for key in values for version in names]

    def make(key: Key) -> dict[str, Any]:
        return answer(
            one.model, one.tokens[key.prompt], values[key.settings].values, f"{one.known.name}, {names[key.prompt]}"
        )

    if one.reads is None:
        if missing := sum(results.get(key) is None for key in keys):
            told(f"{one.known.name} was never asked {missing} of {len(keys)} times, and is not there to be asked.")
        return
    if one.described and any(results.get(key) is None for key in keys):
        # Refuses what it can while the weights are not read.
        version, longest = max(one.tokens.items(), key=lambda item: len(item[1]))
        try:
            one.described.stream(longest, max_new_tokens=settings[0].values["max_new_tokens"])
        except InputError as e:
            raise InputError(f"{one.known.name}, {names[version]}: {e}") from e
    results.fill(keys, make, progress)


def fill_distances(
    results: Store, one: Party, base: Party, settings: Sequence[Setting], told: Told, progress: Steps
) -> None:
    """Measures how far a checkpoint is from the base where the store does not tell."""
    names = {prompt.version: prompt.name for prompt in one.prompts}
    keys = [Key(v, one.known.digest, base.known.digest, setting.key) for setting in settings for v in names]

    def make(key: Key) -> dict[str, Any]:
        said = results.get(key._replace(checkpoint=base.known.digest, base=""))
        assert said is not None
        asked = one.tokens[key.prompt], base.tokens[key.prompt]
        return distance(one.model, base.model, asked, said, f"{one.known.name}, {names[key.prompt]}")

    if one.reads is None or base.reads is None:
        if missing := sum(results.get(key) is None for key in keys):
            pair = f"{one.known.name} to {base.known.name}"
            told(f"KL of {pair} is not known {missing} of {len(keys)} times: it takes both.")
        return
    results.fill(keys, make, progress)
