"""Models of other people's packages, streamed: their statistics are those of the whole function to the bit."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from public_models import PUBLIC
from quick import quick_compilation

import awq_jax as awq
from awq_jax.tracing.program import slot
from awq_jax.tracing.segments import segments


@pytest.mark.parametrize(("name", "counts"), [("attnax_decoder", (3, 3)), ("equimo_vit", (6, 6))])
def test_a_public_model_streams(name, counts):
    model = PUBLIC[name]()
    batches, seen = [model.inputs(k) for k in range(2)], []
    found = segments(model.fn, model.params, *batches[0])
    assert (len(found.segments), len(found.programs)) == counts
    with quick_compilation():
        awq.stream(model.fn, model.params, batches, solve=lambda p, calibration, r: (p, seen.append(calibration) or ()))
        whole = awq.calibrate(model.fn, model.params, batches)
    names = [{slot(k): p.name for k, p in enumerate(s.params)} for s in found.segments]
    assert {of[site] for of, c in zip(names, seen, strict=True) for site in c.traced.sites} == {*whole.traced.sites}
    for of, calibration in zip(names, seen, strict=True):
        for site in calibration.traced.sites:
            jax.tree.map(np.testing.assert_array_equal, calibration.of(site), whole.of(of[site]))
