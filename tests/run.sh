#!/usr/bin/env bash
# Lint and test: bash tests/run.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
source training/environment.sh
ruff check .
ruff format --check .
python -m pytest "$@"
