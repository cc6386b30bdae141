#!/usr/bin/env bash
# Build, test and benchmark on a machine with a GPU and no network, with the torch that is installed.
#   bench/gpu.sh [FOLDER]     results go to $OUT, else to FOLDER, else to bench/results
# PYTHON, BENCH_ARGS, and *_LIMIT (seconds a step may take) can be set. A failed test does not keep
# the benchmark from running, but the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-${1:-bench/results}}
mkdir -p "$OUT"
failed=()

step() { # name, limit in seconds, command...
  local name=$1 limit=$2 status
  shift 2
  echo "== $name: $*"
  SECONDS=0
  timeout --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1
  status=$?
  tail -n 15 "$OUT/$name.log"
  case $status in
    0) echo "== $name: passed in $SECONDS s" ;;
    124 | 137) failed+=("$name (over $limit s)") ;;
    *) failed+=("$name (status $status)") ;;
  esac
  return $status
}

step build "${BUILD_LIMIT:-300}" \
  "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -e .
step info 60 "$PYTHON" -m svitt_ops info
step tests "${TEST_LIMIT:-900}" \
  "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --junitxml="$OUT/tests.xml"
# shellcheck disable=SC2086
step bench "${BENCH_LIMIT:-900}" \
  "$PYTHON" -m bench --out "$OUT" ${BENCH_ARGS:-}

echo "== summary, in $OUT"
grep -hE '^=+ .*(passed|failed|error|skipped|deselected)|^[0-9]+ (passed|failed|skipped|deselected)' "$OUT/tests.log" | tail -n 1
grep -hE '^[nbt][0-9]+.* svitt_ops |^(step|tower)-.* (hybrid|dense)|^FAILED|red:' "$OUT/bench.log"
if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all steps passed"
