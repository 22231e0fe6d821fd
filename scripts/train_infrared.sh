# Train with configs/infrared.yaml: bash scripts/train_infrared.sh --train-data DATA [flags of training.main]
exec bash "$(dirname "$0")/train.sh" infrared "$@"
