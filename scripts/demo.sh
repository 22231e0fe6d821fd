#!/usr/bin/env bash
# Set up, render the sample world, train an encoder for each modality and evaluate it. It takes about 15 minutes on two cores.
# `--modality depth` runs only one. A table is printed; logs/demo has results.json and report.png.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}"
bash scripts/setup.sh
exec "$VENV/bin/python" scripts/demo.py "$@"
