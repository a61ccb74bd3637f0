#!/usr/bin/env bash
# All that only a machine with a GPU can show, in nine minutes: the tests, memcheck of the kernels, the bench.
# JSON lines are appended to benchmarks/results/ops_cuda.jsonl. PYTHON=... takes another interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD
failed=0
step() { # seconds, what, command
    echo "== $2 (at most $1 s)"
    timeout "$1" "${@:3}" || { echo "== $2: failed or out of time, exit $?"; failed=1; }
}
step 120 "the ops on the GPU" "$PYTHON" -m pytest -q -m gpu -k ops tests/test_gpu.py
step 260 "bench" "$PYTHON" -m longwave.cli bench ops --device cuda --repeats 9 --save
if command -v compute-sanitizer > /dev/null; then
    step 60 "memcheck" compute-sanitizer --tool memcheck --error-exitcode 1 \
        "$PYTHON" -m pytest -q -m gpu -k "ops and 70 and float32" tests/test_gpu.py
else
    echo "== memcheck: no compute-sanitizer"
fi
step 90 "the mixers on the GPU" "$PYTHON" -m pytest -q -m gpu -k "not ops" tests/test_gpu.py
exit $failed
