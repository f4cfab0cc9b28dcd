#!/usr/bin/env bash
# A folder of wheels for a GPU machine without network: this project, what it needs beyond PyTorch, JAX, flax, orbax and
# transformers, and the peers of gpu_kernels.py.
#   benchmarks/gpu_wheels.sh FOLDER
# For Python 3.12 on x86-64 Linux with jax 0.11 and triton 3.6, which jax-triton 0.3.1 fits. This project's wheel is made
# anew each time, the others are fetched once. PYTHON names the interpreter whose pip runs.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

needed=(
  jax-triton==0.3.1
  gguf==0.19.0
  tyro==1.0.17 docstring-parser==0.18.0 typeguard==4.6.1
)
peers=(
  humming-kernels==0.1.19
  tokamax==0.0.17 qwix==0.1.8 einshape==1.0 immutabledict==4.3.1
  pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5
)
platforms=()
for version in 2_17 2_27 2_28; do platforms+=(--platform "manylinux_${version}_x86_64"); done

fetch() {
  local file=${1%%==*}
  if compgen -G "$folder/${file//-/_}-${1##*==}-*.whl" >/dev/null; then return; fi
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -d "$folder" "$1"
}

rm -f "$folder"/awq_jax-*.whl
"$python" -m pip wheel -q --no-deps -w "$folder" .
for package in "${needed[@]}" "${peers[@]}"; do fetch "$package"; done
# Has no wheel; it is pure Python.
compgen -G "$folder/gemlite-*.whl" >/dev/null ||
  "$python" -m pip wheel -q --no-deps -w "$folder" gemlite==0.6.0.post2
rm -rf build

du -ch "$folder"/*.whl
