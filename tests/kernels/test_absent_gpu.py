"""What XLA makes for a GPU of programs with packed weights: no copy of a weight, no dense weight in memory."""

import functools as ft
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("jax_cuda12_plugin", reason="XLA's GPU compiler is not installed")
pytest.importorskip("jax_triton", reason="jax-triton is not installed")

from absent_gpu import compile_for, compile_for_h200, mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from awq_jax.kernels import grouped_int4_matmul, int4_matmul, shared_int4_matmul
from awq_jax.kernels.triton import matmul as triton
from awq_jax.models.decoder import Decoder
from awq_jax.models.generate import _generate
from awq_jax.models.layer import Config, Layer
from awq_jax.models.rope import Rope
from awq_jax.transforms.tune import program
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import SCALE_DTYPE, in_int4, in_rows, in_tiles, prepare, round_to_nearest, with_input_scale

pytestmark = [pytest.mark.gpu_compiler, pytest.mark.slow]

WIDTH = 2048
CODES = WIDTH * WIDTH // 2
LEGACY = jax.__version_info__ < (0, 11)
"""jax-triton 0.3 makes a call of which XLA knows little: it copies a slice for it and does not say what graphs hold."""


def weight(*lead: int, spec: QuantSpec = QuantSpec(), pack=in_tiles):  # noqa: B008
    make = lambda w: pack(round_to_nearest(w, spec, steps=SCALE_DTYPE))
    return jax.eval_shape(make, jax.ShapeDtypeStruct((*lead, WIDTH, WIDTH), jnp.bfloat16))


def rows(*shape: int):
    return jax.ShapeDtypeStruct((*shape, WIDTH), jnp.bfloat16)


def temporary(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("m", [1, 16, 1024])
def test_a_matmul_is_one_kernel_and_no_temporary(m):
    compiled = compile_for_h200(int4_matmul, rows(m), weight())
    assert compiled.as_text().count("custom-call(") == 1
    assert temporary(compiled) == 0


def test_where_k_is_split_one_fusion_adds_the_parts():
    m, parts = 48, 4
    compiled = compile_for_h200(lambda x, w: jax.nn.silu(int4_matmul(x, w)), rows(m), weight())
    text = compiled.as_text()
    assert (text.count(" custom-call("), text.count(" fusion(")) == (1, 1)
    assert temporary(compiled) == parts * m * WIDTH * 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_on_a_t4_a_few_rows_read_only_the_codes(dtype):
    x = lambda m: jax.ShapeDtypeStruct((m, WIDTH), dtype)
    compiled = compile_for(75, int4_matmul, x(1), weight())
    assert compiled.as_text().count("custom-call(") == 1
    assert temporary(compiled) == 0
    assert temporary(compile_for(75, int4_matmul, x(9), weight())) >= jnp.dtype(dtype).itemsize * WIDTH**2


def test_the_input_scale_is_multiplied_where_x_is_made():
    def run(x, w):
        return int4_matmul(jax.nn.silu(x), w)

    scale = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
    for w in (weight(), with_input_scale(weight(), scale)):
        text = compile_for_h200(run, rows(1), w).as_text()
        assert (text.count(" custom-call("), text.count(" fusion(")) == (1, 1)


def test_the_kernel_is_seen_to_save_the_dense_weight():
    compiled = compile_for_h200(int4_matmul, rows(16), weight(pack=in_rows))
    assert temporary(compiled) >= 2 * WIDTH * WIDTH


@pytest.mark.parametrize("m", [1, 4, 16])
@pytest.mark.parametrize("lead", [(), (4,)])
def test_without_a_kernel_few_rows_write_sums_of_groups_and_no_weight(m, lead):
    """What XLA may write beside the sums, a float32 for each row, group and column, is those of x."""
    sums = math.prod(lead) * m * WIDTH // 128 * (WIDTH + 2) * 4
    assert temporary(compile_for_h200(int4_matmul, rows(*lead, m), weight(*lead, pack=in_int4))) <= 1.1 * sums


def test_without_a_kernel_the_weight_is_made_dense_where_it_is_smaller_than_sums():
    used = lambda m, pack: temporary(compile_for_h200(int4_matmul, rows(m), weight(pack=pack)))
    for m in (64, 65, 1024):
        assert used(m, in_int4) <= used(m, in_rows)


def test_on_a_t4_one_row_reads_int4_codes_and_more_are_multiplied_as_before():
    half = lambda m: jax.ShapeDtypeStruct((m, WIDTH), jnp.float16)
    used = lambda m, pack: temporary(compile_for(75, int4_matmul, half(m), weight(pack=pack)))
    assert used(1, in_int4) < WIDTH * WIDTH // 16
    assert used(4, in_int4) == used(4, in_rows)


@pytest.mark.parametrize("m", [1, 4])
def test_scanned_layers_of_int4_codes_are_read_in_place_or_sliced_one_by_one(m):
    def run(x, stack):
        return jax.lax.scan(lambda x, w: (int4_matmul(x, w), None), x, stack)[0]

    sums = m * WIDTH // 128 * (WIDTH + 2) * 4
    assert temporary(compile_for_h200(run, rows(m), weight(8, pack=in_int4))) <= 1.2 * sums + (m > 1) * CODES


def test_gradients_through_int4_codes_keep_no_dense_weight_of_each_layer():
    def loss(x, stack):
        return jax.lax.scan(lambda x, w: (int4_matmul(x, w), None), x, stack)[0].astype(jnp.float32).sum()

    layers = 8
    compiled = compile_for_h200(jax.grad(loss), rows(64), weight(layers, pack=in_int4))
    assert temporary(compiled) < layers * WIDTH * WIDTH


def test_weights_of_one_input_are_one_kernel(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for count in (2, 3):
        compiled = compile_for_h200(shared_int4_matmul, rows(1), *[weight()] * count)
        assert compiled.as_text().count(" custom-call(") == 1
        assert temporary(compiled) < WIDTH
    assert compile_for_h200(shared_int4_matmul, rows(64), weight(), weight()).as_text().count(" custom-call(") == 2


def test_experts_and_ragged_rows_need_no_dense_weight():
    assert temporary(compile_for_h200(int4_matmul, rows(4, 3), weight(4))) == 0
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert temporary(compile_for_h200(grouped_int4_matmul, rows(64), weight(4), sizes)) < 100_000


@pytest.mark.parametrize(("cut", "sums"), [(P("x"), 1), (P(None, None, "x"), 0), (P(None, "x"), 1)])
def test_experts_of_four_gpus_stay_where_they_are(cut, sums):
    on = lambda tree, spec: jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh(90, 4), spec)), tree
    )
    sizes = jax.ShapeDtypeStruct((16,), jnp.int32)
    compiled = compile_for_h200(grouped_int4_matmul, on(rows(64), P()), on(weight(16), cut), on(sizes, P()))
    text = compiled.as_text()
    assert text.count('custom_call_target="triton_kernel') == 1
    assert "all-gather" not in text
    assert len(re.findall(r" all-reduce(-start)?\(", text)) == sums
    assert temporary(compiled) < CODES


