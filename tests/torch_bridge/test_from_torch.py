import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import awq_jax as awq
from awq_jax.errors import InputError
from awq_jax.torch_bridge.meta import without_weights


class Block(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32, dtype=dtype)
        self.up, self.down = nn.Linear(32, 64, dtype=dtype), nn.Linear(64, 32, bias=False, dtype=dtype)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("kept", torch.tensor(2.0, dtype=dtype))
        self.register_buffer("constant", torch.full((32,), 3.0, dtype=dtype), persistent=False)

    def forward(self, x, scale=1, shift=None):
        y = self.drop(self.down(torch.relu(self.up(self.norm(x))))) * self.kept * self.constant * scale
        return {"out": y if shift is None else y + shift, "mean": (y.mean(), [y.sum(-1)])}


@pytest.fixture(scope="module")
def block():
    module = Block()
    x = torch.randn(2, 5, 32)
    return module, x, *awq.from_torch(module, x)


def close(got, want, tol=1e-5):
    np.testing.assert_allclose(np.asarray(got, np.float32), want.detach().float().numpy(), rtol=tol, atol=tol)


def test_outputs_keep_their_structure_and_training_is_off(block):
    module, x, fn, params = block
    got, want = jax.jit(fn)(params, x.numpy()), module.eval()(x)
    close(got["out"], want["out"])
    close(got["mean"][0], want["mean"][0])
    close(got["mean"][1][0], want["mean"][1][0])


def test_params_have_the_names_of_the_state_dict(block):
    module, _, _, params = block
    assert list(params) == list(module.state_dict())
    assert params["up.weight"].shape == (64, 32)


def test_linears_are_sites_and_folds_are_found(block):
    _, x, fn, params = block
    found = awq.sites(fn, params, x.numpy())
    assert list(found.sites) == ["up.weight", "down.weight"]
    assert [(s.in_features, s.out_features) for s in found.sites.values()] == [(32, 64), (64, 32)]
    assert len(found.folds) == 2


def test_other_shapes_are_traced_when_they_come(block):
    module, _, fn, params = block
    x = torch.randn(3, 32)
    close(fn(params, x.numpy())["out"], module.eval()(x)["out"])


def test_what_is_traced_within_jit_serves_later_calls():
    """Its constants are arrays, not tracers of a function that has ended."""
    module = Block()
    fn, params = awq.from_torch(module, torch.zeros(2, 32))
    x = torch.randn(3, 32)
    for call in (jax.jit(fn), fn, jax.jit(lambda *args: fn(*args))):
        close(call(params, x.numpy())["out"], module.eval()(x)["out"])


def test_params_follow_what_is_given(block):
    """They are arguments, nothing of them is kept inside, buffers of the state_dict neither."""
    _, x, fn, params = block
    once = fn(params, x.numpy())["out"]
    twice = fn(params | {"kept": params["kept"] * 2}, x.numpy())["out"]
    np.testing.assert_allclose(twice, once * 2, rtol=1e-6)


def test_the_module_is_left_alone():
    module = Block().train()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    _, params = awq.from_torch(module, torch.zeros(2, 32))
    assert module.training
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    module.up.weight.data.zero_()
    assert np.asarray(params["up.weight"]).any()


def test_without_weights(block):
    """On the meta device params are shapes, and the function is the same."""
    module, x, _, params = block
    with without_weights():
        bare = Block()
    fn, shapes = awq.from_torch(bare, jax.ShapeDtypeStruct(x.shape, jnp.float32))
    assert all(isinstance(s, jax.ShapeDtypeStruct) for name, s in shapes.items() if name != "kept")
    assert {name: s.shape for name, s in shapes.items()} == {name: p.shape for name, p in params.items()}
    close(fn(params, x.numpy())["out"], module.eval()(x)["out"])


def test_half_precision():
    module, x = Block(torch.bfloat16), torch.randn(4, 32).bfloat16()
    fn, params = awq.from_torch(module, x)
    got = fn(params, jnp.asarray(x.float().numpy(), jnp.bfloat16))["out"]
    assert got.dtype == jnp.bfloat16
    close(got, module.eval()(x)["out"], 0.05)


