"""What XLA makes for a TPU that is not here of matmuls with int4 codes: no dense weight in memory."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytest.importorskip("libtpu", reason="XLA's TPU compiler is not installed")
# It asks a server of Google's cloud who else is there, unless it is told.
# Several workers may load it: nobody owns the TPU that is not here.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}

from awq_jax.kernels import int4_matmul
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import SCALE_DTYPE, in_int4, in_rows, round_to_nearest

WIDTH = 4096
CODES = WIDTH * WIDTH // 2


@pytest.fixture(scope="module", params=["v5e:2x2", "v4:2x2x1"])
def device(request):
    return topologies.get_topology_desc(platform="tpu", topology_name=request.param).devices[0]


def weight(*lead: int, pack=in_int4):
    make = lambda w: pack(round_to_nearest(w, QuantSpec(), steps=SCALE_DTYPE))
    return jax.eval_shape(make, jax.ShapeDtypeStruct((*lead, WIDTH, WIDTH), jnp.bfloat16))


def rows(m: int):
    return jax.ShapeDtypeStruct((m, WIDTH), jnp.bfloat16)


def temporary(device, function, *args) -> int:
    place = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), args)
    compiled = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("m", [1, 16, 1024])
def test_codes_are_read_in_the_product(device, m):
    assert temporary(device, int4_matmul, rows(m), weight()) < CODES // 2


def test_scanned_layers_are_read_in_place(device):
    def run(x, stack):
        return jax.lax.scan(lambda x, w: (int4_matmul(x, w), None), x, stack)[0]

    assert temporary(device, run, rows(4), weight(4)) < CODES // 2


def test_words_are_seen_to_be_made_dense(device):
    assert temporary(device, int4_matmul, rows(16), weight(pack=in_rows)) >= 2 * WIDTH * WIDTH
