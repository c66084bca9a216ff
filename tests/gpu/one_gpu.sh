#!/usr/bin/env bash
# All that one GPU can show of this library, in one command: tests/gpu, the benchmark's tables, the scripts of DeepEP's users, failures,
# sanitizers, a soak on the debug build. Its parts' limits add up to 6,570 s; each has a log of its own.
#
#   tests/gpu/one_gpu.sh [FOLDER]        default runs/one_gpu; needs the package built in place, torch, pytest
#
# Ranks are processes that share the GPU. Parts whose ranks must run at once come under MPS, which is started for them here; without it
# processes take turns, which failures and sanitizers are looked at with. A summary ends the output.
#
#   PARTS="rdma bench"     only these; all, in this order: nvlink rdma stages ll scripts generate losses bench turns kills stops
#                          streams sanitizers debug
#   LIMIT=6600             seconds for everything
#   GPU=0                  which; two of these scripts may run on two GPUs of one machine
#   PEER=path              a folder with DeepEP V1, measured beside (docs/performance.md)
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
out=${1:-runs/one_gpu}
pack=${PACK:-$out.tar.gz}
limit=${LIMIT:-6600}
parts=${PARTS:-nvlink rdma stages ll scripts generate losses bench turns kills stops streams sanitizers debug}
gpu=${GPU:-0}
. tests/gpu/parts.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
# A program that uses NVLink multicast can put GPUs of a shared host out of service.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
tests=(python3 -m pytest -vv -p no:cacheprovider --tb=short --durations=5)
two=(python3 -m torch.distributed.run --standalone --nproc-per-node 2)
peer=()
[[ -n ${PEER:-} ]] && peer=(--peer "$PEER")
control=$(PATH=$PATH:/usr/local/nvidia/bin command -v nvidia-cuda-mps-control)

mps() { # start | end
  export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps-of-gpu-$gpu CUDA_MPS_LOG_DIRECTORY=/tmp/mps-of-gpu-$gpu/log
  if [[ $1 == start ]]; then
    mkdir -p "$CUDA_MPS_LOG_DIRECTORY"
    CUDA_VISIBLE_DEVICES=$gpu "$control" -d && sleep 1
    export CUDA_VISIBLE_DEVICES=0
  else
    echo quit | timeout 30 "$control"
    export CUDA_MPS_PIPE_DIRECTORY=/nonexistent CUDA_VISIBLE_DEVICES=$gpu
  fi
}

[[ -n $control ]] || { echo "nvidia-cuda-mps-control is neither on PATH nor in /usr/local/nvidia/bin" >&2; exit 2; }
mps start
part nvlink 110 "${tests[@]}" tests/gpu/test_nvlink.py
DEEPEP_TRAIN_SOAK=2000 part nvlink-streams 150 "${tests[@]}" tests/gpu/test_nvlink_streams.py
part nvlink-hazards 180 "${tests[@]}" tests/gpu/test_nvlink_hazards.py
part nvlink-handles 90 "${tests[@]}" tests/gpu/test_nvlink_handles.py
part nvlink-surroundings 130 "${tests[@]}" tests/gpu/test_nvlink_surroundings.py
DEEPEP_TRAIN_SOAK=2000 part rdma 240 "${tests[@]}" tests/gpu/test_rdma.py -k "not killed"
part rdma-calls 480 "${tests[@]}" tests/gpu/test_rdma_calls.py
part rdma-training 90 "${tests[@]}" tests/gpu/test_rdma_training.py -k "not racecheck"
# Meshes of more than two nodes have more than one stage.
DEEPEP_TRAIN_RAIL_STAGES=3 part stages 330 "${tests[@]}" tests/gpu/test_rdma.py tests/gpu/test_rdma_calls.py -k "4x1 or 4x2 or other_rows"
for stages in 1 3; do
  DEEPEP_TRAIN_RAIL_STAGES=$stages part stages-bench-$stages 60 python3 -m deepep_train bench --table rdma --ranks 8 --num-local-ranks 2 \
    --out "$out/stages-$stages"
