# make train   trains an MoE language model on two expert-parallel ranks      make test   lints and tests
# make train-megatron   the same on Megatron-Core
# make test-te   the tests with Transformer Engine's classes, in .venv-te: see .ci/test_te.sh, not part of CI
# All set up .venv first. ARGS is passed on: make train ARGS="--steps 50 --data ~/texts"
.PHONY: train train-megatron test test-te lint format environment
ARGS ?=
# Files of tests at a time. Ranks of a test wait for one another half of the time; each file more takes up to 8 GB.
JOBS ?= 2
NPROC ?= 2
BIN := .venv/bin

environment:
	@.ci/environment.sh $(WITH)

# Input that cannot be used is refused by the first command in one line; torchrun would add a traceback of its own to it.
train: environment
	@WORLD_SIZE=$(NPROC) $(BIN)/python recipes/moe_lm/train.py --dry-run $(ARGS)
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) recipes/moe_lm/train.py $(ARGS)

train-megatron: environment
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) recipes/megatron/pretrain.py $(ARGS)

test: WITH := with-nvshmem
# Hundreds of processes import the package: where the environment forbids bytecode, each would compile it again.
test: environment lint
	NVSHMEM_DIR="$$(.ci/nvshmem.sh)" env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-te: environment
	@.ci/test_te.sh $(ARGS)

lint: environment
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	files="$$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.hpp' '*.h')"; [ -z "$$files" ] || $(BIN)/clang-format --dry-run -Werror $$files
	$(BIN)/shellcheck $$(git ls-files '*.sh' '*.sbatch' .ci/run)

format: environment
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	files="$$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.hpp' '*.h')"; [ -z "$$files" ] || $(BIN)/clang-format -i $$files
