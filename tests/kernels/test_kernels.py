"""One suite for every implementation of the matmuls, against numpy in float64.

Error bounds, for a result of sums S = sum_k |x_k w_k| over K terms, u = 2**-8 (bfloat16) or 2**-11 (float16) the unit
roundoff:
  - float32 accumulation, any order: at most K 2**-24 S;
  - the result rounded to x's dtype: u |y|;
  - a weight rounded to x's dtype before the product, as plain XLA does: u S; with the scale rounded first, as the
    kernel of many rows does: (2 u + u**2) S, and once more u S for x rounded after its input scale;
  - zero points taken off after the product of a group, as XLA does that reads int4 arrays: what float32 rounds is
    sum_k |x_k| s (|q - 8| + |z - 8|) <= S + 2 C with C = sum_k |x_k| s |z - 8|, each term in g additions of its group,
    3 operations with s and z, and as many additions as there are groups: at most (K + 4) 2**-24 (S + 2 C), for g and
    groups, both at least 1, sum to no more than K + 1.
"""

import dataclasses
import functools as ft
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton has wheels for Linux only")

import interpreted
from quick import quick_jit

from awq_jax.kernels import grouped_int4_matmul, int4_matmul, shared_int4_matmul, target
from awq_jax.kernels.api import separate
from awq_jax.kernels.chooser import TABLED
from awq_jax.kernels.gpu import architecture, multiprocessors
from awq_jax.kernels.tilings import table
from awq_jax.kernels.triton import launch
from awq_jax.kernels.triton import matmul as triton
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import QuantizedTensor, in_int4, in_tiles, round_to_nearest, with_input_scale

pytestmark = pytest.mark.slow

IMPLEMENTATIONS = ("triton", "direct", "xla")
SPEC = QuantSpec(4, 32)
dense_weight = quick_jit(lambda w: w.dequantize())
multiply = quick_jit(int4_matmul, static_argnames="implementation")
grouped_multiply = quick_jit(grouped_int4_matmul, static_argnames="implementation")
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    monkeypatch.setattr(launch, "missing", lambda: None)
    monkeypatch.setattr(triton, "launch", interpreted.launch)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weight(
    *shape: int,
    spec: QuantSpec = SPEC,
    scaled: bool = False,
    seed: int = 0,
    implementation: str = "triton",
    steps: str = "float16",
) -> QuantizedTensor:
    scale = np.exp(normal(*shape[:-1], seed=seed + 1)) if scaled else None
    pack = in_int4 if implementation == "direct" else in_tiles
    return packed(normal(*shape, seed=seed) + 0.3, scale, spec, pack, steps)


@ft.partial(quick_jit, static_argnums=(2, 3, 4))
def packed(w, scale, spec, pack, steps) -> QuantizedTensor:
    """One program: the operations one by one take a compilation each, for every shape."""
    w = round_to_nearest(w, spec, steps=steps)
    return pack(w if scale is None else with_input_scale(w, scale))


