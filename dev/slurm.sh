#!/usr/bin/env bash
# Training on several nodes under Slurm: one torchrun per node, which starts one process per GPU.
#
#     sbatch --nodes=4 dev/slurm.sh scripts.base_train --depth=26 --save-every=250 --keep-last=3
#
# Run it from the repository's folder, with the tokenizer trained and the text fetched beforehand: nodes that
# compute often have no internet. Other numbers of nodes or GPUs need no other flags of the script.
#
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# A node that fails: the job is queued again. Ten minutes before the time limit: this script is told (below).
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
source .venv/bin/activate
(( $# > 0 )) || { echo "usage: sbatch dev/slurm.sh scripts.NAME [flags]" >&2; exit 2; }

# One folder that all nodes see under the same name. Checkpoints of all ranks go there; training says so when it is not shared.
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:?set it to a folder on the shared file system}

# The network. NCCL finds its way on most clusters; these are for when it does not.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}     # INFO tells what was chosen: look for "NET/IB" (good) or "NET/Socket" (slow)
# export NCCL_SOCKET_IFNAME=ens,eth       # begins of the names of interfaces that reach the other nodes (ip -br addr)
# export GLOO_SOCKET_IFNAME=ens3          # the same for gloo, which carries small things; one whole name
# export NCCL_IB_HCA=mlx5_0,mlx5_1        # which InfiniBand adapters to use (ibstat), where some are for storage
# export NCCL_IB_DISABLE=1                # to see whether InfiniBand is what is broken
# Check it before a long run: sbatch dev/slurm.sh dev.bench.ranks

# Seconds that torchrun leaves the ranks for that last save (30 by default, and always in older versions of torch). When a
# rank has died, others that do not answer are left as long.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-gpu}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head_node:$((20000 + SLURM_JOB_ID % 10000))" \
    -m "$1" -- "${@:2}" &
ranks=$!

# Before the time limit: SIGTERM to every torchrun, which passes it on; the ranks finish their step and save.
# By scancel, because srun itself answers SIGTERM by killing what it started.
stopping=
trap 'stopping=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1
code=0
wait "$ranks" || code=$?
if [[ -n $stopping ]]; then  # the signal ended that wait, not the run
    wait "$ranks" || true
    scontrol requeue "$SLURM_JOB_ID"  # training sees that it was, and continues from what this job has saved
else
    exit "$code"
fi
