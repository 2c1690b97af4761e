#!/usr/bin/env bash
#SBATCH --job-name=celo2-pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
# Trains under Slurm: one task on each node, which starts torchrun with one rank for each of its GPUs.
#
#   sbatch --nodes 4 --time 24:00:00 launch/slurm.sh [train's arguments]       from the project's folder
#
# The lines #SBATCH at the top ask for one node with 8 GPUs; sbatch's own options, before the script's name, come before
# them. Train's arguments are those of `celo2-pretrain train`, for example
#   sbatch --nodes 4 launch/slurm.sh --config configs/gpt3_xl_1.3b.yaml run_dir=/shared/runs/xl
#
#   NPROC=N               ranks on each node, where not one for each GPU
#   NCCL_SOCKET_IFNAME    and the other variables of launch/environment.sh: sbatch hands the shell's on to every node
#
# One rank's error ends the whole job: srun kills what is left (--kill-on-bad-exit).
set -euo pipefail

case "${1:-}" in
    -h | --help)
        while IFS= read -r line; do
            case "$line" in '#!'* | '#SBATCH'*) ;; '#'*) line="${line#\#}"; echo "${line# }" ;; *) break ;; esac
        done <"$0"
        exit 0 ;;
esac
[ -n "${SLURM_JOB_NODELIST:-}" ] || { echo "slurm: error: not in a Slurm job: start it by sbatch; see --help" >&2; exit 2; }
# sbatch runs a copy of this file from another folder.
root="${SLURM_SUBMIT_DIR:-$PWD}"
[ -f "$root/launch/torchrun.sh" ] ||
    { echo "slurm: error: no launch/torchrun.sh in $root: start sbatch from the project's folder" >&2; exit 2; }

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ "${#hosts[@]}" -gt 0 ] ||
    { echo "slurm: error: scontrol names no hosts for $SLURM_JOB_NODELIST" >&2; exit 2; }
port=$((15000 + SLURM_JOB_ID % 16000))  # jobs that share a node differ
echo "slurm: job $SLURM_JOB_ID on ${#hosts[@]} node(s): ${hosts[*]}; they meet at ${hosts[0]}:$port"

ranks=()
[ -z "${NPROC:-}" ] || ranks=(--nproc "$NPROC")
# SLURM_NODEID is known in the task only.
# shellcheck disable=SC2016
exec srun --nodes "${#hosts[@]}" --ntasks "${#hosts[@]}" --ntasks-per-node 1 --kill-on-bad-exit=1 \
    bash -c 'exec "$0" --node-rank "$SLURM_NODEID" "$@"' "$root/launch/torchrun.sh" \
    --nnodes "${#hosts[@]}" --master "${hosts[0]}:$port" ${ranks[@]+"${ranks[@]}"} -- "$@"
