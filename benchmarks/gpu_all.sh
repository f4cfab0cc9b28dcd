#!/usr/bin/env bash
# Everything that needs a GPU, in at most 9 minutes: numbers first right, then fast. Results go to benchmarks/results.
#   benchmarks/gpu_all.sh [FOLDER_OF_WHEELS]
# What takes longer than its share is cut short and leaves what it had; each line can be run again alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
from=${1:+--no-index --find-links "$1"}
# shellcheck disable=SC2086
pip install -q $from -e '.[cuda12]' pytest pytest-xdist hypothesis matplotlib
# Every call within one XLA program, kernels inside CUDA graphs; memory left for other projects' kernels.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
export XLA_PYTHON_CLIENT_MEM_FRACTION=.6

within() { timeout "$@" || [[ $? == 124 ]]; }

awq-jax doctor
JAX_PLATFORMS=cuda timeout 100 pytest -q -n0 benchmarks/gpu_checks.py
within 70 python benchmarks/kernels.py --tune 60
within 150 python benchmarks/kernels.py
for batch in 1 16 4; do
  within 45 python benchmarks/decode.py benchmarks/llama_3_8b.json --batch "$batch" --prompt 128 --tokens 257 \
    --group 128 --runs 3 --name "decode_8b_batch_$batch"
done
within 60 python benchmarks/quantize_shapes.py benchmarks/llama_3_8b.json --name quantize_8b
python benchmarks/kernels_plot.py
