# Evaluate a checkpoint: bash scripts/eval_audio.sh CHECKPOINT DATA_ROOT [flags of languagebind.eval]
exec bash "$(dirname "$0")/eval.sh" "esc50 vggsound audioset clotho audiocaps" "$@"