def exact(x, w: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """The product and the product of magnitudes, in float64, of one matrix or of as many as there are rows of w."""
    dense = np.asarray(dense_weight(w), np.float64)
    x = np.asarray(x, np.float64)
    return x @ dense, np.abs(x) @ np.abs(dense)


def taken_off(x, w: QuantizedTensor) -> np.ndarray:
    """C of the error bounds."""
    if w.zeros is None or w.packing != "int4":
        return np.zeros(())
    off = np.abs(np.asarray(w.zeros, np.float64) - 8) * np.asarray(w.scales, np.float64)
    scale = 1 if w.input_scale is None else np.asarray(w.input_scale, np.float64)[..., None, :]
    rows = np.repeat(off, w.spec.group(w.in_features), axis=-2)[..., : w.in_features, :]
    return np.abs(np.asarray(x, np.float64) * scale) @ rows


def check(y, x, w: QuantizedTensor, reference=None) -> None:
    product, magnitude = exact(x, w) if reference is None else reference
    u = ROUNDING[x.dtype.name]
    summed = (x.shape[-1] + 4) * 2.0**-24 * (magnitude + 2 * taken_off(x, w))
    bound = summed + 4 * u * magnitude + u * np.abs(product) + 1e-6
    assert y.dtype == x.dtype
    error = np.abs(np.asarray(y, np.float64) - product)
    assert np.all(error <= bound), f"{np.max(error / bound)} times the bound"


@st.composite
def cases(draw):
    spec = QuantSpec(4, draw(st.sampled_from([32, 64, 96, 128, 160, 192, -1])), draw(st.booleans()))
    arch, dtype = draw(st.sampled_from([75, 80, 90])), draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    most = 8 if arch < 80 or dtype == "float32" else 70
    rows = draw(st.sampled_from([m for m in (1, 3, 8, 9, 16, 17, 33, 70) if m <= most]))
    k, n = draw(st.sampled_from([1, 20, 64, 100, 128, 256, 300])), draw(st.sampled_from([1, 5, 16, 70]))
    return (
        rows,
        k,
        n,
        spec,
        draw(st.booleans()),
        draw(st.sampled_from(["float16", "float32"])),
        dtype,
        arch,
        draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=20)
@given(case=cases())
def test_the_product_is_within_its_bound(implementation, case):
    rows, k, n, spec, scaled, steps, dtype, arch, seed = case
    x = jnp.asarray(normal(rows, k, seed=seed), dtype)
    w = weight(k, n, spec=spec, scaled=scaled, seed=seed, implementation=implementation, steps=steps)
    with target(arch):
        y = int4_matmul(x, w, implementation=implementation)
    check(y, x, w)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("group", [96, 160, 192, 224, 384])
def test_groups_that_end_within_a_block(group, rows):
    """The scales differ by orders of magnitude from group to group."""
    w = weight(700, 20, spec=QuantSpec(4, group))
    w = dataclasses.replace(w, scales=w.scales * np.exp(2 * normal(*w.scales.shape, seed=2)).astype(np.float16))
    x = jnp.asarray(normal(rows, 700), jnp.bfloat16)
    check(multiply(x, w, implementation="triton"), x, w)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 96, 128, -1])
@pytest.mark.parametrize(("arch", "dtype"), [(75, "bfloat16"), (75, "float16"), (75, "float32"), (90, "float32")])
def test_without_tensor_cores_a_few_rows_are_exact_and_rounded(arch, dtype, group, symmetric):
    for rows, k, n in ((1, 300, 20), (8, 128, 5)):
        x, w = jnp.asarray(normal(rows, k), dtype), weight(k, n, spec=QuantSpec(4, group, symmetric))
        with target(arch):
            y = np.asarray(int4_matmul(x, w, implementation="triton"), np.float64)
        product, magnitude = exact(x, w)
        assert np.all(np.abs(y - product) <= k * 2.0**-24 * magnitude + ROUNDING[dtype] * np.abs(product))


@pytest.mark.parametrize(("arch", "dtype"), [(75, "bfloat16"), (90, "float32")])
def test_without_tensor_cores_many_rows_and_sorted_rows_are_left_to_plain_xla(arch, dtype):
    x, w, experts = jnp.ones((9, 64), dtype), weight(64, 8), weight(2, 64, 8)
    with target(arch):
        with pytest.raises(NotImplementedError, match=f"more than 8 rows of {dtype} on sm_{arch}"):
            int4_matmul(x, w, implementation="triton")
        with pytest.raises(NotImplementedError, match=f"sorted rows of {dtype} on sm_{arch}"):
            grouped_int4_matmul(x, experts, jnp.array([4, 5]), implementation="triton")
        np.testing.assert_array_equal(int4_matmul(x, w), int4_matmul(x, w, implementation="xla"))
        each_row = jax.vmap(jax.jit(lambda x: int4_matmul(x[None], w)[0]))
        np.testing.assert_array_equal(each_row(x), int4_matmul(x, w, implementation="xla"))
        with pytest.raises(NotImplementedError, match=f"more than 8 rows of {dtype} on sm_{arch}"):
            jax.vmap(lambda x: int4_matmul(x[None], w, implementation="triton")[0])(x)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("implementation", ["triton", "direct"])
