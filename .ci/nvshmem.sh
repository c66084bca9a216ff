#!/usr/bin/env bash
# Prints the folder of an NVSHMEM to build and test the rdma engine with: NVSHMEM_DIR if that is set, else the registry's 3.8,
# installed into a folder of its own in .venv, since torch pins an older one there. Where it cannot be had it prints nothing but
# a line to stderr that says why, and the engine is left out.
#   usage: .ci/nvshmem.sh      (.ci/environment.sh calls it, once .venv is there)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
package="nvidia-nvshmem-cu13==3.8.0" # cu13, as the torch that environment.sh installs

if [ -n "${NVSHMEM_DIR:-}" ]; then
  echo "$NVSHMEM_DIR"
  exit 0
fi
target=.venv/nvshmem-${package#*==}
if [ ! -d "$target" ]; then
  if ! .venv/bin/python -c 'import sys, setup; sys.exit(setup.find_nvcc() is None)'; then
    echo "nvshmem: there is no nvcc to compile with it, so the rdma engine is left out" >&2
    exit 0
  fi
  rm -rf "$target.part" # of an installation that was interrupted
  if ! why=$(.venv/bin/python -m pip install -q --no-deps --only-binary :all: --target "$target.part" "$package" 2>&1); then
    echo "nvshmem: the rdma engine is left out; the registry does not give $package to this machine: $(tail -n 1 <<<"$why")" >&2
    exit 0
  fi
  mv "$target.part" "$target"
  echo "nvshmem: $package in $target" >&2
fi
echo "$PWD/$target/nvidia/nvshmem"
