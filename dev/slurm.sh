#!/usr/bin/env bash
# Training on several nodes under Slurm: one torchrun per node, which starts one process per GPU.
#
#     sbatch --nodes=4 dev/slurm.sh scripts.base_train --depth=26 --save-every=250 --keep-last=3
#
# Run it from the repository's folder. Train the tokenizer and download the text first, since compute nodes often have no
# internet access. The flags of the script do not depend on the number of nodes or GPUs.
#
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Requeue the job if a node fails; send USR1 to this script ten minutes before the time limit (see below)
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
source .venv/bin/activate
(( $# > 0 )) || { echo "usage: sbatch dev/slurm.sh scripts.NAME [flags]" >&2; exit 2; }

# A folder that all nodes share under the same path; all ranks save checkpoints there, and training checks that it is shared
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:?set it to a folder on the shared file system}

# Network settings, for clusters where NCCL's defaults do not work. dev/DISTRIBUTED.md says how to check them
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}     # INFO shows the transport: "NET/IB" (fast) or "NET/Socket" (slow)
# export NCCL_SOCKET_IFNAME=ens,eth       # prefixes of the interfaces that connect the nodes (ip -br addr)
# export GLOO_SOCKET_IFNAME=ens3          # the same for gloo, which exchanges small objects: one full name
# export NCCL_IB_HCA=mlx5_0,mlx5_1        # InfiniBand adapters to use (ibstat), if others are for storage

# Seconds that torchrun gives the ranks to save after SIGTERM, and the others after one has died (default 30)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-gpu}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head_node:$((20000 + SLURM_JOB_ID % 10000))" \
    -m "$1" -- "${@:2}" &
ranks=$!

# Before the time limit, send SIGTERM to every torchrun, which forwards it; the ranks finish their step and save. Use
# scancel, because srun responds to SIGTERM by killing its tasks.
stopping=
trap 'stopping=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1
code=0
wait "$ranks" || code=$?
if [[ -n $stopping ]]; then  # the signal interrupted `wait`, not the job
    wait "$ranks" || true
    scontrol requeue "$SLURM_JOB_ID"  # training resumes from this job's checkpoints, since restarts() is above 0
else
    exit "$code"
fi
