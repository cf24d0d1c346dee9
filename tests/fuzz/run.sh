#!/usr/bin/env bash
# Fuzz the parsing code: run.sh [SECONDS], or FUZZ_RUNS=executions run.sh; JOBS=processes, each with that budget.
# Starts from the committed corpus; what is found new stays in build/fuzz/corpus, crashes land in build/fuzz.
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=${1:-60}
jobs=${JOBS:-1}
if [ -n "${FUZZ_RUNS:-}" ]; then
    budget=(-runs="$FUZZ_RUNS")
else
    budget=(-max_total_time="$seconds")
fi

tests/fuzz/build.sh
mkdir -p build/fuzz/corpus
pids=()
for ((job = 0; job < jobs; job++)); do
    build/fuzz/fuzz_queue "${budget[@]}" -max_len=320 -timeout=0 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=0 \
        -artifact_prefix=build/fuzz/ build/fuzz/corpus tests/fuzz/corpus tests/fuzz/regressions >build/fuzz/run-$job.log 2>&1 &
    pids+=($!)
done
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
status=0
for job in "${!pids[@]}"; do
    wait "${pids[$job]}" || status=$?
    if [ "$status" -eq 0 ]; then
        sed -n 's/^stat::\(number_of_executed_units\|average_exec_per_sec\): */fuzz: \1 /p' build/fuzz/run-$job.log
    else
        tail -n 40 build/fuzz/run-$job.log
        break
    fi
done
[ "$status" -eq 0 ] || echo "fuzz: a finding; the input is in build/fuzz/ (see Test unit written to, above)"
exit "$status"
