#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in the Python environment that is active: build with CUDA, the battery on CUDA tensors,
# compute-sanitizer on a small part of it, and the benchmarks. A stage that fails or runs out of its time doesn't stop the
# next ones; all of them together end within TOTAL seconds. Logs, bench.json and summary.txt go to OUT. No network is needed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-out}")
TOTAL=${TOTAL:-580}
PYTHON=${PYTHON:-$(command -v python3)}
mkdir -p "$OUT"
: >"$OUT/summary.txt"
export PYTHONUNBUFFERED=1 FASTADAPT_BUILD=cuda PIP_BREAK_SYSTEM_PACKAGES=1
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)}
failed=0

say() { echo "$*" | tee -a "$OUT/summary.txt"; }

# stage NAME SECONDS LOG COMMAND...: an interrupt first, so that the benchmarks write what they have.
stage() {
  local name=$1 limit=$2 log=$OUT/$3 start=$SECONDS rc=0
  shift 3
  local left=$((TOTAL - SECONDS))
  if ((left < 15)); then
    say "$name: skipped, no time is left"
    failed=1
    return 1
  fi
  ((limit = limit < left - 10 ? limit : left - 10))
  echo "== $name: $*" | tee -a "$log"
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log" || rc=$?
  case $rc in
    0) say "$name: ok, $((SECONDS - start)) s" ;;
    124 | 137) say "$name: stopped after $limit s" ;;
    *) say "$name: FAILED with $rc, $((SECONDS - start)) s" ;;
  esac
  ((rc == 0)) || failed=1
  return "$rc"
}

describe() {
  nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  nvcc --version | tail -n 2
  "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, "CUDA", torch.version.cuda)'
}
export -f describe
export PYTHON

rm -f "$OUT"/{build,tests,sanitizer,bench}.log "$OUT/bench.json"
stage machine 30 build.log bash -c describe
stage build 150 build.log "$PYTHON" -m pip install --no-build-isolation --no-deps --editable .

workers=()
"$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
check=()
stage battery 200 tests.log "$PYTHON" -m pytest tests/test_ops.py -q "${workers[@]}" || check=(--no-check)

# Each allocation by itself, so that a read past its end is seen; of the kernels only those of this package's namespace.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
few="test_matches_reference and native and (m33-d65-r17 or bank-with-everything) and (float32 or bfloat16)"
for tool in memcheck racecheck; do
  stage "$tool" 60 sanitizer.log compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kns=fastadapt \
    "$PYTHON" -m pytest tests/test_ops.py -q -x -p no:cacheprovider -k "$few"
done
unset PYTORCH_NO_CUDA_MEMORY_CACHING

stage overhead 40 bench.log "$PYTHON" -m benchmarks.run --overhead
stage benchmarks 600 bench.log "$PYTHON" -m benchmarks.run --quick --dtype bfloat16 float32 --timer graph launch \
  --out "$OUT/bench.json" "${check[@]}"

say "total: $SECONDS s, logs in $OUT"
cat "$OUT/summary.txt"
exit "$failed"