def test_layers_read_in_place_are_not_copied():
    def run(x, stack):
        step = lambda layer, x: triton.matmul(x, stack, layer=layer)
        return jax.lax.fori_loop(0, 4, step, x)

    assert temporary(compile_for_h200(run, rows(1), weight(4))) < CODES // 16


def test_scanned_layers_are_not_copied(monkeypatch):
    def run(x, *stacks):
        return jax.lax.scan(lambda x, ws: (sum(shared_int4_matmul(x, *ws)), None), x, stacks)[0]

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for n in (1, 2):
        compiled = compile_for_h200(run, rows(1), *[weight(4)] * n)
        assert compiled.as_text().count('custom_call_target="triton_kernel') == 1
        assert temporary(compiled) < CODES // 16 + LEGACY * 1.1 * n * CODES


@pytest.mark.parametrize(
    ("lead", "m", "n", "spec", "dtype", "result"),
    [
        ((), 1024, 4096, QuantSpec(4, 128), "bfloat16", None),
        ((), 256, 4096, QuantSpec(4, 32), "float16", None),
        ((), 64, 320, QuantSpec(4, 256, symmetric=True), "bfloat16", None),
        ((4,), 512, 1024, QuantSpec(4, 64), "bfloat16", "float32"),
        ((), 2048, 2048, QuantSpec(4, -1), "bfloat16", None),
    ],
)
def test_the_kernel_for_hopper_is_one_call_without_spills(monkeypatch, tmp_path, lead, m, n, spec, dtype, result):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    x = jax.ShapeDtypeStruct((*lead, m, WIDTH), dtype)
    dense = jax.ShapeDtypeStruct((*lead, WIDTH, n), jnp.bfloat16)
    w = jax.eval_shape(lambda w: in_tiles(round_to_nearest(w, spec, steps=SCALE_DTYPE)), dense)
    compiled = compile_for_h200(ft.partial(int4_matmul, implementation="mosaic", dtype=result), x, w)
    assert compiled.as_text().count("custom-call(") == 1
    assert temporary(compiled) == 0
    (assembled,) = tmp_path.glob("*.ptxas")
    assert "0 bytes spill stores, 0 bytes spill loads" in assembled.read_text()
    (ptx,) = tmp_path.glob("*.ptx")
    program = ptx.read_text()
    # Of 64 columns and 128 rows a thread has 32 pairs of weights: one lop3 each, 8 products, no integer made a float.
    assert program.count("0x000f000f") == 32
    assert len(re.findall(r"wgmma\.mma_async", program)) == 8
    assert not re.search(r"cvt\.r\w+\.\w+\.[us]\d+", program)


