#!/usr/bin/env bash
# Lint and test: bash tests/run.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
source training/environment.sh
ruff check .
ruff format --check .
python -m pytest -n 2 --dist loadgroup -m "not slow" "$@"
[[ " $* " == *" -m "* ]] || echo "Left out: tests marked slow (kills, compilers, benchmarks, export, clients of the Hub, peak memory). All: bash tests/run.sh -m ''"
