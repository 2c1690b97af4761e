#!/usr/bin/env bash
# Sourced by the launch scripts: which Python, how many ranks and threads, which port. Not for starting by itself.
#
# Variables that reach the ranks on every node; each script's --help names those that matter there:
#   PYTHON                the interpreter (default: the active environment's, then .venv's, then python3)
#   OMP_NUM_THREADS       threads of each rank (default: cores / ranks of the node; more ranks than cores: 1); for
#                         launch/multinode.sh as if all hosts had this one's cores and the most ranks of any
#   DS_ACCELERATOR        cpu where nvidia-smi finds no GPU, unless it is set; launch/multinode.sh hands on what was set only
#   NCCL_SOCKET_IFNAME    GPUs: the network interface that reaches the other nodes, e.g. ib0 or eth0, where NCCL picks another
#   NCCL_DEBUG=INFO       GPUs: what NCCL chose, and why it failed
#   GLOO_SOCKET_IFNAME    CPU ranks: the same for gloo; set it when a rank binds to 127.0.0.1 by its /etc/hosts
#   DEEPSPEED_TIMEOUT     minutes that a rank waits for the others (default: 10)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "$(basename "$0" .sh): error: $*" >&2
    exit 2
}

usage() {  # the comment at the top of the script
    local line
    while IFS= read -r line; do
        case "$line" in
            '#!'* | '#SBATCH'*) ;;
            '# '*) echo "${line#\# }" ;;
            '#') echo ;;
            *) return ;;
        esac
    done <"$1"
}

need() {  # option, value: the value must be there
    [ -n "${2:-}" ] || fail "$1 needs a value; see --help"
}

whole_number() {  # option, value
    case "$2" in '' | *[!0-9]*) fail "$1 $2: must be a whole number" ;; esac
}

if [ -n "${PYTHON:-}" ]; then
    python="$PYTHON"
elif [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python="$root/.venv/bin/python"
else
    python=python3
fi
command -v "$python" >/dev/null || fail "no Python at $python: run launch/setup.sh, or set PYTHON"

# shellcheck disable=SC2034  # launch/multinode.sh reads it: what this machine lacks says nothing of the others
given_accelerator="${DS_ACCELERATOR:-}"
gpus="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)"
if [ "$gpus" = 0 ]; then export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"; fi
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

threads_for() {  # ranks of this node
    local cores
    cores="$(nproc)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}"
}

unused_port() {  # below the ports that systems give to outgoing connections
    local port
    while port=$((15000 + RANDOM % 16000)) && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo "$port"
}
