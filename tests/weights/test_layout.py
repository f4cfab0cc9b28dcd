"""A View against numpy doing what it only notes down."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from awq_jax.tracing.primitives import STRUCTURAL
from awq_jax.tracing.view import View
from awq_jax.weights.layout import layout_of_json

SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).filter(lambda sizes: max(sizes) > 1)


def numbered(shape):
    return np.arange(math.prod(shape)).reshape(shape)


def factorings(n: int) -> list[tuple[int, ...]]:
    """Shapes of up to three axes with n elements."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [
        (n,),
        *((d, n // d) for d in divisors),
        *((d, e, n // d // e) for d in divisors for e in divisors if n // d % e == 0),
    ]


@st.composite
def moves(draw):
    """A shape, the array that some rearrangements make of its numbered elements, and its View."""
    shape = tuple(draw(SIZES))
    array, view = numbered(shape), View.of(shape)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["transpose", "reshape", "squeeze", "broadcast"]))
        if kind == "transpose":
            order = draw(st.permutations(range(array.ndim)))
            array, view = array.transpose(order), view.transpose(order)
        elif kind == "reshape":
            new = draw(st.sampled_from(factorings(array.size)))
            if view.reshape(new) is None:
                continue
            array, view = array.reshape(new), view.reshape(new)
        elif kind == "squeeze":
            ones = tuple(k for k, n in enumerate(array.shape) if n == 1)
            array, view = array.squeeze(ones), view.squeeze(ones)
        else:
            at = draw(st.integers(0, array.ndim))
            new = (*array.shape[:at], 1, *array.shape[at:])
            dimensions = [k for k in range(len(new)) if k != at]
            array, view = array.reshape(new), view.broadcast(new, dimensions)
    return shape, array, view


@given(moves())
def test_a_view_shows_what_numpy_makes(case):
    shape, array, view = case
    assert view.seen == array.shape
    np.testing.assert_array_equal(view.apply(numbered(shape)), array)


@given(moves())
def test_stacked_layers_stay_in_front(case):
    shape, array, view = case
    layers = np.stack([array, array + array.size, array + 2 * array.size])
    np.testing.assert_array_equal(view.apply(numbered((3, *shape))), layers)


@given(moves(), st.data())
def test_the_layout_of_a_matmul_is_its_matrices(case, data):
    shape, array, view = case
    axes = data.draw(st.permutations(range(array.ndim)))
    a, b = sorted(data.draw(st.lists(st.integers(0, array.ndim), min_size=2, max_size=2)))
    batch, contracted = axes[:a], axes[a:b]
    free = [k for k in range(array.ndim) if k not in (*batch, *contracted)]
    layout = view.layout(batch, contracted)
    expected = array.transpose(*batch, *contracted, *free)
    found = layout.apply(numbered(shape))
    *lead, i, o = found.shape
    assert (i, o) == tuple(math.prod(array.shape[k] for k in ks) for ks in (contracted, free))
    assert math.prod(lead) == math.prod(array.shape[k] for k in batch)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    np.testing.assert_array_equal(layout.undo(found), numbered(shape))


@given(moves(), st.data())
def test_a_layout_is_read_as_it_was_written(case, data):
    _, array, view = case
    axes = data.draw(st.permutations(range(array.ndim)))
    layout = view.layout(axes[:1], axes[1:2])
    assert layout_of_json(**json.loads(json.dumps(layout.as_json()))) == layout


OLD = [
    ('{"shape": [6, 4], "sizes": [6, 4], "order": [1, 0], "n_lead": 0, "n_in": 1, "stack": []}', (6, 4), (1, 0)),
    (
        '{"shape": [4, 1, 10], "sizes": [4, 2, 5], "order": [1, 2, 0], "n_lead": 0, "n_in": 2, "stack": [1]}',
        (4, 1, 10),
        (1, 2, 0),
    ),
]


@pytest.mark.parametrize(("written", "shape", "order"), OLD)
def test_layouts_written_before_atoms_had_axes_are_read(written, shape, order):
    layout = layout_of_json(**json.loads(written))
    assert json.loads(json.dumps(layout.as_json())) == json.loads(written)
    w = numbered(shape)
    np.testing.assert_array_equal(layout.apply(w), w.transpose(order).reshape(layout.seen))


@given(moves(), st.data())
def test_the_layout_of_a_shard_reads_a_piece_of_the_matrix(case, data):
    shape, array, view = case
    axes = data.draw(st.permutations(range(array.ndim)))
    layout = view.layout((), axes[:1])
    cut = data.draw(st.sampled_from(range(len(shape))))
    smallest = next((n for axis, n in layout.atoms if axis == cut), 1)
    pieces = tuple(smallest if k == cut else 1 for k in range(len(shape)))
    found = layout.cuts_of(tuple((("x", n),) if n > 1 else () for n in pieces))
    assert layout.cut(pieces).whole(pieces) == layout
    if found is not None:
        w, places = numbered(shape), [slice(n // p) for n, p in zip(shape, pieces, strict=True)]
        whole = np.asarray(layout.apply(w))
        piece = whole[tuple(slice(n // (smallest if cut else 1)) for n, cut in zip(whole.shape, found, strict=True))]
        np.testing.assert_array_equal(layout.cut(pieces).apply(w[tuple(places)]), piece)


@pytest.mark.parametrize(
    ("before", "after"),
    [((6,), (2, 3)), ((2, 3, 4), (6, 4)), ((2, 3, 4), (2, 12)), ((4, 6), (24,)), ((24,), (2, 3, 4)), ((1, 6), (6, 1))],
)
def test_heads_are_split_and_merged(before, after):
    assert View.of(before).reshape(after).seen == after


def test_a_cut_that_no_atom_has_is_refused():
    assert View.of((4, 3)).transpose((1, 0)).reshape((4, 3)) is None
    assert View.of((4, 6)).reshape((3, 8)) is None


def test_repeating_is_no_rearrangement():
    assert View.of((1, 4)).broadcast((3, 4), (0, 1)) is None
    assert View.of((4,)).broadcast((3, 4), (1,)) is None


OPERATIONS = {
    "transpose": lambda w: w.transpose(2, 0, 1),
    "reshape": lambda w: w.reshape(6, 4),
    "squeeze": lambda w: lax.squeeze(w[None], (0,)),
    "expand": lambda w: w[:, None],
    "cast": lambda w: w.astype(jnp.bfloat16),
    "copy": lambda w: jnp.copy(w),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_primitives_of_jax_are_known(name):
    shape = (2, 3, 4)
    view = View.of(shape)
    closed = jax.make_jaxpr(OPERATIONS[name])(jax.ShapeDtypeStruct(shape, jnp.float32))
    assert closed.eqns
    for eqn in closed.eqns:
        view = STRUCTURAL[eqn.primitive.name](view, eqn.params)
    np.testing.assert_array_equal(view.apply(numbered(shape)), OPERATIONS[name](numbered(shape)).astype(np.float32))
