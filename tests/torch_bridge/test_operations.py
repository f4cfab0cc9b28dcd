"""Operations against torch, all of them in one module, so that it is traced once."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import awq_jax as awq
from awq_jax.torch_bridge.operations.table import TABLE

X, Y = (torch.randn(3, 4, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
N = torch.tensor([[3, -2, 7, 0], [1, 5, -4, 2], [6, -1, 2, 9]])
B = torch.tensor([[True, False, True, True], [False, False, True, False], [False, False, False, False]])
H = X.bfloat16()
Q, K, V = (torch.randn(2, h, 5, 4, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 1))
PLACES = torch.tensor([2, 0])

CASES = {
    "integers are divided as floats": lambda x, y, n, b, h: n / 4,
    "integers are divided downwards": lambda x, y, n, b, h: n // 4,
    "truncating division of integers": lambda x, y, n, b, h: torch.div(n, 4, rounding_mode="trunc"),
    "remainder has the sign of the divisor": lambda x, y, n, b, h: n % 4,
    "fmod has the sign of the dividend": lambda x, y, n, b, h: torch.fmod(n, 4),
    "integers and floats are compared as floats": lambda x, y, n, b, h: n > 0.5,
    "a scalar tensor does not widen": lambda x, y, n, b, h: h * y.sum(),
    "half and single make single": lambda x, y, n, b, h: h + y,
    "truth values are counted": lambda x, y, n, b, h: b.sum(-1) + b.cumsum(-1).sum(),
    "the mean of half precision": lambda x, y, n, b, h: h.mean(-1),
    "integers' square root is a float": lambda x, y, n, b, h: n.abs().sqrt(),
    "powers": lambda x, y, n, b, h: torch.stack([x**2, x**3, 2.0**x, x.abs() ** 0.5]),
    "round half to even": lambda x, y, n, b, h: (n / 2).round(),
    "clamp": lambda x, y, n, b, h: x.clamp(-0.5) + x.clamp(max=y),
    "activations": lambda x, y, n, b, h: torch.stack(
        [f(x) for f in (F.gelu, F.silu, F.softplus, F.elu, F.relu6, F.mish)]
    ),
    "gelu by tanh": lambda x, y, n, b, h: F.gelu(x, approximate="tanh"),
    "softmax to single": lambda x, y, n, b, h: F.softmax(h, -1, dtype=torch.float32),
    "variance": lambda x, y, n, b, h: x.var(-1) + x.var(-1, unbiased=False) + torch.var(x, False),
    "norm": lambda x, y, n, b, h: x.norm(dim=-1) + x.norm(p=1, dim=-1),
    "narrow integers and halves are summed as wide ones": lambda x, y, n, b, h: torch.stack(
        [
            f(z, 0).sum()
            for z in ((n * 99).to(torch.int8), n.abs().to(torch.uint8))
            for f in (torch.cumsum, torch.cumprod)
        ]
        + [torch.full((300,), 1.0).bfloat16().cumsum(0)[-1], torch.full((9, 2), 99).to(torch.int8).prod(1).sum()]
    ),
    "largest and where": lambda x, y, n, b, h: x.max(-1).values + x.max(-1).indices,
    "top": lambda x, y, n, b, h: x.topk(2).values + x.topk(2, largest=False).indices,
    "sorted": lambda x, y, n, b, h: x.sort(descending=True).indices + torch.argsort(x, dim=0),
    "counted": lambda x, y, n, b, h: torch.histc(n.float(), bins=4, min=0, max=3),
    "slices": lambda x, y, n, b, h: x[:, 1:-1:1] + x[-3:, ::2],
    "a slice beyond the end is empty": lambda x, y, n, b, h: x[5:].sum() + x[2:9].sum(),
    "padded and cut": lambda x, y, n, b, h: F.pad(x, (1, -2, 0, 1), value=3.0),
    "squeezed": lambda x, y, n, b, h: x[None, :, None].squeeze(0).expand(-1, 2, -1),
    "split": lambda x, y, n, b, h: x.split([1, 3], -1)[1] * x.chunk(2, 1)[0][:, :1] * x.unbind(1)[0][:, None],
    "repeated": lambda x, y, n, b, h: x.repeat(2, 2) + x.repeat_interleave(2, 1).tile(2, 1),
    "rolled and flipped": lambda x, y, n, b, h: x.roll(1, 0) + x.roll(2) + x.flip(0, 1),
    "unfolded": lambda x, y, n, b, h: x.unfold(1, 2, 1),
    "triangles": lambda x, y, n, b, h: x.tril(-1) + x.triu(1),
    "joined to the wider dtype": lambda x, y, n, b, h: torch.cat([h, x, n], 1),
    "indexed": lambda x, y, n, b, h: x[PLACES] + x[:, PLACES].T.sum() + x[[[0], [1]], [0, 3, 1, 2]],
    "negative indices": lambda x, y, n, b, h: x[torch.tensor([-1, 0])],
    "gathered from a part": lambda x, y, n, b, h: x.gather(1, PLACES[:, None]),
    "scattered": lambda x, y, n, b, h: x.scatter(1, PLACES[:, None], 9.0) + x.scatter_add(1, PLACES[:, None], y),
    "written in place": lambda x, y, n, b, h: _written(x.clone(), y),
    "masked": lambda x, y, n, b, h: x.masked_fill(b, -1.0) + torch.where(b, x, 0.0) + x.masked_scatter(b, y),
    "index_add": lambda x, y, n, b, h: x.index_add(0, PLACES, y[:2], alpha=2),
    "matmuls": lambda x, y, n, b, h: x @ y.T + torch.addmm(x[:, :3], x, y.T, beta=2, alpha=3),
    "einsum": lambda x, y, n, b, h: torch.einsum("ij,kj->ki", x, y),
    "complex": lambda x, y, n, b, h: torch.view_as_real(
        torch.polar(x.abs(), y) * torch.view_as_complex(x.reshape(6, 2))[:4]
    ),
    "layer norm": lambda x, y, n, b, h: F.layer_norm(x, (4,), y[0], y[1]) + F.layer_norm(h, (4,)),
    "rms norm": lambda x, y, n, b, h: F.rms_norm(x, (4,), y[0], 1e-3) + F.rms_norm(x, (4,)),
    "group norm": lambda x, y, n, b, h: F.group_norm(x[None], 3, y[:, 0], y[:, 1]),
    "convolution": lambda x, y, n, b, h: F.conv1d(
        x[None].repeat(1, 2, 1), y[:, :2, None].repeat(2, 1, 3), None, 2, 1, 1, 3
    ),
    "transposed convolution": lambda x, y, n, b, h: F.conv_transpose1d(
        x[None], y[:, :2, None].repeat(1, 1, 3), stride=2
    ),
    "pooled": lambda x, y, n, b, h: F.adaptive_avg_pool1d(x, 2) + F.avg_pool1d(x, 2, padding=1, stride=3),
    "pooled to the largest": lambda x, y, n, b, h: F.max_pool2d(x[None], 2, 1, 1),
    "causal attention": lambda x, y, n, b, h: F.scaled_dot_product_attention(Q, K, K, is_causal=True, enable_gqa=True),
    "a query that sees no key": lambda x, y, n, b, h: F.scaled_dot_product_attention(x, x[:3], y, b[:, :3]),
    "attention with a bias": lambda x, y, n, b, h: F.scaled_dot_product_attention(Q, Q, V, Q @ Q.mT, scale=0.3),
    "counting": lambda x, y, n, b, h: torch.arange(1, 9, 2) * 2 + torch.arange(4) + torch.linspace(0, 1, 4),
    "made like another": lambda x, y, n, b, h: torch.ones_like(h) + n.new_full((3, 4), 2) + torch.eye(3, 4),
    "classes": lambda x, y, n, b, h: F.one_hot(n.abs(), 10) + torch.bucketize(x, y[0].sort().values)[..., None],
}


def _written(x, y):
    x[:, 1:3] = y[:, :2]
    x[0] += 1
    x[1, PLACES] = 5.0
    return x


class Cases(torch.nn.Module):
    def forward(self, *inputs):
        return {name: case(*inputs) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def both():
    inputs = (X, Y, N, B, H)
    fn, _ = awq.from_torch(Cases(), *inputs)
    arrays = [t.numpy() for t in (X, Y, N, B)] + [jax.numpy.asarray(X.numpy()).astype("bfloat16")]
    return fn({}, *arrays), Cases()(*inputs)


@pytest.mark.parametrize("name", CASES)
def test_as_in_torch(both, name):
    got, want = both[0][name], both[1][name]
    half = want.dtype == torch.bfloat16
    assert got.dtype == (str(want.dtype).removeprefix("torch.").replace("64", "32"))
    tol = 1e-2 if half else 1e-5
    np.testing.assert_allclose(np.asarray(got, np.float64), want.double().numpy(), rtol=tol, atol=tol)


def test_what_is_not_done_is_refused():
    """Each of these would need shapes that depend on values, or is not written; none may give something else."""
    for called, args in (("index", (X.numpy(), [B.numpy()])), ("linalg_vector_norm", (X.numpy(), 3))):
        with pytest.raises(NotImplementedError):
            TABLE[called].run(*args)
