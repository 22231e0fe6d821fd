#!/usr/bin/env bash
# Train with configs/audio.yaml on every GPU of this machine:
#   bash scripts/train_audio.sh --train-data '/data/audio/{00000..00301}.tar' [more flags of training.main]
set -euo pipefail
cd "$(dirname "$0")/.."
exec scripts/train.sh configs/audio.yaml "$@"
