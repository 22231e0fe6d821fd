#!/usr/bin/env bash
# The page's slow checks: four people at once, and the examples with the models of the demo, if logs/demo has them. It
# takes about four minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}"
bash scripts/setup.sh
"$VENV/bin/python" -m pytest -q -s -m slow tests/test_app_{people,examples}.py "$@"
