#!/usr/bin/env bash
# Score a checkpoint on the video sets of the paper:
#   bash scripts/eval_video.sh CHECKPOINT DATA_ROOT [more flags of languagebind.eval]
set -euo pipefail
cd "$(dirname "$0")/.."
exec scripts/eval.sh "msrvtt msvd didemo activitynet kinetics400 kinetics600" "$@"