def test_few_rows_lose_nothing_to_rounded_weights_and_many_little(implementation, rows):
    """Integers are multiplied exactly: the result is the exact one, rounded."""
    x, w = jnp.asarray(normal(rows, 256), jnp.bfloat16), weight(256, 32, implementation=implementation)
    y = np.asarray(int4_matmul(x, w, implementation=implementation), np.float64)
    product, magnitude = exact(x, w)
    summed = 260 * 2.0**-24 * (magnitude + 2 * taken_off(x, w))
    only_rounded = np.all(np.abs(y - product) <= summed + 2.0**-8 * np.abs(product))
    assert only_rounded == (rows <= 32)


@settings(max_examples=15)
@given(
    k=st.sampled_from([20, 96, 300]),
    group=st.sampled_from([32, 96, -1]),
    symmetric=st.booleans(),
    lead=st.sampled_from([(), (2,)]),
    rows=st.sampled_from([(), (1,), (5,), (2, 3)]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=st.integers(0, 99),
)
def test_zero_points_taken_off_after_the_product_cost_float32_rounding_only(
    k, group, symmetric, lead, rows, dtype, seed
):
    """Weights far from zero: sums of x times codes are an order of magnitude more than what is left of them."""
    w = in_int4(
        round_to_nearest(
            normal(*lead, k, 6, seed=seed) * 0.1 + np.float32(seed % 3 - 1), QuantSpec(4, group, symmetric)
        )
    )
    x = jnp.asarray(normal(*lead, *rows, k, seed=seed + 1), dtype)
    y = np.asarray(int4_matmul(x, w, implementation="direct"), np.float64).reshape(*lead, -1, 6)
    x = x.reshape(*lead, -1, k)
    product, magnitude = exact(x, w)
    summed = (k + 4) * 2.0**-24 * (magnitude + 2 * taken_off(x, w))
    assert np.all(np.abs(y - product) <= summed + ROUNDING[dtype] * np.abs(product) + 1e-7)


@pytest.mark.parametrize(("rows", "dtype"), [(3, "bfloat16"), (40, "bfloat16"), (3, "float32")])
def test_matrices_whose_last_group_takes_a_block_more_than_their_rows(rows, dtype):
    x, w = jnp.asarray(normal(3, rows, 127), dtype), weight(3, 127, 20, spec=QuantSpec(4, 96))
    assert w.codes.shape[-2] == 2
    check(multiply(x, w, implementation="triton"), x, w)
    if dtype != "float32":
        y = grouped_multiply(x.reshape(-1, 127), w, jnp.full(3, rows), implementation="triton")
        check(y.reshape(3, rows, 20), x, w)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "dtype"), [(3, "bfloat16"), (40, "bfloat16"), (3, "float32")])
@pytest.mark.parametrize("scaled", [False, True])
def test_leading_axes_are_experts(implementation, rows, dtype, scaled):
    x = jnp.asarray(normal(3, rows, 96), dtype)
    w = weight(3, 96, 20, scaled=scaled, implementation=implementation)
    check(multiply(x, w, implementation=implementation), x, w)


@pytest.mark.parametrize(("rows", "dtype"), [(3, "bfloat16"), (40, "bfloat16"), (3, "float32")])
def test_a_layer_of_a_stack_is_read_in_place(rows, dtype):
    x, stack = jnp.asarray(normal(rows, 96), dtype), weight(4, 96, 20, scaled=True)
    pick = jax.jit(lambda x, w, layer: triton.matmul(x, w, layer=layer))
    for layer in (0, 3):
        check(pick(x, stack, layer), x, jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack))


