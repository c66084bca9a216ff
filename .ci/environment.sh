#!/usr/bin/env bash
# Makes .venv with everything that training and testing need, once; says which Python it took.
#   usage: .ci/environment.sh [with-nvshmem]      (from anywhere; PYTHON=/path/to/python overrides the choice)
# with-nvshmem builds the rdma engine, too, and so do all later calls: tests look at it, training on one machine does not use it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The development pin, matched to the GPU machine; pyproject.toml holds what users need.
torch_pin="torch==2.11.0"

works() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

pick_python() { # 3.12 first (megatron-core needs it), then newer, then older; pyenv's own copies behind each
  if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; return; fi
  local version candidate
  for version in 3.12 3.13 3.11 3.10; do
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python; do
      candidate=$(command -v "$candidate" || true)
      if [ -n "$candidate" ] && works "$candidate"; then echo "$candidate"; return; fi
    done
  done
  echo "no Python from 3.10 on with venv was found; install one or set PYTHON=/path/to/python" >&2
  return 1
}

stamp=.venv/ready-$(cat pyproject.toml setup.py .ci/environment.sh | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
  python=$(pick_python)
  echo "environment: $("$python" --version) at $python"
  "$python" -m venv .venv
  .venv/bin/python -m pip install -q --upgrade "pip>=24" "setuptools>=68,<82" wheel "pybind11>=2.12"
  .venv/bin/python -m pip install -q "$torch_pin"
fi
if [ "${1:-}" = with-nvshmem ] || compgen -G ".venv/nvshmem-*" >/dev/null; then
  NVSHMEM_DIR=$(.ci/nvshmem.sh)
  export NVSHMEM_DIR
fi
kernels=.venv/kernels-$({ cat csrc/*.* csrc/*/*; echo "${NVSHMEM_DIR:-}"; } | cksum | cut -d' ' -f1)
what=()
if [ ! -e "$stamp" ]; then
  what=(-e ".[recipes,dev]")
elif [ ! -e "$kernels" ]; then # edits of Python take effect at once, those of the kernels do not
  what=(--no-deps -e .)
fi
if [ ${#what[@]} -gt 0 ]; then
  # Editable and without isolation: the build uses what is installed here, and edits take effect at once.
  .venv/bin/python -m pip install -q --no-build-isolation "${what[@]}"
  rm -f .venv/kernels-* .venv/ready-*
  touch "$kernels" "$stamp"
fi
echo "environment: .venv with $(.venv/bin/python --version), $(.venv/bin/python -m pip list 2>/dev/null | awk '$1 == "torch" {print "torch " $2}')"
