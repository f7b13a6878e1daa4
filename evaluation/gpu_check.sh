#!/usr/bin/env bash
# What needs a GPU, checked unattended in under eight minutes, without a network:
#   bash evaluation/gpu_check.sh [FOLDER]
# A line a figure as it is measured; every row is in FOLDER (outputs/gpu_check) at once, as JSON, so
# nothing is lost when the machine is. What takes too long is left out, and says so.
#   PYTHON=…  another python;  DEVICE=cpu TEACHER=digits  tries the script itself, in small.
set -u
cd "$(dirname "$0")/.."
out=${1:-outputs/gpu_check} python=${PYTHON:-python} device=${DEVICE:-cuda} size=${TEACHER:-base}
small=${TEACHER:-small} batches=(1 64 256) batch=64 dtype=bfloat16 rounds=8
[ "$device" = cpu ] && batches=(2) batch=2 dtype=float32 rounds=1
workers=$(($(nproc) > 15 ? 14 : $(nproc) - 1))
mkdir -p "$out"
out=$(realpath "$out")
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$out/compiled"
failed=0

check() { # seconds, name, command …
  local limit=$1 name=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout -k 5 "$limit" "$@" 2> >(tee "$out/$name.err" | grep -E "Error|error:" >&2) | tee "$out/$name.log"
  local code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || failed=1
  echo "== $name: exit $code after $((SECONDS - start)) s"
}

suite() { # seconds, suite, options …
  local limit=$1 name=$2
  shift 2
  check "$limit" "$name" "$python" -m evaluation.benchmarks "$name" --device "$device" --dtype "$dtype" \
    --output_dir "$out" --folder "$out/files" "$@"
}

[ "$device" = cpu ] && export TESTS_GPU_DEVICE=cpu
suite 110 model --teacher "$size" --forms plain compiled graphs float8 --batch_sizes "${batches[@]}" --rounds "$rounds" \
  --row_limit 40
suite 80 train_step --teacher "$size" --forms plain compiled --batch_sizes "$batch" --rounds 2 --row_limit 60
suite 80 train --teacher "$small" --forms compiled graphs --batch_sizes "$batch" --steps 90 --num_workers "$workers" --row_limit 60
check 60 tests "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py -m gpu
suite 45 images --images 64 --rounds 1
suite 40 activations --teacher "$size" --images 128 --rounds 3
suite 60 model --teacher "$size" --forms autotuned --batch_sizes "$batch" --rounds "$rounds" --output_dir "$out/autotuned"
rm -rf "$out/files" "$out/compiled"
echo "== all: exit $failed, results in $out"
exit "$failed"
