#!/usr/bin/env bash
# Build, test and benchmark on a machine with a GPU and no network, with the torch that is installed.
#   bench/gpu.sh [FOLDER]     results go to $OUT, else to FOLDER, else to build/gpu
#   STEPS="build tests" LIMIT=600 bench/gpu.sh; STEPS=bench BENCH_OPS=info_nce bench/gpu.sh
#   STEPS="build tune" LIMIT=1500 bench/gpu.sh     a table of tiles: results/tiles/ARCHITECTURE.json
# Steps: build, info, tests, bench, and tune, which is also `bench/gpu.sh tune`; LIMIT: seconds for
# all of them, to be less than the machine lends.
# WORKERS of the tests, PYTHON, TEST_ARGS, BENCH_ARGS and TUNE_ARGS can be set.
#
# Some machines bring back few files, and end a command without notice: so there are three files,
# written anew after each step, and each op is measured by a process of its own, since a fault on a
# GPU spoils all that follows in a process. summary.txt says how it went, logs.tar.gz has what was
# printed, results.tar.gz what was measured: tar -xzf results.tar.gz -C bench
# A failed step does not keep the next from running, but the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
[[ ${1:-} == tune ]] && STEPS=${STEPS:-build info tune} && shift
OUT=${OUT:-${1:-build/gpu}}
STEPS=${STEPS:-build info tests bench}
LIMIT=${LIMIT:-3600}
WORKERS=${WORKERS:-$(($(nproc) * 3 / 4 + 1))}
summary=$OUT/summary.txt
mkdir -p "$OUT" && : > "$summary" && work=$(mktemp -d) && mkdir "$work/logs" "$work/results" || exit 2
failed=0
child=
# What of a log is told in the summary: of info, tests, bench and tune.
TELLING='^  (nvcc|triton|sm_[0-9]+) |^  cuda +not |^  cuda:|^=+ .*(passed|failed|error|skipped|deselected)'
TELLING+='|^[nbt][0-9]+.* svitt_ops |^(step|tower)-.* (hybrid|dense)|^FAILED|red:'
TELLING+='|: today |beside .* faster |tiles? in |no tile was faster'

say() { echo "$@" | tee -a "$summary"; }

pack() { # what there is by now; a reader never meets half an archive
  local name
  for name in logs results; do
    tar -czf "$OUT/$name.part" -C "$work" --exclude='*.part' "$name" &&
      mv "$OUT/$name.part" "$OUT/$name.tar.gz" || rm -f "$OUT/$name.part"
  done
}

step() { # name, command...
  local name=$1 begin=$SECONDS left=$((LIMIT - SECONDS)) status=124 took
  shift
  echo "== $name: $*"
  if ((left > 0)); then
    timeout --kill-after=10 "$left" "$@" > "$work/logs/$name.log" 2>&1 &
    child=$!
    wait $child
    status=$?
    child=
    tail -n 15 "$work/logs/$name.log"
  fi
  took=$((SECONDS - begin))
  case $status in
    0) say "== $name: passed in $took s" ;;
    137) # of `timeout`, or from outside, as where memory is at its end
      say "== $name: FAILED, $( ((took < left)) && echo 'killed, perhaps for want of memory,' || echo over the limit) after $took s"
      ;;
    124) say "== $name: FAILED, over the limit after $took s" ;;
    *) say "== $name: FAILED with status $status after $took s" ;;
  esac
  if [[ -e $work/logs/$name.log ]]; then
    grep -hE "$TELLING" "$work/logs/$name.log" >> "$summary"
    ((status)) && tail -n 4 "$work/logs/$name.log" | cut -c 1-300 | sed 's/^/   | /' >> "$summary"
  fi
  ((status)) && failed=1
  pack
}

end() {
  [[ $child ]] && kill "$child" # `timeout` hands it on
  pack
  rm -rf "$work"
}
trap 'exit 143' TERM INT
trap end EXIT

for name in $STEPS; do
  case $name in
    build) step build "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -e . ;;
    info) step info "$PYTHON" -m svitt_ops info ;;
    tests) # compiling is most of the time: by several processes where pytest-xdist is there
      # shellcheck disable=SC2086
      step tests "$PYTHON" -m pytest -m gpu -v -p no:cacheprovider --junitxml="$work/logs/tests.xml" \
        $("$PYTHON" -c 'import xdist' 2> /dev/null && printf -- '-n %s' "$WORKERS") ${TEST_ARGS:-}
      ;;
    bench)
      ops=${BENCH_OPS:-$("$PYTHON" -c 'from bench.cases import names; print(*names())')}
      [[ $ops ]] || { say "== bench: FAILED to import" && failed=1; }
      for op in $ops; do
        # shellcheck disable=SC2086
        step "bench-$op" "$PYTHON" -m bench --op "$op" --out "$work/results" ${BENCH_ARGS:-}
      done
      ;;
    tune)
      minutes=$(((LIMIT - SECONDS - 30) / 60))
      # shellcheck disable=SC2086
      step tune "$PYTHON" -m bench.tune --minutes "$((minutes > 0 ? minutes : 1))" \
        --out "$work/results/tiles" --record "$work/results/tune" ${TUNE_ARGS:-}
      ;;
    *) say "== $name: FAILED, no such step" && failed=1 ;;
  esac
done

say "== $([[ $failed == 0 ]] && echo all passed || echo some FAILED); in $OUT: logs.tar.gz, results.tar.gz"
exit $failed
