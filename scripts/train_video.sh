# Train with configs/video.yaml: bash scripts/train_video.sh --train-data DATA [flags of training.main]
exec bash "$(dirname "$0")/train.sh" video "$@"
