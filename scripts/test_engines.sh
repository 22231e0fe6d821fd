#!/usr/bin/env bash
# Train with partners, and several modalities in one run, on two ranks under every engine, kill a run with resampling
# twenty times, and run the benchmarks of the loader, the decoders and the text tower: about six minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv}"
bash scripts/setup.sh
"$VENV/bin/python" -m pytest -q -m slow tests/test_{partner,joint,engines,faults,accumulation,benchmark}.py "$@"
