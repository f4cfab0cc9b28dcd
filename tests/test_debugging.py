"""jax's settings for finding mistakes find none here: NaNs, leaked tracers, transfers that nobody asked for."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_of, hf_config, random_params

import awq_jax as awq
from awq_jax.models.generate import generate
from awq_jax.search.solve import solve

KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"layers": jax.random.normal(KEYS[0], (2, 64, 64)), "head": jax.random.normal(KEYS[1], (64, 32))}
X = jax.random.normal(KEYS[2], (48, 64)).at[:, 3].set(0.0)
RECIPE = awq.Recipe(group_size=32, scales="both")


def fn(params, x):
    return jax.lax.scan(lambda x, w: (x + jax.nn.relu(x @ w), None), x, params["layers"])[0] @ params["head"]


@pytest.mark.parametrize("setting", [jax.debug_nans, jax.debug_infs])
def test_nothing_is_nan_or_infinite_on_the_way(setting):
    dead = PARAMS | {"head": jnp.zeros((64, 32))}
    with setting(True):
        for params in (PARAMS, dead):
            small, _ = awq.quantize(params, awq.calibrate(fn, params, [(X,)]), RECIPE)
            assert jnp.isfinite(jax.jit(awq.quantized(fn))(small, X)).all()


SETTINGS = {"leaks": jax.checking_leaks, "nans": lambda: jax.debug_nans(True)}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("preset", ["default", "fast", "rtn"])
def test_no_tracer_leaks_and_nothing_is_nan_with_any_preset(preset, setting):
    with SETTINGS[setting]():
        small, _ = awq.quantize(PARAMS, awq.calibrate(fn, PARAMS, [(X,)]), replace(awq.PRESETS[preset], group_size=32))
        jax.jit(jax.grad(lambda x: awq.quantized(fn)(small, x).sum()))(X)
        if preset == "rtn":
            awq.distill(fn, PARAMS, small, [(X,)])


@pytest.mark.parametrize("setting", SETTINGS)
def test_generation_leaks_no_tracers_and_no_nans(setting):
    config = config_of(hf_config())
    with SETTINGS[setting]():
        generate(config, random_params(config), np.zeros((1, 3), np.int32), max_new_tokens=4)


def test_what_runs_often_moves_nothing_between_host_and_device():
    calibration = awq.calibrate(fn, PARAMS, [(X,)])
    small, _ = awq.quantize(PARAMS, calibration, replace(awq.PRESETS["rtn"], group_size=32))
    step = jax.jit(lambda params, x: awq.with_moments(fn, calibration.traced)(params, x)[1])
    w, spec, recipe = PARAMS["head"], awq.QuantSpec(4, 32), awq.Recipe()
    with jax.transfer_guard("disallow"):
        jax.jit(awq.quantized(fn))(small, X)
        step(PARAMS, X)
        solve(w, calibration.of("head"), spec=spec, clip=recipe.clip, rounding=recipe.rounding)
        awq.prepare(small)
