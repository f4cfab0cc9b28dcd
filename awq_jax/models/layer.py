"""What a decoder is and what each of its layers is: all in which families differ, and the layers of one, is data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from awq_jax.models.rope import Rope

Order = Literal["pre", "post", "sandwich", "parallel", "parallel of two norms"]


@dataclass(frozen=True)
class Norm:
    """Over the last axis: `x / rms(x) * scale`; `centred` takes the mean away first (a layer norm), `plus_one`
    multiplies by 1 + scale, `bias` adds one; not `scaled` it has no params."""

    eps: float = 1e-6
    centred: bool = False
    plus_one: bool = False
    bias: bool = False
    scaled: bool = True


@dataclass(frozen=True)
class Experts:
    """Of `n` gated MLPs of `width` each token takes the `top` most likely, weighed by the softmax over all of them, or
    over those that were chosen (`renormalised`).

    Args:
      shared: width of one more that every token takes, 0 for none; `shared_gate` weighs it by a sigmoid.
      sigmoid: scores are sigmoids of the logits rather than their softmax.
      corrected: what is added to the scores for the choice alone is a param.
      groups, top_groups, best: of `groups` equal ones only those with the `top_groups` largest sums of their `best`
        scores are chosen from.
      scale: multiplies the weights.
    """

    n: int
    top: int
    width: int
    renormalised: bool = True
    shared: int = 0
    shared_gate: bool = False
    sigmoid: bool = False
    corrected: bool = False
    groups: int = 1
    top_groups: int = 1
    best: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.top > self.n or self.n % self.groups or self.top_groups > self.groups:
            raise ValueError(f"{self.top} of {self.n} experts from {self.top_groups} of {self.groups} groups.")


@dataclass(frozen=True)
class Latent:
    """Attention of DeepSeek-V2 (arXiv 2405.04434): q from `q_rank` numbers (None: from the input), k and v of all
    heads from `kv_rank`; the rotated channels of k are the same in each head. v has `value_dim` channels a head."""

    q_rank: int | None
    kv_rank: int
    value_dim: int


@dataclass(frozen=True)
class Layer:
    """Everything that a block is told beside its params; equal layers share one compiled program.

    Args:
      order: where the norms are: before attention and MLP ("pre"), after them ("post"), both ("sandwich"); or
        attention and MLP read the same input ("parallel"), each through a norm of its own or not.
      rope: None rotates nothing.
      window: row i sees the keys i - window + 1 .. i only; None sees all before it.
      attention_scale: of q k'; None for head_dim ** -0.5.
      attention_cap: scores s become cap * tanh(s / cap).
      qk_norm: norms of q and k, over each head or over all heads.
      biases: which of the linears "q", "k", "v", "o", "gate", "up", "down" add one; fused ones "qkv", "gate_up"; both
        that make less of x in latent attention are "a".
      fused_qkv: q, k and v are one matrix: their columns one after the other, or those of each head together.
      fused_mlp: gate and up are one matrix.
      gated: the MLP is `act(gate) * up` rather than `act(up)`.
      experts: in place of the MLP.
      residual: multiplies what is added to the residual stream.
      clip_qkv: q, k and v are kept within it.
      latent: how q, k and v are made of less, if they are.

    Raises:
      ValueError: sizes that do not fit together.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm: Norm = Norm()
    order: Order = "pre"
    rope: Rope | None = None
    window: int | None = None
    attention_scale: float | None = None
    attention_cap: float | None = None
    qk_norm: Literal["head", "all"] | None = None
    biases: frozenset[str] = frozenset()
    fused_qkv: Literal["together", "by head"] | None = None
    fused_mlp: bool = False
    act: str = "silu"
    gated: bool = True
    experts: Experts | None = None
    residual: float = 1.0
    clip_qkv: float | None = None
    latent: Latent | None = None

    @property
    def value_dim(self) -> int:
        """Channels of v a head."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide by {self.kv_heads} key-value heads.")
        if self.fused_qkv == "by head" and self.heads != self.kv_heads:
            raise ValueError(f"{self.heads} heads and {self.kv_heads} key-value heads in one matrix by head.")


@dataclass(frozen=True)
class Config:
    """A decoder; `dtype` is what the embeddings are cast to and so what all is computed in.

    Args:
      norm: the last one, before the head.
      tied: the head is the embedding.
      embed_scale, logit_scale, logit_cap: multiply embeddings and logits; logits y become cap * tanh(y / cap).
      learned: rows of an embedding of positions, 0 for none; that of position p is row p + `learned_from`.
      positions: those that it was trained for, None where that is not known.
    """

    vocab: int
    layers: tuple[Layer, ...]
    norm: Norm = Norm()
    tied: bool = False
    head_bias: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    learned: int = 0
    learned_from: int = 0
    dtype: Any = jnp.float32
    positions: int | None = None

    @property
    def width(self) -> int:
        return self.layers[0].width
