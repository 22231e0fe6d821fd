#!/usr/bin/env bash
# Train with configs/depth.yaml on every GPU of this machine:
#   bash scripts/train_depth.sh --train-data '/data/depth/{00000..00301}.tar' [more flags of training.main]
set -euo pipefail
cd "$(dirname "$0")/.."
exec scripts/train.sh configs/depth.yaml "$@"