@pytest.fixture
def launches(monkeypatch):
    """The kernels that were launched, each with its grid and constants."""
    seen = []

    def seen_launch(kernel, *args, grid, **options):
        seen.append((kernel, grid, options))
        return interpreted.launch(kernel, *args, grid=grid, **options)

    monkeypatch.setattr(triton, "launch", seen_launch)
    return seen


@pytest.mark.parametrize(("rows", "dtype"), [(40, "bfloat16"), (70, "float16")])
@pytest.mark.parametrize(("k", "splits"), [(1023, 2), (1100, 2), (1930, 4)])
def test_parts_of_k_that_programs_multiply_add_up(launches, rows, dtype, k, splits):
    x, stack = jnp.asarray(normal(rows, k), dtype), weight(2, k, 70, spec=QuantSpec(4, 96), scaled=True)
    w = jax.tree.map(lambda leaf: leaf[1], stack)
    for y in (triton.matmul(x, w), triton.matmul(x, stack, layer=1), triton.matmul(x, w, dtype=jnp.float32)):
        check(y.astype(dtype), x, w)
    check(triton.matmul(jnp.stack([x, x + 1]), stack), jnp.stack([x, x + 1]), stack)
    assert {(kernel, grid[1], options["splits"]) for kernel, grid, options in launches} == {("tile", splits, splits)}