def test_a_timed_round_makes_each_weight_dense_and_nothing_else():
    m, weights = 512, [weight()] * 3

    def written(multiply) -> list[int]:
        """Sizes of what the kernels of a round write."""
        text = compile_for_h200(program(multiply, 4), rows(m), weights).as_text()
        (name,) = set(re.findall(r"body=%?([\w.-]+)", text))
        body = re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.M | re.S).group()
        shapes = re.findall(r"= \w+\[([\d,]+)\]\S* (?:fusion|custom-call|dot)\(", body)
        return [math.prod(map(int, shape.split(","))) for shape in shapes]

    dense = written(ft.partial(int4_matmul, implementation="xla"))
    assert dense.count(m * WIDTH) >= 3
    assert sum(size >= WIDTH * WIDTH for size in dense) >= 3
    packed = written(ft.partial(int4_matmul, implementation="triton"))
    assert packed.count(m * WIDTH) >= 3
    assert max(packed) < WIDTH * WIDTH


def test_the_kernel_for_hopper_reads_scanned_layers_in_place():
    def run(x, stack):
        return jax.lax.scan(lambda x, w: (int4_matmul(x, w, implementation="mosaic"), None), x, stack)[0]

    m = 128
    copies = LEGACY * 1.1 * CODES
    assert temporary(compile_for_h200(run, rows(m), weight(4))) < 2 * 2 * m * WIDTH + copies


def test_gradients_keep_the_packed_weight_between_the_passes():
    def loss(x, stack):
        return jax.lax.scan(lambda x, w: (int4_matmul(x, w), None), x, stack)[0].astype(jnp.float32).sum()

    layers = 8
    compiled = compile_for_h200(jax.grad(loss), rows(64), weight(layers))
    assert temporary(compiled) < layers * 2 * WIDTH * WIDTH


def test_greedy_decoding_copies_no_weight_and_runs_within_command_buffers(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from thunks import launches_in_the_loop

    layer = Layer(width=1024, heads=8, kv_heads=2, head_dim=128, mlp_width=2048, rope=Rope(128))
    config = Config(vocab=512, layers=(layer, layer), dtype=jnp.bfloat16)

    def initial():
        params = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        pack = lambda path, leaf: (
            round_to_nearest(leaf, QuantSpec(), steps=SCALE_DTYPE) if path[-1].key == "kernel" else leaf
        )
        return prepare(jax.tree_util.tree_map_with_path(pack, params))

    def run(params, tokens):
        return _generate(config, params, tokens, None, max_new_tokens=8, eos=())

    tokens = jax.ShapeDtypeStruct((1, 40), jnp.int32)
    compiled = compile_for_h200(run, jax.eval_shape(initial), tokens, xla_dump_to=str(tmp_path))
    text = compiled.as_text()
    # A layer of one row: q with k and v, o, gate with up, down. Of 40 rows: all seven. And the head of one.
    per_step, prefill = 2 * 4 + 1, 2 * 7 + 1
    assert text.count(" custom-call(") == per_step + prefill
    assert not re.search(r"= s16\[\S+ (copy|dynamic-slice|fusion)\(", text)
    # Of gate and up of 40 rows, a float32 for each half of K.
    parts = 2 * 2 * 40 * layer.mlp_width * 4
    assert temporary(compiled) - parts < layer.width * layer.mlp_width // 2, "as much as a packed weight"
    (listing,) = tmp_path.glob("*run*thunk_sequence_after_thunk_passes.txt")
    kernels = [holder for holder, kind in launches_in_the_loop(listing.read_text()) if kind == "kCustomCall"]
    assert kernels == ["" if LEGACY else "kCommandBuffer"] * per_step
