"""The survey of a function that streams: what each group of sites does alone, as if all params were in memory."""

import jax
import numpy as np
from blocks import MATRICES, X, mixed
from loose import loose
from quick import quick_compilation

import awq_jax as awq
from awq_jax.search import Grid, no_clip, to_nearest
from awq_jax.transforms.mixed_bits import quantized_alone
from awq_jax.transforms.survey import survey

QUICK = awq.Recipe(group_size=32, scale=Grid((0.0, 1.0)), clip=no_clip, rounding=to_nearest)
PARAMS = {f"layers_{k}": w for k, w in enumerate(MATRICES)}


@loose
def skipping(params, x):
    """What enters the second layer is added to what leaves the third."""
    a, b, c, d = (params[name] for name in PARAMS)
    kept = mixed(a, x)
    return mixed(d, mixed(c, mixed(b, kept)) + kept)


def test_each_group_does_what_it_does_to_the_whole_function():
    with quick_compilation():
        written = {}
        exact, found = survey(skipping, PARAMS, [(X,), (2 * X,)], QUICK, written.__setitem__)
        calibration = awq.calibrate(skipping, PARAMS, [(X,), (2 * X,)])
        run = jax.jit(skipping)
        expected = run(PARAMS, X)
        np.testing.assert_allclose(exact[0], expected, rtol=1e-5)
        whole = dict(quantized_alone(PARAMS, calibration, QUICK))
        assert [group.sites for group, _ in found] == [(name,) for name in PARAMS]
        for group, (changed,) in found:
            alone = np.asarray(run(whole[group], X))
            assert np.abs(alone - expected).max() > 0
            np.testing.assert_allclose(changed, alone, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, written, PARAMS)
