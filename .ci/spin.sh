#!/usr/bin/env bash
# Gets Debian's spin, which checks the models in tests/model: installed where that is allowed, else unpacked into .venv/spin,
# whose usr/bin .ci/run has on PATH. Where neither is possible it says why, and those tests are skipped.
#   usage: .ci/spin.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$PWD/.venv/spin
impatient=(-o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20) # CI's time is short

skip() {
  echo "spin: THE MODELS OF THE PROTOCOLS WILL NOT BE CHECKED (tests/model is skipped): $1"
  exit 0
}

unpack() { # as any user: with package lists, cache and packages of its own
  local options=("${impatient[@]}" -o "Dir::State::lists=$folder.part/lists" -o "Dir::Cache=$folder.part/cache")
  rm -rf "$folder.part"
  mkdir -p "$folder.part/lists/partial" "$folder.part/cache/archives/partial" "$folder.part/root"
  (
    cd "$folder.part" || exit
    { apt-get "${options[@]}" update && apt-get "${options[@]}" download spin && dpkg -x ./spin_*.deb root; } 2>&1
  ) && "$folder.part/root/usr/bin/spin" -V && rm -rf "$folder" && mv "$folder.part/root" "$folder"
}

PATH=$folder/usr/bin:$PATH
if command -v spin >/dev/null; then
  echo "spin: $(command -v spin)"
  exit 0
fi
command -v apt-get >/dev/null || skip "there is no spin, and no apt-get to get it with"
if [ "$(id -u)" = 0 ] && { apt-get "${impatient[@]}" update && apt-get "${impatient[@]}" install -y --no-install-recommends spin; } \
  >/dev/null 2>&1; then
  echo "spin: installed"
  exit 0
fi
command -v dpkg >/dev/null || skip "spin could not be installed, and there is no dpkg to unpack it with"
trap 'rm -rf "$folder.part"' EXIT
why=$(unpack) || skip "spin could be neither installed nor unpacked: $(tail -n 1 <<<"$why")"
echo "spin: unpacked into $folder"
