# Evaluate a checkpoint: bash scripts/eval_video_v1.5_huge.sh CHECKPOINT DATA_ROOT [flags of languagebind.eval]
exec bash "$(dirname "$0")/eval.sh" "msrvtt msvd didemo activitynet kinetics400 kinetics600" "$@"
