#!/usr/bin/env bash
# Runs the tests against Transformer Engine's own classes, without a GPU, in an environment of their own: .venv-te, which sees
# .venv's packages (torch, this package, pytest) and adds Transformer Engine to them. `make test-te` makes .venv first.
#   TE_WHEEL=/path/to/transformer_engine_torch-….whl   that wheel, instead of a build from source: 9 minutes on 2 cores, and
#                                                      it needs a CUDA toolkit
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
release=2.20.2

stamp=.venv-te/ready-$(cat .ci/test_te.sh | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
  .venv/bin/python -m venv --clear .venv-te
  packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  below=$(.venv-te/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # addsitedir, because an editable install is itself a .pth file, which a plain path would not have read.
  echo "import site; site.addsitedir('$packages')" >"$below/zz_venv.pth"
  cuda=cu$(.venv/bin/python -c 'import torch; print(torch.version.cuda.split(".")[0])')
  .venv-te/bin/python -m pip install -q "transformer-engine-$cuda==$release" "transformer-engine==$release"
  # Without isolation: it is built against the torch that is there.
  .venv-te/bin/python -m pip install -q --no-build-isolation "${TE_WHEEL:-transformer-engine-torch==$release}"
  cp -rsn "$packages/nvidia" "$below/" # links: it looks for cuDNN beside itself
  touch "$stamp"
fi
.venv-te/bin/python -c 'import torch, transformer_engine.pytorch as te; print("Transformer Engine, and torch", torch.__version__)'
tests=(tests/fp8/test_te_classes.py)
if .venv-te/bin/python -c 'import megatron.core' 2>/dev/null; then tests+=(tests/megatron/test_quantized_experts.py); fi
found=$(.venv-te/bin/python -m pytest "${tests[@]}" -rs "$@" | tee /dev/stderr)
if grep -q SKIPPED <<<"$found"; then
  echo "test_te: some tests were skipped, so they show nothing" >&2
  exit 1
fi
