#!/usr/bin/env bash
# Train with configs/video_v1.5_large.yaml on every GPU of this machine:
#   bash scripts/train_video_v1.5_large.sh --train-data '/data/video/{00000..00301}.tar' [more flags of training.main]
set -euo pipefail
cd "$(dirname "$0")/.."
exec scripts/train.sh configs/video_v1.5_large.yaml "$@"
