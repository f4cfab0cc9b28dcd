#!/usr/bin/env bash
# Everything that needs a GPU, in at most 9 minutes: numbers first right, then fast. Results go to benchmarks/results.
#   benchmarks/gpu_all.sh [FOLDER_OF_WHEELS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
from=${1:+--no-index --find-links "$1"}
# shellcheck disable=SC2086
pip install -q $from -e '.[cuda12]' pytest pytest-xdist hypothesis matplotlib
# Every call within one XLA program, kernels inside CUDA graphs.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
awq-jax doctor
JAX_PLATFORMS=cuda timeout 120 pytest -q -n0 benchmarks/gpu_checks.py
# What takes longer is cut short: the kernels leave the shapes they came to, the other batch still runs.
for batch in 1 16; do
  timeout 100 python benchmarks/decode.py benchmarks/llama_3_8b.json --batch "$batch" --prompt 128 --tokens 257 \
    --group 128 --runs 3 --name "decode_8b_batch_$batch" || [[ $? == 124 ]]
done
timeout 200 python benchmarks/kernels.py --tune || [[ $? == 124 ]]
python benchmarks/kernels_plot.py
