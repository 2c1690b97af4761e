#!/usr/bin/env bash
# Trains under torchrun: on this machine, or on several nodes, started on each.
#
#   launch/torchrun.sh [--nproc N] [train's arguments]
#   launch/torchrun.sh --nnodes 2 --node-rank 0 --master HOST[:PORT] [--nproc N] [train's arguments]     on HOST
#   launch/torchrun.sh --nnodes 2 --node-rank 1 --master HOST[:PORT] [--nproc N] [train's arguments]     on the other
#
#   --nproc N             ranks on this node (default: one for each GPU)
#   --nnodes N            nodes in all (default: 1)
#   --node-rank N         which of them this is, from 0
#   --master HOST[:PORT]  node 0's name or address as the others see it, and a free port there (default: 29500)
#   --                    what follows is train's, whatever it looks like
#
# Train's arguments are those of `celo2-pretrain train`, for example --config configs/gpt2_124m.yaml optimizer.lr=5e-4.
# Data and run_dir must lie where every node sees them under the same path. Variables, each with its default:
# launch/environment.sh; the one to know is NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME for CPU ranks), the interface that
# reaches the other nodes.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

nproc="" nnodes=1 node_rank="" master=""
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage "$0"; exit 0 ;;
        --nproc) need "$@"; nproc="$2"; shift 2 ;;
        --nnodes) need "$@"; nnodes="$2"; shift 2 ;;
        --node-rank) need "$@"; node_rank="$2"; shift 2 ;;
        --master) need "$@"; master="$2"; shift 2 ;;
        --) shift; break ;;
        *) break ;;
    esac
done
whole_number --nnodes "$nnodes"
if [ -z "$nproc" ]; then
    [ "$gpus" -gt 0 ] || fail "nvidia-smi finds no GPU here: give --nproc N to train in N processes on the CPU"
    nproc="$gpus"
fi
whole_number --nproc "$nproc"
[ "$nnodes" -gt 0 ] && [ "$nproc" -gt 0 ] || fail "--nnodes $nnodes --nproc $nproc: must be above 0"
if [ "$nnodes" -gt 1 ]; then
    [ -n "$node_rank" ] || fail "--nnodes $nnodes needs --node-rank, 0 to $((nnodes - 1)), another one on each node"
    [ -n "$master" ] || fail "--nnodes $nnodes needs --master, the name or address of the node with --node-rank 0"
    whole_number --node-rank "$node_rank"
    [ "$node_rank" -lt "$nnodes" ] || fail "--node-rank $node_rank: must be below --nnodes $nnodes"
    case "$master" in *:*) port="${master##*:}" master="${master%:*}" ;; *) port=29500 ;; esac
    whole_number "--master's port" "$port"
else
    node_rank=0 master=127.0.0.1 port="$(unused_port)"
fi
threads_for "$nproc"

exec "$python" -m torch.distributed.run --nnodes "$nnodes" --node_rank "$node_rank" --nproc_per_node "$nproc" \
    --master_addr "$master" --master_port "$port" "$root/launch/pretrain.py" "$@"
