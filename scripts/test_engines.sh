#!/usr/bin/env bash
# Train with partners, and several modalities in one run, on two ranks under every engine: about two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}"
bash scripts/setup.sh
"$VENV/bin/python" -m pytest -q -m slow tests/test_partner.py tests/test_joint.py "$@"