done
part ll-kernels 300 "${tests[@]}" tests/gpu/test_low_latency_kernels.py
part ll-nodes 280 "${tests[@]}" tests/gpu/test_low_latency_nodes.py
part scripts-intranode 60 python3 tests/test_intranode.py --num-processes 8 --num-tokens 1024 --no-tuning --deadline 55
part scripts-internode 60 python3 tests/test_internode.py --num-processes 8 --num-local-ranks 4 --engine rdma --num-tokens 1024 --no-tuning --deadline 55
part scripts-ll 60 python3 tests/test_low_latency.py --num-processes 8 --deadline 55
part scripts-ll-nodes 60 python3 tests/test_low_latency.py --num-processes 8 --num-local-ranks 4 --deadline 55
part generate-train 60 "${two[@]}" recipes/moe_lm/train.py --device cuda --steps 60 --batch 4 --eval-every 60 --eval-sequences 16 \
  --save-every 60 --sample-bytes 0 --out "$out/moe_lm"
part generate 60 "${two[@]}" recipes/moe_lm/generate.py --folder "$out/moe_lm" --device cuda --exchange both --bytes 120
rm -rf "$out/moe_lm/checkpoints"
part losses 250 "${tests[@]}" -s tests/gpu/test_moe_lm_losses.py
part bench 120 python3 -m deepep_train bench --table gpu --ranks 8 --out "$out/gpu" "${peer[@]}"
part bench-rdma 60 python3 -m deepep_train bench --table rdma --ranks 8 --num-local-ranks 4 --out "$out/rdma"
part bench-ll 60 python3 -m deepep_train bench --table low-latency --ranks 8 --out "$out/low_latency"
DEEPEP_TRAIN_KILLS=3 part kills-mps 90 "${tests[@]}" tests/gpu/test_nvlink_failures.py -k killed # last: it takes MPS down for seconds
mps end
part turns 240 "${tests[@]}" tests/gpu/test_nvlink.py # processes that take turns on the GPU
DEEPEP_TRAIN_KILLS=20 part kills 360 "${tests[@]}" tests/gpu/test_nvlink_failures.py -k killed
DEEPEP_TRAIN_KILLS=6 part kills-ll 400 "${tests[@]}" tests/gpu/test_low_latency_failures.py
part kills-rdma 120 "${tests[@]}" tests/gpu/test_rdma.py -k killed
DEEPEP_TRAIN_STOPS=5 part stops 170 "${tests[@]}" tests/gpu/test_nvlink_failures.py -k stopped
part streams 300 "${tests[@]}" tests/gpu/test_in_process.py -k "streams or late_rank"
part sanitizers-race 300 "${tests[@]}" tests/gpu/test_in_process.py -k racecheck
part sanitizers-memory 300 "${tests[@]}" tests/gpu/test_in_process.py -k memcheck
part sanitizers-rdma 250 "${tests[@]}" tests/gpu/test_rdma_training.py -k racecheck
if [[ " $parts " == *" debug "* ]]; then # a build of its own: random delays at every flag, memory full of NaN
  mps start
  debug=$(mktemp -d)
  cp -r setup.py pyproject.toml README.md csrc deepep_train tests "$debug" && rm -f "$debug"/deepep_train/_*.so
  part debug-build 150 env -u NVSHMEM_DIR DEEPEP_TRAIN_DEBUG=1 sh -c "cd $debug && python3 setup.py build_ext --inplace"
  DEEPEP_TRAIN_SOAK=2000 PYTHONPATH=$debug:$PYTHONPATH part debug 240 sh -c "cd $debug && ${tests[*]} tests/gpu/test_nvlink_streams.py"
  PYTHONPATH=$debug:$PYTHONPATH part debug-ll 300 sh -c "cd $debug && ${tests[*]} tests/gpu/test_low_latency_kernels.py"
  rm -rf "$debug"
  mps end
fi
finish
