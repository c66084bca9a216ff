#!/usr/bin/env bash
# Everything that needs several GPUs of one host, in one command and 10 minutes: one process a GPU, any number of GPUs.
#
#   tests/gpu/several_gpus.sh [FOLDER]        default runs/several_gpus; needs nvcc, torch, pytest, and, for their parts,
# NVSHMEM (NVSHMEM_DIR or the registry's) and megatron-core; in bf16 Megatron takes Transformer Engine's layers where they are
#
# Each part has a time limit of its own and a log in FOLDER; what fails or finds no time left loses nothing of the others. After
# every part all of FOLDER is packed into $PACK (default FOLDER.tar.gz). A summary ends the output.
#
#   PARTS="build bench"    only these; all: build doctor bench moe_lm megatron new suites checks rest
#   LIMIT=575              seconds for everything; two H100s took 70 for moe_lm, 66 for new, 63 for suites
#   PEER=path              a folder with DeepEP V1 (deep_ep/ and what it was built to), measured beside
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
out=${1:-runs/several_gpus}
pack=${PACK:-$out.tar.gz}
limit=${LIMIT:-575}
parts=${PARTS:-build doctor bench moe_lm megatron new suites checks rest}
. tests/gpu/parts.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
# A program that uses NVLink multicast can put GPUs of a shared host out of service.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
torchrun() { echo python3 -m torch.distributed.run --standalone --nproc-per-node "$gpus" "$@"; }

if ((gpus < 2)); then
  echo "several GPUs are needed, torch sees $gpus" >&2
  exit 2
fi
peer=()
[[ -n ${PEER:-} ]] && peer=(--peer "$PEER")
tests=(python3 -m pytest -vv -p no:cacheprovider --tb=short)
# Large enough for the GPUs to be busy, small enough for 200 steps in a few seconds.
read -ra moe_lm <<<"$(torchrun recipes/moe_lm/train.py --steps 200 --layers 4 --dim 512 --heads 8 --ffn 512 --experts $((8 * gpus)) \
  --top-k 4 --seq 512 --batch 16 --eval-every 200 --eval-sequences 16 --save-every 1000 --sample-bytes 0)"
read -ra megatron <<<"$(torchrun recipes/megatron/pretrain.py --steps 200 --layers 4 --hidden 2048 --heads 16 --ffn 1024 \
  --experts 32 --top-k 8 --sequence 2048 --micro-batch 4 --micro-batches 1 --save-every 0)"

part build 120 python3 setup.py build_ext --inplace
part doctor 40 bash -c "nvidia-smi; nvidia-smi topo -m; nvidia-smi nvlink --status; python3 -m deepep_train doctor"
part bench 150 python3 -m deepep_train bench --table links --out "$out" --deadline 145 "${peer[@]}"
for engine in nvlink collective; do
  part "moe_lm-$engine" 60 "${moe_lm[@]}" --engine "$engine" --out "$out/moe_lm-$engine"
  rm -rf "$out/moe_lm-$engine/checkpoints"
done
for dispatcher in deepep_train alltoall; do
  part "megatron-$dispatcher" 90 "${megatron[@]}" --dispatcher "$dispatcher" --out "$out/megatron-$dispatcher"
  rm -rf "$out/megatron-$dispatcher"/step-*
done
part megatron-layer 60 python3 -m deepep_train bench --megatron --num-processes "$gpus" --out "$out/megatron-layer"
part new 90 "${tests[@]}" tests/gpu/test_several_gpus.py
# What has as many ranks as there are GPUs: of rdma as nodes of one GPU each, and as two nodes.
export DEEPEP_TRAIN_ONLY_RANKS=$gpus
part suites 200 "${tests[@]}" tests/gpu/test_rdma.py tests/gpu/test_rdma_calls.py tests/gpu/test_nvlink.py \
  tests/gpu/test_low_latency_kernels.py tests/gpu/test_low_latency_nodes.py
part checks 60 python3 tests/test_intranode.py --num-processes "$gpus" --no-tuning --deadline 55
# As far as the time goes: not a failure if there is none.
part rest-suites 200 "${tests[@]}" tests/gpu/test_nvlink_streams.py tests/gpu/test_nvlink_hazards.py tests/gpu/test_nvlink_handles.py \
  tests/gpu/test_nvlink_surroundings.py tests/gpu/test_rdma_training.py
unset DEEPEP_TRAIN_ONLY_RANKS
# As many ranks as a domain may have; where ranks share a GPU, they take turns.
part rest-64 150 "${tests[@]}" tests/gpu/test_nvlink_surroundings.py -k lanes
part rest-streams 60 "${tests[@]}" tests/gpu/test_in_process.py -k "not sanitizers"

echo "================ $gpus GPUs"
grep -hE "peer copies|best GB/s|the arena was too small" "$out/bench.log" 2>/dev/null
grep -HE "tokens/s" "$out"/moe_lm-*.log "$out"/megatron-*.log 2>/dev/null | grep -E "median" | sed "s|^$out/||"
grep -HE "FAILED|ERROR |^=+ .* in [0-9.]+" "$out"/new.log "$out"/suites.log "$out"/rest-*.log 2>/dev/null | sed "s|^$out/||"
tail -n 3 "$out"/checks.log 2>/dev/null
finish
