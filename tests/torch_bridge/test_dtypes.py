"""Single operations against torch over dtypes and values, among them each dtype's ends."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_jax.errors import InputError
from awq_jax.torch_bridge import operations as operations
from awq_jax.torch_bridge.graph import step
from awq_jax.torch_bridge.program import Program, Ref
from awq_jax.torch_bridge.values import array, dtype_of

aten = torch.ops.aten
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def both(op, *args, **kwargs):
    """What a call of one of torch's operations gives here and there; without an export, which takes a second."""
    graph, given = torch.fx.Graph(), {}

    def node(x):
        if isinstance(x, torch.Tensor):
            x, tensor = graph.placeholder(f"x{len(given)}"), x
            x.meta["val"], given[x.name] = tensor, array(x.name, tensor)
        return [node(part) for part in x] if isinstance(x, list) else x

    call = graph.call_function(op, tuple(map(node, args)), kwargs)
    call.meta["val"] = op(*args, **kwargs)
    (got,) = Program({}, {}, tuple(given), (step(call, ()),), (Ref(call.name),)).run({}, list(given.values()))
    return got, call.meta["val"]


def agree(op, *args, **kwargs):
    got, want = both(op, *args, **kwargs)
    # Of values and places, where equal values have any, the values.
    got, want = (got[0], want[0]) if isinstance(want, tuple) else (got, want)
    assert got.dtype == dtype_of(want.dtype)
    tol = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(want.dtype, 1e-5)
    np.testing.assert_allclose(np.asarray(got, np.float64), want.double().numpy(), rtol=tol, atol=tol)


def drawn(dtype, shape=(3, 4)):
    """Tensors of the dtype's values, an integer's ends among them."""
    if dtype == torch.bool:
        elements = st.booleans()
    elif dtype.is_floating_point:
        elements = st.sampled_from([-300.0, -3.5, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 7.5, 99.0, 300.0])
    else:
        ends = torch.iinfo(dtype)
        some = (ends.min, -40_000, -7, -1, 0, 1, 2, 3, 100, 40_000, ends.max)
        elements = st.sampled_from([n for n in some if max(ends.min, -40_000) <= n <= min(ends.max, 40_000)])
    n = int(np.prod(shape))
    return st.lists(elements, min_size=n, max_size=n).map(lambda x: torch.tensor(x).to(dtype).reshape(shape))


NUMBERS = {
    "cumsum": lambda x: (aten.cumsum.default, x, 1),
    "cumprod": lambda x: (aten.cumprod.default, x[:, :2], 1),
    "sum": lambda x: (aten.sum.dim_IntList, x, [0]),
    "prod": lambda x: (aten.prod.dim_int, x[:2], 0),
    "amax": lambda x: (aten.amax.default, x, [1]),
    "mul": lambda x: (aten.mul.Tensor, x, 3),
    "mul by a float": lambda x: (aten.mul.Tensor, x, 0.5),
    "div": lambda x: (aten.div.Tensor, x, 4),
    "lt": lambda x: (aten.lt.Tensor, x, x.flip(0)),
    "sign": lambda x: (aten.sign.default, x),
    "cat": lambda x: (aten.cat.default, [x, x.to(torch.float16)]),
    "masked_fill": lambda x: (aten.masked_fill.Scalar, x, x > 2, 1),
    "sort": lambda x: (aten.sort.default, x, 1, True),
    "smallest": lambda x: (aten.topk.default, x.int() if x.dtype == torch.bool else x, 2, 1, False),
}


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool, *FLOATS], ids=str)
def test_dtypes_and_values_are_those_of_torch(dtype):
    @settings(max_examples=4)
    @given(drawn(dtype))
    def check(x):
        for case in NUMBERS.values():
            agree(*case(x))

    check()


@given(
    drawn(torch.float32),
    st.integers(1, 5),
    st.sampled_from([(0, 0), (2, 2), (0, 2), (-0.7, 0.9), (-4, 7.5), (-300, 300)]),
)
@settings(max_examples=20)
def test_any_values_are_counted_in_any_bins(x, bins, ends):
    agree(aten.histc.default, x, bins, *ends)


NAN = float("nan")
EDGES = {
    "a half times what no half can hold": lambda: (aten.mul.Tensor, torch.tensor([0.0, 1.0]).half(), -1e9),
    "a norm of squares that no half can hold": lambda: (
        aten.linalg_vector_norm.default,
        torch.tensor([3e2, 4e2]).half(),
    ),
    "a mean of integers that no half can hold": lambda: (
        aten.mean.dim,
        torch.tensor([100_000, -90_000]),
        [0],
        False,
        torch.half,
    ),
    "from one end all the way to the other": lambda: (aten.lerp.Scalar, *torch.tensor([[6e4], [-1.5]]).half(), 1.0),
    "powers of two in half precision": lambda: (aten.exp2.default, torch.tensor([100.0]).bfloat16()),
    "sizes of complex numbers": lambda: (aten.abs.default, torch.tensor([3 + 4j])),
    "angles of real numbers": lambda: (aten.angle.default, torch.tensor([-1.0, -0.0, 0.0, 2.0])),
    "the sign of what is no number": lambda: (aten.sign.default, torch.tensor([NAN, -2.0])),
    "negative powers of integers": lambda: (aten.pow.Scalar, 2, torch.tensor([-3, 0, 5])),
    "powers of an integer's signs": lambda: (aten.pow.Tensor_Tensor, *torch.tensor([[1, -1, -1, 2], [-3, -3, -2, -1]])),
    "a half by what no half can hold": lambda: (aten.div.Tensor, torch.tensor([6e-5]).half(), 1e-9),
    "a half plus what no half can hold": lambda: (aten.add.Tensor, torch.tensor([-6e4]).half(), 7e4),
    "halves times a number in float32": lambda: (aten.mul.Tensor, torch.zeros(2).half(), torch.tensor(-1e9)),
    "a spread that is less than its square": lambda: (aten.std.correction, (torch.arange(9) * 1000).half(), [0]),
    "the one integer from one end": lambda: (aten.linspace.default, 2, 9, 1, torch.int32),
    "integers between": lambda: (aten.linspace.default, -2.5, 0, 50, torch.int32),
    "integers counted from one float to another": lambda: (aten.arange.start_step, 0.1, -7.9, -4.0, torch.int64),
}


@pytest.mark.parametrize("name", EDGES)
def test_as_torch_at_the_edges(name):
    op, *args = EDGES[name]()
    named = {"dtype": args.pop()} if isinstance(args[-1], torch.dtype) else {}
    agree(op, *args, **named)


def test_masks_of_uint8_are_refused():
    with pytest.raises(InputError, match=r"index.Tensor cannot be done.*a mask as an index"):
        both(aten.index.Tensor, torch.zeros(2), [torch.tensor([0, 1], dtype=torch.uint8)])
