#!/bin/bash
# SPDX-License-Identifier: Apache-2.0

# Stage 1 on 4 nodes of 8 GPUs, the paper's 32: sbatch examples/clusters/slurm.sh
#
# Ten minutes before the time is up training writes a checkpoint and stops, and the job queues again; Slurm
# queues it again when a node is lost. The same script then goes on where it was, also with other --nodes if the
# packs of an optimiser step stay as many (docs/training.md).
#SBATCH --job-name=gmai-stage1
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
CONFIG=${CONFIG:-configs/gmai_vl/stage1_shallow.py}
WORK_DIR=${WORK_DIR:-work_dirs/stage1_shallow}  # on a file system that all nodes see
export NNODES=$SLURM_NNODES NPROC_PER_NODE=${SLURM_GPUS_ON_NODE:-8} PORT=29500
ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export ADDR CONFIG WORK_DIR SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-64}

mkdir -p "$WORK_DIR"
rm -f "$WORK_DIR/stop"
trap 'touch "$WORK_DIR/stop"' USR1

srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec xtuner train "$CONFIG" \
    --deepspeed zero2 --work-dir "$WORK_DIR" --resume "$WORK_DIR"' &
# A signal ends `wait`, and training goes on for as long as a step and a checkpoint take.
while kill -0 $! 2>/dev/null; do wait $!; done

# `xtuner` exits with 0 whatever happens; status.json says what did.
case $(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$WORK_DIR/status.json") in
    finished) echo "finished" ;;
    failed) echo "failed: see $WORK_DIR/status.json"; exit 1 ;;
    *) scontrol requeue "$SLURM_JOB_ID" ;;
esac
