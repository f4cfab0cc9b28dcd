import jax
import numpy as np
import pytest
from compilations import compilations


def test_a_function_is_counted_once_a_shape_under_its_own_name():
    @jax.jit
    def inner(x):
        return x + 1

    @jax.jit
    def outer(x):
        return inner(x) * 2

    two, three = np.ones(2, np.float32), np.ones(3, np.float32)
    with compilations() as compiled:
        outer(two), outer(two), outer(three)
    assert compiled == {"outer": 2}


def test_a_fresh_jit_at_each_call_shows():
    def step(x):
        return x + 1

    x = np.ones(2, np.float32)
    with compilations() as compiled:
        for scale in (1.0, 2.0):
            jax.jit(lambda x, scale=scale: step(x) * scale)(x)
    assert compiled == {"<lambda>": 2}


def test_counting_stops_with_the_block_even_on_an_error():
    @jax.jit
    def step(x):
        return x + 1

    def failing_block():
        with compilations() as compiled:
            seen.append(compiled)
            raise RuntimeError

    seen = []
    with pytest.raises(RuntimeError):
        failing_block()
    step(np.ones(2, np.float32))
    assert seen == [{}]
