# Evaluate a checkpoint: bash scripts/eval_infrared.sh CHECKPOINT DATA_ROOT [flags of languagebind.eval]
exec bash "$(dirname "$0")/eval.sh" "llvip flir_v1 flir_v2" "$@"
