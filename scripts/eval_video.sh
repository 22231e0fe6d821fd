# Evaluate a checkpoint: bash scripts/eval_video.sh CHECKPOINT DATA_ROOT [flags of languagebind.eval]
exec bash "$(dirname "$0")/eval.sh" "msrvtt msvd didemo activitynet kinetics400 kinetics600" "$@"
