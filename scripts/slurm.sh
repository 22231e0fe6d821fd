#!/usr/bin/env bash
# Train on several nodes under SLURM, one task per GPU; continue by itself after a preemption or the time limit:
#   sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 scripts/slurm.sh depth --train-data /data/depth --name depth-1
# --name is needed: the next part of the run continues from it. VENV names the environment (default: .venv).
#SBATCH --job-name=languagebind
#SBATCH --signal=B:USR1@420
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ $# -ge 1 ] || { echo "usage: sbatch $0 CONFIG --name NAME [flags of training.main]" >&2; exit 2; }
config="$1"
shift
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MASTER_ADDR="${nodes%%$'\n'*}"
export MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
# SIGUSR1 reaches this shell seven minutes before the time limit. srun passes it on; the ranks save and exit with
# status 0, and the job is queued again.
requeue=0
step=
trap 'requeue=1; [ -z "$step" ] || kill -USR1 "$step"' USR1
srun --kill-on-bad-exit=1 "${VENV:-.venv}/bin/python" -m training.main --config "$config" --resume latest "$@" &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done
if [ "$requeue" = 1 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
