#!/usr/bin/env bash
# Everything that needs a GPU, in at most 9 minutes: numbers first right, then fast.
#   benchmarks/gpu_all.sh [FOLDER_OF_WHEELS]
# Without network the folder holds this project and what the machine lacks (pip wheel --no-deps -w FOLDER . PACKAGE ...).
# Results go to benchmarks/results; if OUT names a folder, there too, with the table that tuning wrote. A step that fails
# or takes longer than its share leaves what it had and the others run; each can be run again alone.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1
# Kernels inside CUDA graphs; memory left for other projects' kernels.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
export XLA_PYTHON_CLIENT_MEM_FRACTION=.6 JAX_PLATFORMS=cuda,cpu
started=$(mktemp)
failed=()

step() {
  local seconds=$1
  shift
  echo "== $*"
  timeout -k 5 "$seconds" "$@" || failed+=("$* (exit code $?)")
}

bring() {
  local table
  table=$(python3 -c 'from awq_jax.kernels import table; print(table.__file__[:-3] + ".json")')
  if [[ -n ${OUT:-} ]]; then
    find benchmarks/results "$table" -newer "$started" -type f -exec cp {} "$OUT" \;
  fi
}
trap bring EXIT

if (($#)); then
  python3 -m pip install -q --no-index --no-deps "$1"/*.whl
else
  python3 -m pip install -q -e '.[cuda12]' pytest hypothesis matplotlib
fi || exit

step 20 awq-jax doctor
step 120 python3 -m pytest -q -p no:xdist benchmarks/gpu_checks.py
if command -v compute-sanitizer >/dev/null; then
  some="ragged or 13-bfloat16-128 or 40-bfloat16-128"
  step 40 compute-sanitizer --error-exitcode 1 python3 -m pytest -q -p no:xdist benchmarks/gpu_checks.py -k "$some"
fi
step 60 python3 benchmarks/kernels.py --tune 40
step 110 python3 benchmarks/kernels.py
step 80 python3 benchmarks/decode.py benchmarks/llama_3_8b.json --batch 1 16 4 --prompt 128 --tokens 257 --group 128 \
  --runs 3 --name decode_8b
step 80 python3 benchmarks/quantize_shapes.py benchmarks/llama_3_8b.json --name quantize_8b
step 15 python3 benchmarks/kernels_plot.py
((${#failed[@]} == 0)) || {
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
}
