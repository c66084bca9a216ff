#!/usr/bin/env bash
# Everything of FP8 that needs a GPU, in one command within 6 minutes: one GPU of SM90 or later, shared by up to 8 ranks.
#
#   tests/gpu/fp8.sh [FOLDER]        default runs/fp8; needs nvcc, torch, pytest, Transformer Engine 2.20 and megatron-core
#
# Logs and results are in FOLDER; what fails or finds no time left loses nothing of the other parts. Start MPS before, so
# that ranks run at the same time: without it results are the same and times mean little.
#
#   PARTS="build bench"    only these; all: build tests bench training megatron
#   LIMIT=350              seconds for everything
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
out=${1:-runs/fp8}
limit=${LIMIT:-350}
parts=${PARTS:-build tests bench training megatron}
mkdir -p "$out"
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1
failed=0
summary=()

# part NAME SECONDS COMMAND...: runs it within its limit and what is left of the whole.
part() {
  local name=$1 seconds=$2 left=$((limit - SECONDS)) began=$SECONDS status=0
  shift 2
  [[ " $parts " == *" $name "* ]] || return 0
  ((seconds > left)) && seconds=$left
  if ((seconds < 10)); then
    summary+=("$name: NOT RUN, no time left")
    failed=1
    return 0
  fi
  timeout -s INT -k 10 "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
  ((status == 0)) || failed=1
  summary+=("$name: status $status after $((SECONDS - began)) s")
}

part build 90 python3 setup.py build_ext --inplace
part tests 200 python3 -m pytest tests/gpu/test_fp8.py tests/gpu/test_fp8_kernels.py tests/gpu/test_fp8_te.py --junitxml "$out/tests.xml" -rs
part bench 80 python3 -m deepep_train bench --table fp8 --num-processes 8 --deadline 75 --out "$out"
part training 110 python3 tests/gpu/train_fp8.py --deadline 100 --out "$out"
part megatron 100 python3 -m pytest tests/gpu/test_fp8_megatron.py --junitxml "$out/megatron.xml" -rs

for name in $parts; do
  [[ -f $out/$name.log ]] && printf '== %s\n%s\n' "$name" "$(grep -vE '^\s*$' "$out/$name.log" | tail -n 16)"
done
printf '%s\n' "${summary[@]}"
exit "$failed"
