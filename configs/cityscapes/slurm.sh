#!/bin/bash
# Cityscapes on 2 nodes of 4 GPUs. A job that is requeued goes on from its last checkpoint by itself.
#   sbatch configs/cityscapes/slurm.sh <folder with leftImg8bit/ and gtFine/> [further options of the command]
# Submit it from the repository, in the environment where lightning-atrous is installed.
#SBATCH --job-name=cityscapes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=5
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

root=${1:?give the folder with leftImg8bit/ and gtFine/}
shift
# a requeued job keeps its number, another job has another
run=runs/cityscapes-job$SLURM_JOB_ID

# the newest checkpoint: of a validation, or what Lightning saved on SIGUSR1 before it requeued the job; the directory
# is numbered if an earlier start ended without a checkpoint
newest=$(ls -t "$run"{,-*}/checkpoints/last.ckpt "$run"{,-*}/hpc_ckpt_*.ckpt 2> /dev/null | head -n 1 || true)
resume=()
if [ -n "$newest" ]; then
    resume=(--ckpt_path "$newest")
fi

srun --kill-on-bad-exit=1 lightning-atrous fit --config configs/cityscapes/deeplabv3plus_resnet101_os8_slurm.yaml \
    --data.root "$root" --run_dir "$run" "${resume[@]}" "$@"
