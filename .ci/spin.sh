#!/usr/bin/env bash
# Installs Debian's spin, which checks the model in tests/model, where that is possible; its tests are skipped elsewhere.
#   usage: .ci/spin.sh
set -euo pipefail
if command -v spin >/dev/null; then exit 0; fi
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  if { apt-get update && apt-get install -y --no-install-recommends spin; } >/dev/null 2>&1; then
    echo "spin: installed"
    exit 0
  fi
fi
echo "spin: not installed and cannot be; the tests of the protocol's model will be skipped"
