#!/bin/bash
# Train on two SLURM nodes, and continue after time limits, preemptions and failed nodes:
#   sbatch recipes/slurm.sh
#SBATCH --job-name=byol --output=%x-%j.log --open-mode=append
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue                     # after a preemption or the failure of a node
#SBATCH --signal=B:USR1@180           # three minutes before the time limit, to this script

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150  # seconds that torchrun waits for the checkpoint
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

save_and_requeue() {
    scancel --signal=TERM "$SLURM_JOB_ID"  # to torchrun: fastbyol finishes its step and saves
    wait "$training"
    scontrol requeue "$SLURM_JOB_ID"
}
trap save_and_requeue USR1

# On every node, srun starts one torchrun, and torchrun starts a process per GPU.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m fastbyol train --config imagenet_r50_300ep_h100_8gpu \
    --data.root /data/imagenet --runs /shared/runs --resume auto &
training=$!
wait "$training"
