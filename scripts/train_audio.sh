# Train with configs/audio.yaml: bash scripts/train_audio.sh --train-data DATA [flags of training.main]
exec bash "$(dirname "$0")/train.sh" audio "$@"
