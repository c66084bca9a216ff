# Sourced by the scripts beside it, which set:
#   out      folder for logs           pack    where all of it is packed to after every part
#   parts    names of parts to run     limit   seconds for everything
# Checkpoints are not packed: compressing those of moe_lm took some 40 s an engine (878f42a, by the files' times).
# shellcheck shell=bash disable=SC2154
mkdir -p "$out"
summary=()

# part NAME SECONDS COMMAND...: runs it, if `parts` has NAME, or NAME up to its first "-", within its limit and what is left of the whole.
# What fails or finds no time left loses nothing of the others.
part() {
  local name=$1 seconds=$2 left=$((limit - SECONDS)) began=$SECONDS status=0
  shift 2
  [[ " $parts " == *" ${name%%-*} "* || " $parts " == *" $name "* ]] || return 0
  if ((left < 15)); then
    summary+=("$name: NOT RUN, no time left")
    return 0
  fi
  ((seconds > left)) && seconds=$left
  timeout -s INT -k 10 "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
  local said
  said=$(grep -aE "^=+ .* in [0-9.]+s" "$out/$name.log" | tail -n 1 | tr -d =)
  case $status in
  0) summary+=("$name: done in $((SECONDS - began)) s$said") ;;
  124 | 137) summary+=("$name: STOPPED at its limit of $seconds s$said") ;;
  *) summary+=("$name: FAILED with status $status after $((SECONDS - began)) s$said") ;;
  esac
  echo "== ${summary[-1]}"
  tar -czf "$pack" --exclude=checkpoints --exclude='step-*' -C "$(dirname "$out")" "$(basename "$out")"
}

# The summary; false if a part failed, was stopped or not run, but for those called rest-*, which get what time is left.
finish() {
  printf '%s\n' "${summary[@]}" "$SECONDS s in all; everything is in $out and $pack"
  ! {
    printf '%s\n' "${summary[@]}" | grep -E '^[^:]+: FAILED|[0-9]+ (failed|error)'
    printf '%s\n' "${summary[@]}" | grep -v '^rest-' | grep -E 'STOPPED|NOT RUN'
  } | grep -q .
}
