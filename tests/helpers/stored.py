"""A store as comparisons leave it, made up: no model is needed to look at one."""

from __future__ import annotations

import random
from pathlib import Path

from awq_jax.records.comparison import Setting
from awq_jax.records.prompt import Prompt
from awq_jax.records.store import Key, Known, Store

GREEDY = Setting("greedy", {"max_new_tokens": 64})
SAMPLED = Setting("sampled", {"max_new_tokens": 64, "temperature": 0.7, "seed": 0})
KINDS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


def known(name: str, seen: float = 1e9, error: float = 0.0, layers: int = 4) -> Known:
    """A checkpoint, with sites if they have errors."""
    rng = random.Random(name)
    sites = [
        [f"layers_{k}/{kind}/kernel", 4, error * rng.lognormvariate(0, 0.7), 3 * error]
        for k in range(layers)
        for kind in KINDS
        if error
    ]
    return Known(name.encode().hex().ljust(64, "0"), name, 270_000_000 if not error else 117_000_000, sites, seen)


def said(text: str, stopped: bool = True) -> dict:
    """An answer of a token a letter."""
    tokens = [ord(c) for c in text]
    times = {"asked": 9, "prefill": 0.1, "decode": 0.05 * len(text)}
    return {"text": text, "tokens": tokens, "ends": list(range(1, len(text) + 1)), "stopped": stopped, **times}


def far(said: dict, kl: float, seed: int = 0) -> dict:
    """A distance along an answer, of that KL in the mean."""
    rng = random.Random(seed)
    n = len(said["tokens"]) + said["stopped"]
    raw = [rng.lognormvariate(0, 2) for _ in range(n)]
    values = [kl * n * x / sum(raw) for x in raw]
    return {"kl": values, "more": [x / 2 for x in values], "same": [int(x < 1) for x in values]}


def put(store, prompt: Prompt, one: Known, answer: dict, base: Known | None = None, distance: dict | None = None):
    """One run: what was answered, and how far it is."""
    store.put(Key(prompt.version, one.digest, "", GREEDY.key), answer)
    if base and distance:
        store.put(Key(prompt.version, one.digest, base.digest, GREEDY.key), distance)


def small(store: Store) -> tuple[Known, Known, tuple[Prompt, ...]]:
    """Two prompts asked of a base and of a checkpoint: one answered alike, one not, whose check is lost."""
    base, other = known("dense"), known("small", 2e9, 0.005)
    prompts = (
        Prompt("capital", ({"role": "user", "content": "Capital of France?"},), ("facts",), {"contains": "Paris"}),
        Prompt("greeting", "Hello", ("chat",)),
    )
    for one in (base, other):
        store.meet(one)
    store.note(prompts)
    put(store, prompts[0], base, first := said("It is Paris."))
    put(store, prompts[0], other, said("It is Lyon."), base, far(first, 0.4))
    put(store, prompts[1], base, second := said("Hi."))
    put(store, prompts[1], other, second, base, far(second, 0.01))
    return base, other, prompts


def path(folder: Path) -> Path:
    return folder / "runs.sqlite"
