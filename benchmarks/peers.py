"""Other projects' 4-bit matmuls for gpu_kernels.py: each made from a weight of ours, checked, or left out aloud.

A peer is a function without arguments that imports its project and gives a Peer, or raises with the reason why not.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
from gpu_record import reason

from awq_jax.formats.codecs import AUTOAWQ
from awq_jax.formats.quantized_writer import to_parts
from awq_jax.kernels import unpacked
from awq_jax.kernels.xla import dense as reference
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import QuantizedTensor, in_tiles, round_to_nearest


@dataclass(frozen=True)
class Peer:
    """`multiply(x, convert(w))` for x (m, k) in bfloat16 and a w of ours in groups of 128, in torch or in jax."""

    convert: Callable[[QuantizedTensor], Any]
    multiply: Callable[[Any, Any], Any]
    in_torch: bool = True


def parts(w: QuantizedTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (k, n) in uint8, scales and zero points (groups, n) in float32."""
    scales = np.asarray(w.scales, np.float32)
    zeros = np.full_like(scales, w.spec.middle) if w.zeros is None else np.asarray(w.zeros, np.float32)
    return np.asarray(unpacked(w)), scales, zeros


def torch_with_gpu() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    return torch


def torch_tinygemm() -> Peer:
    torch = torch_with_gpu()

    def convert(w: QuantizedTensor) -> Any:
        q, s, z = parts(w)
        q = torch.from_numpy(np.ascontiguousarray(q.T)).cuda()
        steps = torch.from_numpy(np.stack([s, (8 - z) * s], -1)).to(torch.bfloat16).cuda()
        return torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8), steps

    return Peer(convert, lambda x, w: torch.ops.aten._weight_int4pack_mm(x, w[0], 128, w[1]))


def gemlite() -> Peer:
    torch = torch_with_gpu()
    from gemlite.helper import A16W4_HQQ_INT

    def convert(w: QuantizedTensor) -> Any:
        q, s, z = (torch.from_numpy(np.ascontiguousarray(a.T)).cuda() for a in parts(w))
        columns = lambda a: a.reshape(-1, 1).to(torch.bfloat16)
        return A16W4_HQQ_INT(device="cuda:0", dtype=torch.bfloat16).from_weights(q, columns(s), columns(z))

    return Peer(convert, lambda x, w: w(x))


def humming() -> Peer:
    torch = torch_with_gpu()
    from humming.layer import HummingLayer

    scheme = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}

    def convert(w: QuantizedTensor) -> Any:
        k, n = w.shape
        layer = HummingLayer(shape_n=n, shape_k=k, weight_config=scheme, torch_dtype=torch.bfloat16).cuda()
        layer.load_from_tensors({name: torch.from_numpy(a.copy()).cuda() for name, a in to_parts(AUTOAWQ, w).items()})
        layer.transform()
        return layer

    return Peer(convert, lambda x, w: w(inputs=x))


def tokamax() -> Peer:
    """It has no zero points: 8 stands in their place, which costs the same and is right for symmetric weights."""
    # Reads profiles, which nothing here makes, and weighs 30 MB.
    for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
        sys.modules.setdefault(name, MagicMock())
    import qwix
    from tokamax import ragged_dot

    def convert(w: QuantizedTensor) -> Any:
        q, s, _ = parts(w)
        return qwix.QArray(jnp.asarray(q.astype(np.int8) - 8, jnp.int4)[None], jnp.asarray(s, jnp.bfloat16)[None])

    return Peer(convert, lambda x, w: ragged_dot(x, w, group_sizes=jnp.array([len(x)], jnp.int32)), in_torch=False)


PEERS: Mapping[str, Callable[[], Peer]] = {
    "torch int4pack": torch_tinygemm,
    "gemlite": gemlite,
    "humming": humming,
    "tokamax": tokamax,
}


def usable(makers: Mapping[str, Callable[[], Peer]]) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that are here and multiply right, by name; and of the others why not."""
    found, left_out = {}, {}
    w = in_tiles(round_to_nearest(jax.random.normal(jax.random.key(1), (1024, 256)), QuantSpec(4, 128, symmetric=True)))
    x = jax.random.normal(jax.random.key(0), (16, w.shape[0]), jnp.bfloat16)
    expected = np.asarray(reference.matmul(x, w), np.float32)
    for name, make in makers.items():
        # Whatever another project raises is a reason, not the end of the benchmark.
        try:
            peer = make()
            y = peer.multiply(in_torch(x) if peer.in_torch else x, peer.convert(w))
            y = y.float().cpu().numpy() if peer.in_torch else np.asarray(y, np.float32)
            error = np.abs(y - expected).max() / np.abs(expected).max()
            if not error < 0.02:
                raise ArithmeticError(f"its product is off by {error:.2g} of the largest entry")
        except Exception as e:
            left_out[name] = reason(e)
            continue
        found[name] = peer
    return found, left_out


def copies(converted: Any, number: int) -> list[Any]:
    """A converted weight and copies of it in memory of their own: to convert each would take the host a minute."""
    return [converted, *(copy.deepcopy(converted) for _ in range(number - 1))]


def in_torch(x: jax.Array) -> Any:
    import torch

    return torch.from_numpy(np.asarray(x, np.float32)).to(torch.bfloat16).cuda()


def peer_seconds(peer: Peer, x: jax.Array, weights: list[Any], jax_seconds: Callable[..., float]) -> float:
    """The time of one matmul of x with each of the converted weights in turn."""
    if peer.in_torch:
        return torch_seconds(peer.multiply, in_torch(x), weights)
    return jax_seconds(peer.multiply, x, weights)


def torch_seconds(multiply: Callable[[Any, Any], Any], x: Any, weights: list[Any], repeats: int = 5) -> float:
    """The median time of one matmul in a CUDA graph that multiplies with each weight in turn, at least 8 times."""
    import torch

    chain = [weights[i % len(weights)] for i in range(max(len(weights), 8))]
    for w in chain[:3]:
        multiply(x, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for w in chain:
            multiply(x, w)
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:]) / len(chain)
