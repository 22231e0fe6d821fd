# Train with configs/depth.yaml: bash scripts/train_depth.sh --train-data DATA [flags of training.main]
exec bash "$(dirname "$0")/train.sh" depth "$@"
