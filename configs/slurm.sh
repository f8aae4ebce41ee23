#!/bin/bash
# Two machines with five GPUs each:  sbatch configs/slurm.sh settings.yaml [name=value …]
#SBATCH --job-name=enigma
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=5
#SBATCH --cpus-per-task=20
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu
export ENIGMA_RUNS=${ENIGMA_RUNS:-$PWD/runs}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
status=0
srun --kill-on-bad-exit=0 bash -c 'exec python -m enigma_lab.lm.train --resume auto \
    --config "$1" gpus="${SLURM_GPUS_ON_NODE:-0}" nodes="$SLURM_NNODES" \
    node_rank="$SLURM_NODEID" master="$2" "${@:3}"' enigma "$1" "$first:$port" "${@:2}" || status=$?
if [ "$status" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; else exit "$status"; fi
