#!/usr/bin/env bash
# Take videos through the generation by every runner, kill it at random, fill the disk, measure it: about 30 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}"
bash scripts/setup.sh
"$VENV/bin/python" -m pip install --quiet -e '.[ray]'
"$VENV/bin/python" -m pytest -q -m slow tests/test_generate*.py "$@"