@given(programs=st.integers(1, 5000), blocks=st.integers(1, 300), multiprocessors=st.sampled_from([40, 108, 132, 170]))
def test_k_is_split_for_one_program_on_each_multiprocessor_and_no_more(programs, blocks, multiprocessors):
    splits = table.splits(programs, blocks, multiprocessors)
    assert 1 <= splits <= max(1, blocks // 4)
    assert splits == 1 or programs * splits <= 1.5 * multiprocessors
    assert splits == max(1, blocks // 4) or programs * splits >= multiprocessors / 1.5


@pytest.mark.parametrize(("implementation", "pack"), [("triton", in_tiles), ("xla", in_tiles), ("xla", in_int4)])
@pytest.mark.parametrize(
    "sizes", [[3, 0, 17, 1], [0, 0, 0, 50], [0, 0, 0, 0], [13, 13, 13, 11], [1, 1, 1, 150]], ids=str
)
def test_ragged_groups_of_rows(implementation, pack, sizes):
    rows, scaled = 160 if sum(sizes) > 50 else 50, sizes[0] == 3
    x, w = jnp.asarray(normal(rows, 160), jnp.bfloat16), pack(weight(4, 160, 70, spec=QuantSpec(4, 64), scaled=scaled))
    y = np.asarray(grouped_multiply(x, w, jnp.asarray(sizes), implementation=implementation))
    start = 0
    for i, size in enumerate(sizes):
        part = slice(start, start + size)
        check(y[part], x[part], jax.tree.map(lambda leaf, i=i: leaf[i], w))
        start += size
    np.testing.assert_array_equal(y[start:], 0)


row_tiles = jax.jit(triton.row_tiles, static_argnums=(1, 2))


@given(sizes=st.lists(st.integers(0, 100), min_size=5, max_size=5), rows=st.sampled_from([500, 200]))
@pytest.mark.parametrize("bm", [16, 128])
def test_row_tiles_cover_every_row_once(bm, sizes, rows):
    owner = np.repeat([*range(5), -1], [*sizes, rows])[:rows]
    seen = np.zeros(rows, int)
    for group, first, end in zip(*(np.asarray(a) for a in row_tiles(jnp.asarray(sizes), rows, bm)), strict=True):
        part = slice(first, min(first + bm, end))
        seen[part] += 1
        assert np.all(owner[part] == group)
    assert np.all(seen == 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_the_weight_the_activation_or_both(implementation):
    one_of = lambda x, w: int4_matmul(x, w, implementation=implementation)
    x = jnp.asarray(normal(3, 5, 64), jnp.bfloat16)
    w = weight(3, 64, 20, scaled=True, implementation=implementation)
    one = jax.tree.map(lambda leaf: leaf[0], w)
    check(jax.vmap(one_of)(x, w), x, w)
    check(jax.vmap(one_of, (0, None))(x, one), x, one)
    check(jax.vmap(one_of, (None, 0))(x[0], w), x[:1], w)
    again = jax.vmap(jax.vmap(one_of, (0, None)))(x[:, :, None], w)
    check(again[:, :, 0], x, w)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("implementation", ["triton", "direct"])
def test_gradients_are_those_of_the_dense_weight(implementation, rows):
    x = jnp.asarray(normal(rows, 96), jnp.bfloat16)
    w = weight(96, 20, scaled=True, implementation=implementation)
    dy = jnp.asarray(normal(rows, 20, seed=3), jnp.bfloat16)
    _, pull = jax.vjp(lambda x, w: int4_matmul(x, w, implementation=implementation), x, w)
    dx, dw = pull(dy)
    expected, expected_w = jax.vjp(lambda x, w: int4_matmul(x, w, implementation="xla"), x, w)[1](dy)
    np.testing.assert_array_equal(dx, expected)
    np.testing.assert_array_equal(dw.scales, expected_w.scales)
    assert dw.codes.dtype == jax.dtypes.float0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "k"), [(3, 96), (40, 96), (40, 1100)])
def test_a_float32_result_is_not_rounded_to_the_dtype_of_x(implementation, rows, k):
    wide = ft.partial(int4_matmul, implementation=implementation, dtype=jnp.float32)
    x, w = jnp.asarray(normal(3, rows, k), jnp.bfloat16), weight(3, k, 20, implementation=implementation)
    y = jax.jit(wide)(x, w)
    assert y.dtype == jnp.float32
    assert np.any(y != y.astype(jnp.bfloat16).astype(jnp.float32))
    check(y.astype(jnp.bfloat16), x, w)
    np.testing.assert_array_equal(jax.jit(jax.vmap(wide))(x, w), y)
    dx = jax.grad(lambda x: wide(x, w).sum())(x)
    assert (dx.dtype, dx.shape) == (x.dtype, x.shape)
    sizes, sorted_by = jnp.full(3, rows), "triton" if implementation == "triton" else "xla"
    ragged = grouped_int4_matmul(x.reshape(-1, k), w, sizes, implementation=sorted_by, dtype=jnp.float32)
    assert ragged.dtype == jnp.float32
    np.testing.assert_allclose(ragged.reshape(y.shape), y, rtol=0.02, atol=0.02 * np.abs(y).max())


def test_a_result_of_a_dtype_that_no_matmul_writes_is_refused():
    with pytest.raises(ValueError, match="dtype=int8: a result is float32, bfloat16 or float16"):
        int4_matmul(jnp.ones((1, 64)), weight(64, 8), dtype=jnp.int8)


def test_it_works_in_scan_and_remat():
    x = jnp.asarray(normal(3, 64), jnp.bfloat16)

    def run(implementation):
        stack = weight(4, 64, 64, implementation=implementation)
        stack = dataclasses.replace(stack, scales=stack.scales / 16)

        @jax.checkpoint
        def step(x, w):
            return jnp.tanh(int4_matmul(x, w, implementation=implementation)), None

        return jax.value_and_grad(lambda x: jax.lax.scan(step, x, stack)[0].astype(jnp.float32).sum())(x)

    for implementation in ("triton", "direct"):
        for a, b in zip(run(implementation), run("xla"), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.03, atol=0.03)


def test_one_program_runs_the_kernel_on_cuda_and_plain_xla_elsewhere():
    x, w = jnp.asarray(normal(3, 64), jnp.bfloat16), weight(64, 20)
    np.testing.assert_array_equal(int4_matmul(x, w), int4_matmul(x, w, implementation="xla"))
    assert "platform_index" in str(jax.make_jaxpr(int4_matmul)(x, w))


def test_rows_that_vmap_adds_are_counted():
    """Each row alone would be few: 40 of them are multiplied with the weight made dense, as 40 rows are."""
    x, w = jnp.asarray(normal(40, 64), jnp.bfloat16), weight(64, 20, implementation="direct")
    each = jax.vmap(lambda row: int4_matmul(row, w))
    assert "40,2,20" not in str(jax.make_jaxpr(each)(x))
    np.testing.assert_array_equal(each(x), int4_matmul(x, w))


def test_int4_arrays_are_read_where_they_are_and_are_no_case_for_a_kernel():
    x, w = jnp.asarray(normal(3, 64), jnp.bfloat16), weight(64, 20, implementation="direct")
    np.testing.assert_array_equal(int4_matmul(x, w), int4_matmul(x, w, implementation="direct"))
    for y, alone in zip(shared_int4_matmul(x, w, w), separate(x, w, w), strict=True):
        np.testing.assert_array_equal(y, alone)
    with pytest.raises(NotImplementedError, match="int4 array, for a machine without the kernels"):
        int4_matmul(x, w, implementation="triton")
    with pytest.raises(NotImplementedError, match="packed in tiles"):
        int4_matmul(x, weight(64, 20), implementation="direct")
    with pytest.raises(ValueError, match=r"leading axes \(3,\) must lead x too"):
        int4_matmul(x[None], weight(3, 64, 20, implementation="direct"))
    with pytest.raises(ValueError, match=r"scales has shape \(2, 7\)"):
        int4_matmul(x, dataclasses.replace(w, scales=w.scales[:, :7]))


REFUSED = {
    "rows": (
        lambda: (jnp.ones((2, 64), jnp.bfloat16), round_to_nearest(normal(64, 4), QuantSpec(4, 32))),
        "awq_jax.prepare",
    ),
    "bits": (lambda: (jnp.ones((2, 64), jnp.bfloat16), round_to_nearest(normal(64, 4), QuantSpec(3, 32))), "3-bit"),
    "float8": (lambda: (jnp.ones((2, 64), jnp.float8_e4m3fn), weight(64, 4)), "cast x"),
    "rows of float32": (lambda: (jnp.ones((9, 64)), weight(64, 4)), "more than 8 rows of float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_case_that_one_refuses_the_next_runs_unless_one_is_named(name):
    case, reason = REFUSED[name]
    x, w = case()
    with pytest.raises(NotImplementedError, match=reason):
        int4_matmul(x, w, implementation="triton")
    np.testing.assert_array_equal(int4_matmul(x, w), int4_matmul(x, w, implementation="xla"))


def test_a_long_prefill_makes_the_weight_dense_once(monkeypatch):
    launched = []
    empty = lambda kernel, *_, out, **__: (launched.append(kernel), jnp.zeros(out.shape, out.dtype))[1]
    monkeypatch.setattr(triton, "launch", empty)
    x, w = jnp.asarray(normal(1025, 64), jnp.bfloat16), weight(64, 20, scaled=True)
    expected = int4_matmul(x, w, implementation="xla")
    np.testing.assert_array_equal(TABLED.matmul(x, w), expected)
    wide = TABLED.matmul(x, w, dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), expected)
    assert launched == []
    int4_matmul(x, w, implementation="triton")
    assert launched == ["tile"], "asked for by name it is the kernel"
    for arch in (80, 89, 90, 120):
        assert table.tiling(arch, "bfloat16", 128, 1024, 4096, 4096).kernel == "tile"
        assert table.triton_tiling(arch, "bfloat16", 128, 9999, 4096, 4096).kernel == "tile"


@pytest.mark.parametrize("widths", [(70, 16, 5), (33, 20)])
@pytest.mark.parametrize(("rows", "dtype"), [(1, "bfloat16"), (9, "float16"), (32, "bfloat16")])
def test_weights_of_one_input_share_a_launch_and_give_the_same_numbers(launches, widths, rows, dtype):
    x = jnp.asarray(normal(rows, 300), dtype)
    ws = [weight(300, n, spec=QuantSpec(4, 96), scaled=i == 1, seed=i) for i, n in enumerate(widths)]
    ys = triton.shared_matmul(x, *ws)
    assert [kernel for kernel, *_ in launches] == ["decode_shared"]
    for y, w in zip(ys, ws, strict=True):
        check(y, x, w)
        alone = triton.matmul(x, w)
        np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(alone, np.float32), rtol=ROUNDING[dtype])


def test_what_one_launch_cannot_do_separate_ones_do():
    x, w, other = jnp.ones((3, 64), jnp.bfloat16), weight(64, 8), weight(64, 8, spec=QuantSpec(4, 64))
    for ws in ((w, other), (w,), (w, w, w, w), (w, weight(64, 8, spec=QuantSpec(4, 32, True)))):
        with pytest.raises(NotImplementedError, match="same groups"):
            triton.shared_matmul(x, *ws)
    for many in (jnp.ones((33, 64), jnp.bfloat16), jnp.ones((3, 64))):
        with pytest.raises(NotImplementedError, match="few rows"):
            triton.shared_matmul(many, w, w)
    for y, alone in zip(shared_int4_matmul(x, w, other), separate(x, w, other), strict=True):
        np.testing.assert_array_equal(y, alone)


@pytest.fixture
def one_device(monkeypatch):
    """One device, whose shared launches are counted."""
    calls = []
    run = triton.shared_matmul
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(triton, "shared_matmul", lambda *args: calls.append(1) or run(*args))
    return calls


def test_a_shared_launch_has_the_gradients_and_the_vmap_of_separate_ones(one_device):
    x, ws = jnp.asarray(normal(2, 3, 64), jnp.bfloat16), [weight(64, 8, scaled=True), weight(64, 5)]
    total = lambda f: lambda x: sum(y.astype(jnp.float32).sum() for y in f(x, *ws))
    np.testing.assert_array_equal(jax.grad(total(shared_int4_matmul))(x), jax.grad(total(separate))(x))
    batched = jax.vmap(lambda x: shared_int4_matmul(x, *ws))(x)
    for y, alone in zip(batched, separate(x, *ws), strict=True):
        np.testing.assert_array_equal(y, alone)
    assert one_device


def test_leading_axes_that_x_lacks_are_named():
    for implementation in (None, "triton"):
        with pytest.raises(ValueError, match=r"leading axes \(3,\) must lead x too"):
            int4_matmul(jnp.ones((4, 2, 64), jnp.bfloat16), weight(3, 64, 8), implementation=implementation)


def test_more_matrices_than_a_grid_has_programs_are_refused():
    w = jax.eval_shape(
        lambda w: in_tiles(round_to_nearest(w, SPEC)), jax.ShapeDtypeStruct((70_000, 32, 1), jnp.float32)
    )
    with pytest.raises(NotImplementedError, match="70000 matrices"):
        jax.eval_shape(triton.matmul, jax.ShapeDtypeStruct((70_000, 1, 32), jnp.bfloat16), w)


def test_a_tiling_beyond_the_shared_memory_is_refused_and_another_named():
    x, w = jnp.ones((1, 256), jnp.bfloat16), weight(256, 16)
    big = table.Tiling("decode", 8, 32, 8, 5, kb=8)
    with target(90):
        triton.matmul(x, w, tiling=big)
    with target(89), pytest.raises(ValueError, match=r"sm_89 has 101376: .* gives Tiling\(kernel='decode'"):
        triton.matmul(x, w, tiling=big)


@pytest.mark.parametrize("arch", [*table.SHARED, 200])
def test_the_table_never_asks_for_more_shared_memory_than_there_is(arch):
    for m in (1, 8) if arch < 80 else (1, 8, 16, 32, 64, 128, 256, 4096):
        for n in (64, 1024, 4096, 8192, 28672):
            assert table.tiling(arch, "bfloat16", 32, m, 4096, n).fits(arch)
            assert arch < 80 or table.grouped_tiling(arch, "bfloat16", 32, m, n).fits(arch)


def test_a_gpu_of_another_maker_has_no_architecture(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, expected in (("gfx942", None), ("9.0", 90), ("12.0", 120)):
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert architecture() == expected


def test_multiprocessors_are_those_of_the_gpu_that_is_here_or_of_the_usual_one(monkeypatch):
    assert multiprocessors() == 108
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(core_count=142)])
    assert multiprocessors() == 142
    with target(90):
        assert multiprocessors() == 132


