#!/usr/bin/env bash
# Train with a config on every GPU of this machine, or on the CPU if it has none:
#   bash scripts/train.sh depth --train-data /data/depth [more flags of training.main]
# NPROC=2 starts two processes. VENV names the environment (default: .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: $0 CONFIG [flags of training.main]" >&2; exit 2; }
config="$1"
shift
bin="${VENV:-.venv}/bin"
[ -x "$bin/torchrun" ] || { echo "error: no environment in ${VENV:-.venv}: run bash scripts/setup.sh" >&2; exit 2; }
nproc="${NPROC:-$("$bin/python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
# `--` keeps torchrun from reading our flags (--logs) as its own.
exec "$bin/torchrun" --standalone --nproc_per_node "$nproc" -m training.main -- --config "$config" "$@"
