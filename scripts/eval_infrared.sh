#!/usr/bin/env bash
# Score a checkpoint on the infrared sets of the paper:
#   bash scripts/eval_infrared.sh CHECKPOINT DATA_ROOT [more flags of languagebind.eval]
set -euo pipefail
cd "$(dirname "$0")/.."
exec scripts/eval.sh "llvip flir_v1 flir_v2" "$@"
