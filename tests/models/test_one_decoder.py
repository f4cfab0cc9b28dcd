"""The decoder, as a Llama, against itself: whole, streamed, cached, quantized. Against transformers: tests/parity."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from flax.traverse_util import flatten_dict
from jax.tree_util import tree_map_with_path
from tiny import CHANGES, LLAMA3, config_of, hf_config, random_params, random_tokens

from awq_jax.models import attention, decoder, for_config
from awq_jax.models.families.llama import LLAMA, MISTRAL
from awq_jax.models.family import matrix_shapes
from awq_jax.models.fields import Spelled
from awq_jax.models.generate import generate
from awq_jax.models.rope import Rope
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import is_quantized, round_to_nearest

BOTH = ("grouped heads", "tied head")


def model(case="grouped heads", dtype=jnp.float32, **changes):
    config = config_of(hf_config(case, **changes), dtype)
    return config, random_params(config)


def logits(config, params, tokens, **rest):
    return decoder.Decoder(config).apply({"params": params}, tokens, **rest)


def stream(config, params, tokens):
    hidden = decoder.embed(config, params, tokens)
    for i, layer in enumerate(config.layers):
        hidden = decoder.block(layer, params[f"layers_{i}"], hidden)
    return decoder.head(config, params, hidden)


def on_kernels(f, params):
    return tree_map_with_path(lambda path, w: f(w) if path[-1].key == "kernel" else w, params, is_leaf=is_quantized)


def hf_tensors(config, params):
    """A checkpoint's tensors, by name and in Hugging Face orientation."""
    tensors = {}
    for path, value in flatten_dict(params).items():
        (name,) = LLAMA.stored(config)["/".join(path)].names
        tensors[name] = np.asarray(value).T if path[-1] == "kernel" else np.asarray(value)
    return tensors


@pytest.mark.parametrize("case", CHANGES)
def test_layer_by_layer_is_the_whole_model(case):
    config, params = model(case)
    tokens = random_tokens(config)
    np.testing.assert_array_equal(stream(config, params, tokens), logits(config, params, tokens))


def test_all_layers_run_one_compiled_block():
    config, params = model()
    hidden = decoder.embed(config, params, random_tokens(config))
    step = jax.jit(decoder.block, static_argnums=0)
    with compilations() as compiled:
        for i, layer in enumerate(config.layers):
            hidden = step(layer, params[f"layers_{i}"], hidden)
    assert compiled["block"] == 1


@pytest.mark.parametrize("case", BOTH)
@pytest.mark.parametrize("filled", [None, 0])
def test_prefill_and_decode_give_the_logits_of_the_full_forward(case, filled):
    config, params = model(case)
    tokens = random_tokens(config, length=10)
    cache = decoder.init_cache(config, batch=2, length=16)
    step = jax.jit(lambda t, c, p: logits(config, params, t, cache=c, position=p))
    parts = []
    start, cache = logits(config, params, tokens[:, :6], cache=cache, position=filled)
    parts.append(start)
    for i, n in ((6, 1), (7, 1), (8, 2)):
        more, cache = step(tokens[:, i : i + n], cache, jnp.asarray(i))
        parts.append(more)
    np.testing.assert_allclose(np.concatenate(parts, 1), logits(config, params, tokens), rtol=1e-4, atol=1e-4)


def one_layer(**changes):
    return replace(config_of(hf_config(head_dim=8)).layers[0], **changes)


