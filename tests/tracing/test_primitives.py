"""Matmuls in normal form against jax's own, and structural primitives on what is seen against numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from awq_jax.tracing.folds.unknowns import Scaled
from awq_jax.tracing.primitives import STRUCTURAL, matmul
from awq_jax.tracing.view import View


def numbered(*shape):
    return jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape) % 7


MATMULS = {
    "a matrix": (lambda x, w: x @ w, (2, 3, 4), (4, 5)),
    "heads": (lambda x, w: jnp.einsum("btnd,ndo->bto", x, w), (2, 3, 4, 5), (4, 5, 6)),
    "experts": (lambda x, w: jnp.einsum("etx,ezx->tez", x, w), (2, 3, 4), (2, 5, 4)),
    "1 x 1": (lambda x, w: lax.conv(x, w, (2, 1), "VALID"), (2, 4, 5, 3), (6, 4, 1, 1)),
    "1 x 1, channels last": (
        lambda x, w: lax.conv_general_dilated(x, w, (1, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (2, 5, 3, 4),
        (1, 1, 4, 6),
    ),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", MATMULS)
def test_the_normal_form_is_the_matmul(name, which):
    fn, *shapes = MATMULS[name]
    operands = [numbered(*shape) for shape in shapes]
    jaxpr = jax.make_jaxpr(fn)(*operands)
    (eqn,) = (e for e in jaxpr.eqns if e.primitive.name in ("dot_general", "conv_general_dilated"))
    operands = [operands[jaxpr.jaxpr.invars.index(v)] for v in eqn.invars]
    m = matmul(eqn.primitive.name, eqn.params, [v.aval.shape for v in eqn.invars], which)
    if m is None:
        assert name.startswith("1 x 1")
        assert which == 0
        return
    rows, matrices = np.asarray(m.rows(operands[1 - m.w])), np.asarray(m.matrices(operands[m.w]))
    batch, tokens = rows.shape[: len(m.batch)], rows.shape[len(m.batch) : len(m.batch) + len(m.tokens)]
    free = matrices.shape[len(m.batch) : len(m.batch) + len(m.w_free)]
    flat = lambda a, outer: a.reshape(math.prod(batch), math.prod(outer), -1)
    product = np.einsum("bti,bfi->btf", flat(rows, tokens), flat(matrices, free)).reshape(*batch, *tokens, *free)
    expected = eqn.primitive.bind(*operands, **eqn.params)
    np.testing.assert_array_equal(product.transpose(m.order), expected)


def test_sorted_rows_read_the_matrix_of_their_group():
    x, w, sizes = numbered(6, 4), numbered(2, 4, 5), jnp.array([2, 4])
    (eqn,) = jax.make_jaxpr(lax.ragged_dot)(x, w, sizes).eqns
    m = matmul(eqn.primitive.name, eqn.params, [v.aval.shape for v in eqn.invars])
    assert m is not None
    assert m.grouped
    rows, matrices = np.asarray(m.rows(x)), np.asarray(m.matrices(w))
    found = np.concatenate([rows[:2] @ matrices[0].T, rows[2:] @ matrices[1].T])
    np.testing.assert_array_equal(found, lax.ragged_dot(x, w, sizes))


MOVES = {
    "transpose": lambda a: a.transpose(2, 0, 1),
    "reshape": lambda a: a.reshape(6, 4),
    "squeeze": lambda a: lax.squeeze(a[None], (0,)),
    "broadcast_in_dim": lambda a: a[:, None],
    "slice": lambda a: a[1:2],
    "convert_element_type": lambda a: a.astype(jnp.bfloat16),
    "copy": jnp.copy,
    "name": lambda a: checkpoint_name(a, "a"),
}


@pytest.mark.parametrize("name", MOVES)
def test_one_entry_moves_a_param_and_its_scales(name):
    a = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)
    eqns = jax.make_jaxpr(MOVES[name])(a).eqns
    assert name in [e.primitive.name for e in eqns]
    view, scaled = View.of(a.shape), Scaled(np.asarray(a), a.shape)
    for e in eqns:
        view, scaled = (STRUCTURAL[e.primitive.name](seen, e.params) for seen in (view, scaled))
    expected = np.asarray(MOVES[name](a), np.float32)
    np.testing.assert_array_equal(scaled.ids, expected)
    assert scaled.shape == view.seen == expected.shape
