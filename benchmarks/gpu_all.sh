#!/usr/bin/env bash
# Everything that needs a GPU, in at most 9 minutes: numbers first right, then fast. Results go to benchmarks/results.
#   benchmarks/gpu_all.sh [FOLDER_OF_WHEELS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
from=${1:+--no-index --find-links "$1"}
# shellcheck disable=SC2086
pip install -q $from -e '.[cuda12]' pytest pytest-xdist hypothesis
# Every call within one XLA program, kernels inside CUDA graphs.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
awq-jax doctor
JAX_PLATFORMS=cuda timeout 120 pytest -q -n0 benchmarks/gpu_checks.py
timeout 400 python benchmarks/kernels.py --tune
