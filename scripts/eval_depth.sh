# Evaluate a checkpoint: bash scripts/eval_depth.sh CHECKPOINT DATA_ROOT [flags of languagebind.eval]
exec bash "$(dirname "$0")/eval.sh" "nyu_v2" "$@"
