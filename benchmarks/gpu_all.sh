#!/usr/bin/env bash
# Everything that needs a GPU: numbers first right, then fast. See README.md beside this.
#   benchmarks/gpu_all.sh [FOLDER_OF_WHEELS] [STEP[:SECONDS] ...] [--results FOLDER]
# Without network the first folder holds this project and what the machine lacks: gpu_wheels.sh makes it. Results go to
# benchmarks/results or the folder named; the tilings that tuning finds, to table.json of the installed package.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1
# Kernels inside CUDA graphs.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}

if [[ -d ${1:-} ]]; then
  python3 -m pip install -q --no-index --no-deps --force-reinstall "$1"/*.whl
  shift
else
  python3 -m pip install -q -e '.[cuda12]'
fi || exit
python3 benchmarks/gpu_steps.py "$@"
