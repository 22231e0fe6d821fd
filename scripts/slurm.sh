#!/usr/bin/env bash
# Train on several nodes under SLURM, one task a GPU, and go on by itself after a preemption or the end of the time:
#   sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 scripts/slurm.sh configs/depth.yaml --train-data /data/depth --name depth-1
# Give a --name: it is what the next part of the run goes on from. The environment is that of VENV (.venv).
#SBATCH --job-name=languagebind
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ $# -ge 1 ] && [ -f "$1" ] || { echo "usage: sbatch $0 CONFIG.yaml --name NAME [flags of training.main]" >&2; exit 2; }
config="$1"
shift
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MASTER_ADDR="${nodes%%$'\n'*}"
export MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
# Each rank saves and ends with status 0 when SIGUSR1 comes, two minutes before the end; then the job queues again.
requeue=0
trap 'requeue=1' USR1
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
