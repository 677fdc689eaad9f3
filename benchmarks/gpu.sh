#!/usr/bin/env bash
# Tests and benchmarks that need a GPU, from a bare image: torch and triton, maybe no pytest, no
# pydantic, typer or minijinja, nothing installed. Rows go to $OUT (default benchmarks/results).
#
#   [OUT=folder] [PYTHON=python3] [SANITIZE=1] benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
export PYTHONPATH=.:kernels PYTHONSAFEPATH=1
has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
status=0

if ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "benchmarks/gpu.sh needs a CUDA device, and torch sees none." >&2
  exit 1
fi
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true

# The engine reads checkpoints through the extension; the kernels do not need it.
if ! has fastsafe._native; then
  if command -v "${CXX:-c++}" >/dev/null && has pybind11 && has setuptools; then
    "$PYTHON" setup.py --quiet build_ext --inplace || status=1
  else
    echo "fastsafe._native is not built: no C++ compiler, pybind11 or setuptools here" >&2
  fi
fi

if has pytest; then
  # Only files that hold GPU tests: the others may import what this image has not.
  mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
  "$PYTHON" -m pytest -m gpu -o filterwarnings=default -p no:cacheprovider "${files[@]}" || status=1
else
  echo "no pytest here: the kernels' own gate runs, the other GPU tests do not" >&2
  "$PYTHON" benchmarks/kernels.py --check || status=1
fi
# memcheck and racecheck slow every launch down many times: only when asked for.
if [ -n "${SANITIZE:-}" ]; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benchmarks/kernels.py --check || status=1
  done
fi
"$PYTHON" benchmarks/kernels.py --out "$OUT/kernels.jsonl" || status=1
# 16 and 32 adapters beside PEFT; the peer needs its libraries.
if has fastsafe._native && has transformers && has peft; then
  for n in 16 32; do
    "$PYTHON" benchmarks/train.py --device cuda --conditions $n --steps 4 --out "$OUT/train.jsonl" || status=1
  done
else
  echo "training is not measured: fastsafe._native, transformers or peft is missing here" >&2
fi
# 16 GB of random weights and 5 GB of adapters are written to a temporary folder.
if has fastsafe._native; then
  "$PYTHON" benchmarks/generate.py --device cuda --out "$OUT/generate.jsonl" || status=1
fi
exit $status
