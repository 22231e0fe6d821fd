#!/usr/bin/env bash
# Set up the environment, lint, run the tests. Arguments go to pytest: scripts/test.sh -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}"
bash scripts/setup.sh
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/python" -m pytest -q --durations 10 "$@"