def test_scales_of_the_wrong_shape_are_named():
    w = weight(64, 8)
    with pytest.raises(ValueError, match=r"scales has shape \(2, 7\)"):
        int4_matmul(jnp.ones((1, 64), jnp.bfloat16), dataclasses.replace(w, scales=w.scales[:, :7]))


def test_what_is_no_weight_or_no_activation_is_told():
    w, experts = weight(256, 16), weight(3, 256, 16)
    x = jnp.ones((4, 256))
    with pytest.raises(ValueError, match="x is int32: cast it"):
        int4_matmul(x.astype(jnp.int32), w)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), w)
    with pytest.raises(ValueError, match="codes are bfloat16, packed in 'tiles' they are int16"):
        int4_matmul(x, cast)
    with pytest.raises(ValueError, match=r"group_sizes are int32 of shape \(2,\): give one integer for each of the 3"):
        grouped_int4_matmul(x, experts, jnp.array([2, 2]))
    with pytest.raises(ValueError, match="group_sizes are float32"):
        grouped_int4_matmul(x, experts, jnp.ones(3))
    with pytest.raises(ValueError, match=r"sorted rows are \(rows, i\), experts \(e, i, o\)"):
        grouped_int4_matmul(x, w, jnp.array([4]))


GROUPS = st.sampled_from([32, 64, 96, 128, 160, -1])
DEPTHS = st.sampled_from([20, 100, 128, 300])
WIDTHS = st.sampled_from([1, 5, 16, 33, 70])
NARROW = st.sampled_from(["bfloat16", "float16"])


