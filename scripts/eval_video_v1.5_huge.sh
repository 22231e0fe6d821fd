#!/usr/bin/env bash
# Score a checkpoint of configs/video_v1.5_huge.yaml, as any video checkpoint:
#   bash scripts/eval_video_v1.5_huge.sh CHECKPOINT DATA_ROOT [more flags of languagebind.eval]
set -euo pipefail
cd "$(dirname "$0")/.."
exec scripts/eval_video.sh "$@"
