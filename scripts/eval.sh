#!/usr/bin/env bash
# Evaluate a checkpoint on datasets of configs/eval, by name:
#   bash scripts/eval.sh "nyu_v2 esc50" CHECKPOINT DATA_ROOT [more flags of languagebind.eval]
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { echo "usage: $0 DATASETS CHECKPOINT DATA_ROOT [flags of languagebind.eval]" >&2; exit 2; }
sets="$1" checkpoint="$2" data_root="$3"
shift 3
python="${VENV:-.venv}/bin/python"
[ -x "$python" ] || { echo "error: no environment in ${VENV:-.venv}: run bash scripts/setup.sh" >&2; exit 2; }
exec "$python" -m languagebind.eval --checkpoint "$checkpoint" --data-root "$data_root" --output results --config $sets "$@"
