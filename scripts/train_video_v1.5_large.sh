# Train with configs/video_v1.5_large.yaml: bash scripts/train_video_v1.5_large.sh --train-data DATA [flags of training.main]
exec bash "$(dirname "$0")/train.sh" video_v1.5_large "$@"
