"""transformers' families as JAX functions: torch's logits, all linears found, folds that change nothing."""

import pytest
from hf_families import FAMILIES, bridged, refolded

import awq_jax as awq

QUICK = ("gpt2", "olmoe", "t5")
"""As different as can be: fused and tied, with experts, two stacks."""
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in (*QUICK, "dbrx")]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_family(name):
    found = bridged(name)
    assert found.error < 1e-5
    traced = awq.sites(found.fn, found.params, *found.inputs)
    missed = {linear for linear, param in found.linears.items() if param not in traced.sites}
    assert not {linear for linear in missed if "visual." not in linear}
    assert traced.folds
    assert found.apart(refolded(found, traced)) < 1e-5


@pytest.mark.slow
def test_a_family_that_branches_on_values_is_refused_by_name():
    with pytest.raises(ValueError, match=r"ffn.experts \(modeling_dbrx.py:\d+\): torch.export cannot trace this"):
        bridged("dbrx")
