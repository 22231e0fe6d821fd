#!/usr/bin/env bash
# Score a checkpoint on the audio sets of the paper:
#   bash scripts/eval_audio.sh CHECKPOINT DATA_ROOT [more flags of languagebind.eval]
set -euo pipefail
cd "$(dirname "$0")/.."
exec scripts/eval.sh "esc50 vggsound audioset clotho audiocaps" "$@"
