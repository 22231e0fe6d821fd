#!/usr/bin/env bash
# Set up the environment, lint, run the tests. Arguments go to pytest: scripts/test.sh -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}"
bash scripts/setup.sh
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
# Two processes, a file at a time: files share what is costly to make.
"$VENV/bin/python" -m pytest -q -n 2 --dist loadfile --durations 10 "$@"