@pytest.mark.parametrize("window", [None, 1, 200])
@pytest.mark.parametrize("length", [1, 128, 129, 300, 1030])
def test_attention_in_slices_is_attention(length, window):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 1, 2, length, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 1, length, 8)).astype(np.float32)
    scores = np.einsum("bkgtd,bksd->bkgts", q, k).astype(np.float64) / np.sqrt(8)
    behind = np.arange(length)[:, None] - np.arange(length)
    scores[..., (behind < 0) | (behind >= (window or length))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bkgts,bksd->bkgtd", weights, v)
    np.testing.assert_allclose(
        jax.jit(attention.causal_attention, static_argnums=0)(one_layer(window=window), q, k, v),
        expected,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("case", CHANGES)
def test_quantized_kernels_compute_what_their_dense_weights_do(case):
    config, params = model(case)
    tokens = random_tokens(config)
    quantized = on_kernels(lambda w: round_to_nearest(w, QuantSpec(group_size=32)), params)
    dense = on_kernels(lambda w: w.dequantize(), quantized)
    expected = np.asarray(logits(config, dense, tokens))
    np.testing.assert_allclose(logits(config, quantized, tokens), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected - logits(config, params, tokens)).max() > 1e-2


@pytest.mark.parametrize("case", BOTH)
def test_bfloat16_is_near_float32(case):
    config, params = model(case)
    half, _ = model(case, dtype=jnp.bfloat16)
    tokens = random_tokens(config)
    expected = np.asarray(logits(config, params, tokens))
    found = logits(half, jax.tree.map(lambda w: w.astype(jnp.bfloat16), params), tokens)
    assert found.dtype == jnp.float32
    assert decoder.embed(half, params, tokens).dtype == jnp.bfloat16
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.05 * expected.std()


@pytest.mark.parametrize("case", CHANGES)
def test_load_puts_each_tensor_where_it_was(case):
    config, params = model(case)
    tensors = hf_tensors(config, params)
    asked = []
    loaded = LLAMA.load(lambda name: asked.append(name) or tensors[name], config)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert sorted(asked) == sorted(tensors)


def test_a_part_is_written_under_the_names_it_is_read_by():
    config, params = model("biases")
    params["layers_0"] = on_kernels(lambda w: round_to_nearest(w, QuantSpec(group_size=32)), params["layers_0"])
    tensors = LLAMA.to_names(params)
    jax.tree.map(np.testing.assert_array_equal, LLAMA.load(tensors.__getitem__, config), params)
    for name, shape in matrix_shapes(config).items():
        layer, *path = name.split("/")
        assert flatten_dict(params[layer])[tuple(path)].shape == shape


def test_load_takes_quantized_matrices_as_they_are():
    config, params = model()
    quantized = on_kernels(lambda w: round_to_nearest(w, QuantSpec(group_size=32)), params)
    tensors = hf_tensors(config, params)
    tensors["model.layers.1.mlp.down_proj.weight"] = quantized["layers_1"]["mlp"]["down"]["kernel"]
    assert (
        LLAMA.param(tensors.__getitem__, config, "layers_1/mlp/down/kernel")
        is quantized["layers_1"]["mlp"]["down"]["kernel"]
    )
    tensors["model.embed_tokens.weight"] = round_to_nearest(params["embed"]["embedding"], QuantSpec(group_size=32))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is quantized"):
        LLAMA.load(tensors.__getitem__, config)


def test_load_names_the_tensor_that_does_not_fit():
    config, params = model()
    tensors = hf_tensors(config, params)
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((64, 32), np.float32)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight.*\(32, 64\).*\(64, 32\)"):
        LLAMA.load(tensors.__getitem__, config)


def greedy_by_full_forwards(config, params, tokens, count):
    run = jax.jit(lambda t: logits(config, params, t))
    start = tokens.shape[1]
    text = np.pad(tokens, [(0, 0), (0, count)])
    for end in range(start, start + count):
        text[:, end] = run(text)[:, end - 1].argmax(-1)
    return text


@pytest.mark.parametrize("case", BOTH)
def test_greedy_generation_takes_the_likeliest_token_of_full_forwards(case):
    config, params = model(case)
    tokens = random_tokens(config, length=5)
    expected = greedy_by_full_forwards(config, params, tokens, 7)
    np.testing.assert_array_equal(generate(config, params, tokens, max_new_tokens=7), expected)
    np.testing.assert_array_equal(generate(config, params, tokens, max_new_tokens=1), expected[:, :6])


def test_rows_end_at_their_first_eos():
    config, params = model()
    tokens = random_tokens(config, length=5)
    free = np.asarray(generate(config, params, tokens, max_new_tokens=8))
    eos = (int(free[0, 6]), int(free[1, 9]))
    found = np.asarray(generate(config, params, tokens, max_new_tokens=8, eos=eos))
    for row, expected in zip(found, free, strict=True):
        end = 5 + np.isin(expected[5:], eos).argmax() + 1
        np.testing.assert_array_equal(row[:end], expected[:end])
        assert (row[end:] == eos[0]).all()
    one = generate(config, params, tokens[:1], max_new_tokens=8, eos=eos[0])
    np.testing.assert_array_equal(one, generate(config, params, tokens[:1], max_new_tokens=8, eos=(eos[0],)))


def test_nothing_is_computed_once_all_rows_have_ended(monkeypatch):
    config, params = model("tied head", vocab_size=96)
    steps = []
    rotate = attention.rotate

    def counted(x, rope, angles):
        jax.debug.callback(lambda: steps.append(x.shape[-2]))
        return rotate(x, rope, angles)

    monkeypatch.setattr(attention, "rotate", counted)
    tokens = random_tokens(config, batch=1, length=5)
    free = np.asarray(generate(config, params, tokens, max_new_tokens=9))
    jax.effects_barrier()
    per_step = 2 * len(config.layers)
    assert steps.count(1) == 8 * per_step
    eos = int(free[0, 7])
    steps.clear()
    generate(config, params, tokens, max_new_tokens=9, eos=eos).block_until_ready()
    jax.effects_barrier()
    assert steps.count(1) == int((free[0, 5:] == eos).argmax()) * per_step


def test_generation_is_compiled_once_a_shape_whatever_the_temperature_and_key():
    config, params = model(vocab_size=95)
    tokens = random_tokens(config, length=5)
    with compilations() as compiled:
        for seed, temperature in enumerate((0.5, 1.0, 2.0)):
            generate(config, params, tokens, max_new_tokens=4, temperature=temperature, key=jax.random.key(seed))
    assert compiled["_generate"] == 1


def test_samples_follow_the_distribution():
    config, params = model(vocab_size=11)
    prompt = random_tokens(config, batch=1, length=5)
    rows = np.repeat(prompt, 4000, 0)
    drawn = generate(config, params, rows, max_new_tokens=1, temperature=2.0, key=jax.random.key(0))[:, -1]
    expected = jax.nn.softmax(logits(config, params, prompt)[0, -1] / 2.0)
    np.testing.assert_allclose(np.bincount(drawn, minlength=11) / 4000, expected, atol=0.03)


@pytest.mark.parametrize("memory", [0, 2**40], ids=["from codes", "made dense before"])
def test_generation_runs_on_quantized_params(memory, monkeypatch, doors):
    config, params = model()
    quantized = on_kernels(lambda w: round_to_nearest(w, QuantSpec(group_size=32)), params)
    dense = on_kernels(lambda w: w.dequantize(), quantized)
    doors["dense"] = 0
    monkeypatch.setattr("awq_jax.models.generate.free_memory", lambda: memory)
    tokens = random_tokens(config, length=5)
    np.testing.assert_array_equal(
        generate(config, quantized, tokens, max_new_tokens=6), generate(config, dense, tokens, max_new_tokens=6)
    )
    assert (doors["kernel"] > 0, doors["dense"] > 0) == (memory == 0, memory > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature=-1.0"),
        ({"max_new_tokens": 1, "temperature": 1.0}, "needs a key"),
    ],
)
def test_generation_refuses(arguments, message):
    config, params = model()
    with pytest.raises(ValueError, match=message):
        generate(config, params, random_tokens(config), **arguments)
    with pytest.raises(ValueError, match="give \\[batch, length\\]"):
        generate(config, params, np.zeros(3, np.int32), max_new_tokens=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "rope type 'proportional'.*'llama3'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear rope parameters lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"hidden_act": "xielu"}, "hidden_act='xielu'.*'silu'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"attention_sinks": 4}, "the config has attention_sinks=4, which this model does not compute"),
        ({"rope_scaling": LLAMA3 | {"mrope_section": [1]}}, "rope parameters have mrope_section=.1., which"),
        ({"num_key_value_heads": 3}, "4 heads do not divide by 3"),
        ({"head_dim": 15}, "head_dim=15"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 1},
            "hidden_size=64 does not divide by num_attention_heads=5",
        ),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor=4.0 and high_freq_factor=4.0"),
    ],
)
def test_a_config_that_this_model_does_not_compute_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(hf_config(**changes))