def test_arguments_by_name_and_fixed_ones():
    module, x = Block().eval(), torch.randn(2, 32)
    fn, params = awq.from_torch(module, x, scale=2, shift=x)
    close(fn(params, x.numpy(), shift=x.numpy())["out"], module(x, 2, x)["out"])
    close(fn(params, x.numpy(), scale=2, shift=x.numpy())["out"], module(x, 2, x)["out"])
    with pytest.raises(InputError, match=r"traced for \(array, scale=2, shift=array\).*scale=3"):
        fn(params, x.numpy(), scale=3, shift=x.numpy())
    with pytest.raises(InputError, match=r"called with \(array, scale=2\)"):
        fn(params, x.numpy())
    with pytest.raises(InputError, match=r"Input 0 is of int32: the module was traced for float32"):
        fn(params, np.zeros((2, 32), np.int32), shift=x.numpy())


def test_tied_weights_are_one_param():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    module, ids = Tied(), torch.tensor([[1, 2]])
    fn, params = awq.from_torch(module, np.array([[1, 2]], np.int32))
    assert list(params) == ["embed.weight"]
    close(fn(params, ids.numpy().astype(np.uint8)), module(ids))


def test_quantized_and_streamed_it_is_as_any_function(block):
    module, x, fn, params = block
    recipe = awq.Recipe(group_size=32)
    quantized, report = awq.quantize(params, awq.calibrate(fn, params, [(x.numpy(),)]), recipe)
    streamed = awq.stream(fn, params, [(x.numpy(),)], recipe)
    assert [r.name for r in report] == [r.name for r in streamed.reports]
    want = module.eval()(x)["out"].detach().numpy()
    for found in (quantized, streamed.params):
        got = awq.quantized(fn)(found, x.numpy())["out"]
        assert 0 < np.linalg.norm(got - want) < 0.2 * np.linalg.norm(want)


class Outer(nn.Module):
    def __init__(self, forward):
        super().__init__()

        class Inner(nn.Module):
            def forward(self, x):
                return forward(x)

        self.part = Inner()

    def forward(self, x):
        return self.part(x)


def test_an_unknown_operation_is_named_with_its_module():
    with pytest.raises(InputError, match=r"_fft_r2c.* \(in part\).*table"):
        awq.from_torch(Outer(lambda x: torch.fft.rfft(x).real), torch.zeros(4))


def test_shapes_that_depend_on_values_are_named_with_their_module():
    with pytest.raises(InputError, match=r"part: torch's index.Tensor gives as many elements as values say"):
        awq.from_torch(Outer(lambda x: x[x > 0]), torch.zeros(4))


def test_a_branch_on_values_is_named_with_its_module():
    with pytest.raises(InputError, match=r"part \(test_from_torch.py:\d+\): torch.export cannot trace this"):
        awq.from_torch(Outer(lambda x: x if x.sum() > 0 else -x), torch.zeros(3))


def test_dtypes_that_jax_would_round_are_refused():
    with pytest.raises(InputError, match=r"weight is of torch.float64.*model.float"):
        awq.from_torch(nn.Linear(2, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
    with pytest.raises(InputError, match=r"torch.float8_e4m3fn has no counterpart"):
        awq.from_torch(nn.Linear(2, 2).to(torch.float8_e4m3fn), torch.zeros(1, 2))


def test_integers_beyond_32_bits_are_refused():
    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("big", torch.tensor([2**40]), persistent=False)

        def forward(self, x):
            return x + self.big

    with pytest.raises(InputError, match=r"big holds integers beyond int32"):
        awq.from_torch(Big(), torch.zeros(1, dtype=torch.int64))


def test_lost_buffers_are_named():
    with torch.device("meta"):
        module = Block()
    with pytest.raises(InputError, match=r"constant is a buffer on the meta device.*without_weights"):
        awq.from_torch(module, torch.zeros(2, 32))


def test_no_module():
    with pytest.raises(InputError, match=r"given a function: give a torch.nn.Module"):
        awq.from_torch(lambda x: x, torch.zeros(1))


def test_torch_is_imported_only_when_a_module_is_traced():
    code = """
import sys
import awq_jax as awq
assert "torch" not in sys.modules
sys.modules["torch"] = None
try:
    awq.from_torch(None)
except ValueError as e:
    assert "pip install 'awq-jax[torch]'" in str(e), e
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_modules_without_weights_keep_their_ties():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

    with without_weights():
        module = Tied()
    assert module.head.weight is module.embed.weight
    assert module.head.weight.is_meta