@settings(max_examples=8)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    beyond=st.integers(0, 5),
    k=DEPTHS,
    n=WIDTHS,
    spec=st.builds(QuantSpec, st.just(4), GROUPS, st.booleans()),
    scaled=st.booleans(),
    dtype=NARROW,
    implementation=st.sampled_from(["triton", "xla"]),
)
def test_sorted_rows_are_within_the_bound(sizes, beyond, k, n, spec, scaled, dtype, implementation):
    w = weight(len(sizes), k, n, spec=spec, scaled=scaled)
    x = jnp.asarray(normal(sum(sizes) + beyond, k), dtype)
    y = grouped_int4_matmul(x, w, jnp.asarray(sizes), implementation=implementation)
    ends = np.cumsum(sizes)
    for i, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        check(y[end - size : end], x[end - size : end], jax.tree.map(lambda leaf, i=i: leaf[i], w))
    assert not np.any(np.asarray(y[ends[-1] :], np.float32))


@settings(max_examples=8)
@given(
    widths=st.lists(WIDTHS, min_size=2, max_size=3),
    rows=st.sampled_from([1, 3, 8, 17]),
    k=DEPTHS,
    spec=st.builds(QuantSpec, st.just(4), GROUPS, st.booleans()),
    scaled=st.booleans(),
    dtype=NARROW,
)
def test_matrices_in_one_launch_are_within_the_bound(widths, rows, k, spec, scaled, dtype):
    ws = [weight(k, n, spec=spec, scaled=scaled and i == 1, seed=i) for i, n in enumerate(widths)]
    x = jnp.asarray(normal(rows, k), dtype)
    for y, w in zip(triton.shared_matmul(x, *ws), ws, strict=True):
        check(y, x, w)
