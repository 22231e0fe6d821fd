#!/usr/bin/env bash
# Score a checkpoint on the depth sets of the paper:
#   bash scripts/eval_depth.sh CHECKPOINT DATA_ROOT [more flags of languagebind.eval]
set -euo pipefail
cd "$(dirname "$0")/.."
exec scripts/eval.sh "nyu_v2" "$@"