def test_what_nobody_reads_is_no_matter():
    noted = {
        "transformers.js_config": {"dtype": "q4"},
        "is_llama_config": True,
        "use_cache": True,
        "attention_sinks": None,
    }
    assert config_of(hf_config() | noted) == config_of(hf_config())


def test_a_config_of_other_names_is_a_mapping_of_llamas():
    """What is listed is found, and what is found is listed."""
    found = Spelled({"n_embd": 8, "hidden_size": 9, "n_layer": 2, "bos": 0}, hidden_size="n_embd", layers="n_layer")
    assert dict(found) == {"hidden_size": 8, "layers": 2, "bos": 0}
    assert (len(found), "n_embd" in found, found.get("n_layer")) == (3, False, None)


def test_what_another_version_of_a_family_computes_is_refused():
    hf = hf_config(architectures=["StableLmForCausalLM"], model_type="stablelm", qk_layernorm=True)
    with pytest.raises(ValueError, match="the config has qk_layernorm=True, which this model does not compute"):
        config_of(hf)


def test_a_checkpoint_saved_without_its_head_has_other_names():
    names = {name.removeprefix("model.") for name in LLAMA.stored_shapes(config_of(hf_config("tied head")))}
    bare = LLAMA.named_as(names)
    assert set(bare.stored_shapes(config_of(hf_config("tied head")))) == names
    assert bare.numbers == r"layers\.(\d+)\."
    assert LLAMA.named_as({"model.embed_tokens.weight"}) is LLAMA


