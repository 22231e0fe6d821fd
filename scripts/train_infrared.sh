#!/usr/bin/env bash
# Train with configs/infrared.yaml on every GPU of this machine:
#   bash scripts/train_infrared.sh --train-data '/data/infrared/{00000..00301}.tar' [more flags of training.main]
set -euo pipefail
cd "$(dirname "$0")/.."
exec scripts/train.sh configs/infrared.yaml "$@"
