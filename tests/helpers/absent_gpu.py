"""XLA's whole GPU compiler for a GPU that is not here. Needs the jax-cuda12-plugin and jax-cuda12-pjrt wheels."""

import functools as ft
import os

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awq_jax import kernels

# What XLA asks of a GPU, in numbers that NVIDIA publishes for the H200.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a" device_address_bits: 64
  name: "NVIDIA H200" driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


# The same of the T4.
T4 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1024
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 65536 shared_memory_per_core: 65536
  core_count: 40 fpus_per_core: 64 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 320000000000 l2_cache_size: 4194304 clock_rate_ghz: 1.59 device_memory_size: 15843721216
  cuda_compute_capability { major: 7 minor: 5 }
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 7.5" device_address_bits: 64
  name: "Tesla T4" driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "Tesla T4"
"""
GPUS = {90: H200, 75: T4}


@ft.cache
def mesh(architecture: int, devices: int = 1) -> Mesh:
    name, config = f"{devices} of sm_{architecture}", GPUS[architecture]
    topology = topologies.get_topology_desc(name, "cuda", target_config=config, topology=f"1x1x{devices}")
    return Mesh(np.array(topology.devices), ("x",))


def compile_for(architecture: int, function, *args, **options):
    """The compiled program of arrays like `args`, on one GPU if they are not said to be cut; options of XLA."""
    whole = NamedSharding(mesh(architecture), PartitionSpec())
    place = lambda a: a.sharding if isinstance(a.sharding, NamedSharding) else whole
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(a)), args)
    with kernels.target(architecture):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options={"xla_gpu_autotune_level": 0, **options})


compile_for_h200 = ft.partial(compile_for, 90)