SIZES = [k for k in hf_config() if k.endswith("size") or k.startswith("num_")]
ODD = {
    **dict.fromkeys((*SIZES, "head_dim", "max_position_embeddings"), (0, -1, True, 64.0, "64", [64], 10**9)),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), (0, -1e-5, "1e-5", True, float("nan"), float("inf"), 10**400, [1])),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), (0, 1, "true", 1.0, [True])),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (0, False, "linear", [1])),
}


@pytest.mark.parametrize("key", ODD)
def test_a_field_of_another_type_or_out_of_range_is_named(key):
    for value in ODD[key]:
        with pytest.raises(ValueError, match=rf"the config has {key}=.*: expected"):
            config_of(hf_config() | {key: value})
    for field in LLAMA3.keys() - {"rope_type"} if key == "rope_scaling" else ():
        with pytest.raises(ValueError, match=rf"the llama3 rope parameters has {field}='8': expected"):
            config_of(hf_config(rope_scaling=LLAMA3 | {field: "8"}))


def test_null_is_as_if_left_out_but_for_numbers():
    sizes = {k: v for k, v in hf_config().items() if k in SIZES and k != "num_key_value_heads"}
    numbers = sizes.keys() | {"rms_norm_eps", "rope_theta"}
    null = dict.fromkeys((hf_config() | ODD).keys() - numbers)
    assert config_of(sizes | null) == config_of(sizes)
    for key in numbers:
        with pytest.raises(ValueError, match=f"has {key}=null: expected a"):
            config_of(hf_config() | {key: None})
    for key in sizes:
        with pytest.raises(ValueError, match=f"lacks '{key}'"):
            config_of({k: v for k, v in hf_config().items() if k != key})


def test_theta_is_found_wherever_it_stands():
    bare = {key: value for key, value in hf_config().items() if key != "rope_theta"}
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    for changes in (newer, newer | {"rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3, "rope_theta": 5e5}):
        assert config_of(bare | changes).layers[0].rope.theta == 5e5


def test_ropes_by_layer_type_are_refused():
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}
    with pytest.raises(ValueError, match=r"rope parameters for \['full_attention'\]: this model has one rope"):
        config_of(hf_config() | {"rope_parameters": nested})


def test_positions_are_those_after_linear_scaling():
    assert config_of(hf_config()).positions == 512
    assert config_of(hf_config("linear rope")).positions == 2048
    assert config_of(hf_config("llama3 rope, v4 style")).positions == 512


def test_a_config_may_leave_out_what_transformers_has_defaults_for():
    sizes = {k: v for k, v in hf_config().items() if k.endswith("size") or k.startswith("num_")}
    config = config_of({**sizes, "num_key_value_heads": None, "head_dim": None})
    layer = config.layers[0]
    assert (layer.kv_heads, layer.head_dim, layer.norm.eps, config.tied) == (4, 16, 1e-6, False)
    assert layer.rope == Rope(16, theta=10000.0)


@pytest.mark.parametrize("found", ["LlamaForCausalLM", [1], {"a": 1}])
def test_architectures_are_a_list_of_names(found):
    with pytest.raises(ValueError, match="expected a list of names"):
        for_config({"architectures": found})


def test_an_architecture_is_found_by_its_name():
    assert for_config(hf_config()) is LLAMA
    assert for_config({"architectures": ["Unknown", "MistralForCausalLM"]}) is MISTRAL


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({}, r"architectures=\[\]"),
    ],
)
def test_an_unknown_architecture_is_refused_with_those_that_are_known(config, found):
    with pytest.raises(ValueError, match=rf"{found}.*Supported: LlamaForCausalLM"):
        for_config(config)
