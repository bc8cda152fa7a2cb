#!/usr/bin/env bash
# Everything that needs a GPU, in at most 10 minutes: build for it, smoke test, first times, tests/cuda, sanitizers, the
# remaining times. Needs torch >= 2.11 with CUDA, nvcc, g++, Python >= 3.11; no network, nothing is installed.
#
#     benchmarks/gpu_check.sh [FOLDER]     default: $OUT, else benchmarks/results/gpu
#
# Each part has its own time, and a failure or a hang of one does not keep the next from running. Leaves at most 8 files.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-${OUT:-$root/benchmarks/results/gpu}}
mkdir -p "$out" && cd "$root" || exit 1
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
bench=("$python" -m gunn_ext bench layer --device cuda)
failures=0
summary=$out/summary.txt
: >"$summary"

# part NAME SECONDS LOG COMMAND…: runs it, keeps the last 200 kB of what it says, notes how it ended.
part() {
  local name=$1 limit=$2 log=$3 began=$SECONDS status
  shift 3
  # Whatever the parts before took: ten minutes are ten minutes.
  [ "$limit" -le $((585 - SECONDS)) ] || limit=$((585 - SECONDS))
  [ "$limit" -ge 10 ] || { skip "$name" "no time left"; return 1; }
  printf '\n== %s (at %s s, at most %s s)\n' "$name" "$SECONDS" "$limit"
  timeout --kill-after=10 "$limit" "$@" >"$scratch/log" 2>&1
  status=$?
  { printf '== %s: %s\n' "$name" "$*"; tail --bytes 200000 "$scratch/log"; } >>"$out/$log"
  tail --lines 12 "$scratch/log"
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict="OUT OF TIME" ;;
    *) verdict="FAILED ($status)" ;;
  esac
  [ "$status" = 0 ] || failures=$((failures + 1))
  printf '%-28s %-14s %4s s  %s\n' "$name" "$verdict" $((SECONDS - began)) "$log" | tee -a "$summary"
  return "$status"
}
skip() { printf '%-28s %-14s %s\n' "$1" SKIPPED "$2" | tee -a "$summary"; }

rm -f "$out"/{environment.txt,build.txt,tests.txt,sanitizers.txt,times.txt,times.json,kernels.txt}

describe() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit --format=csv
  "$python" -c 'import json, gunn_ext; print(json.dumps(gunn_ext.info(), indent=1))'
  git describe --always --dirty 2>/dev/null || true
}

if part build 170 build.txt "$python" benchmarks/gpu_build.py; then
  describe >"$out/environment.txt" 2>&1
  part "smoke test" 40 tests.txt "$python" benchmarks/gpu_small.py
  # Should the persistent driver be wrong or hang, it is left out of what follows.
  persistent=no
  part "smoke test, persistent" 40 tests.txt "$python" benchmarks/gpu_small.py --driver persistent && persistent=yes
  part "times, staged" 50 times.txt "${bench[@]}" --minutes 0.6 --peers 'ours staged*graphed;sunn graphed' \
    --json "$out/times.json" --profile "$out/kernels.txt"
  everyone='ours staged*;sunn;sunn graphed;eager;eager graphed'
  if [ "$persistent" = yes ] && part "times, persistent" 50 times.txt "${bench[@]}" --minutes 0.6 --peers 'ours*graphed;sunn graphed' \
    --json "$scratch/times.json" --profile "$scratch/kernels.txt"; then
    mv "$scratch/times.json" "$scratch/kernels.txt" "$out"
    everyone="ours persistent*;$everyone"
  fi
  rm -f "$scratch/times.json"
  if "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
    workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 4")
    # shellcheck disable=SC2086
    part "tests/cuda" 160 tests.txt "$python" -m pytest -q -rs --tb=short --maxfail=30 -p no:cacheprovider $workers \
      tests/cuda $([ "$persistent" = yes ] || echo --ignore=tests/cuda/test_persistent.py)
  else
    skip "tests/cuda" "pytest or hypothesis is missing: ONLY THE SMOKE TEST RAN"
  fi
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [ -n "$sanitizer" ]; then
    for driver in staged $([ "$persistent" = yes ] && echo persistent); do
      for tool in memcheck racecheck synccheck; do
        # Caching would hide an access behind the end of a tensor.
        part "$tool, $driver" 25 sanitizers.txt env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
          --error-exitcode 86 --kernel-name regex:gunn "$python" benchmarks/gpu_small.py --few --driver "$driver"
      done
    done
  else
    skip sanitizers "no compute-sanitizer on this machine: NO MEMORY OR RACE CHECK RAN"
  fi
  left=$((585 - SECONDS))
  if [ "$left" -gt 30 ]; then
    minutes=$("$python" -c "print(($left - 25) / 60)")
    # Not the compiled peers: they take minutes to compile.
    part "times, all that fit" "$left" times.txt "${bench[@]}" --minutes "$minutes" \
      --peers "$everyone" --json "$scratch/times.json"
    [ -s "$scratch/times.json" ] && mv "$scratch/times.json" "$out/times.json"
  else
    skip "times, all that fit" "no time left"
  fi
else
  skip "everything else" "the build failed"
fi

printf '\n== summary, %s s in all, in %s\n' "$SECONDS" "$out"
cat "$summary"
exit "$((failures > 0))"
