#!/usr/bin/env bash
# Trains on the hosts of a hostfile under DeepSpeed's launcher, started once, on one of them: it reaches the others by
# pdsh and ssh without a password.
#
#   launch/multinode.sh --hostfile FILE [--master ADDRESS] [--port N] [train's arguments]
#
#   --hostfile FILE       a line for each host, the first is where the ranks meet:   node1 slots=8
#   --master ADDRESS      the first host's address as the others see it (default: the first of its `hostname -I`)
#   --port N              a free port there (default: 29500)
#   --                    what follows is train's, whatever it looks like
#
# Train's arguments are those of `celo2-pretrain train`. This folder, the environment, data and run_dir must lie under the
# same path on every host. Handed on to them are the variables that begin with NCCL_, GLOO_, OMP_, TORCH, DS_, DEEPSPEED_,
# CELO2_, CUDA_, HF_ or TOKENIZERS_ (launch/environment.sh explains those that matter), and the lines of .deepspeed_env.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

hostfile="" master="" port=29500
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage "$0"; exit 0 ;;
        --hostfile) need "$@"; hostfile="$2"; shift 2 ;;
        --master) need "$@"; master="$2"; shift 2 ;;
        --port) need "$@"; port="$2"; shift 2 ;;
        --) shift; break ;;
        *) break ;;
    esac
done
[ -n "$hostfile" ] || fail "give --hostfile FILE, with a line for each host: node1 slots=8"
whole_number --port "$port"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m celo2_pretrain.train.start.hostfile "$hostfile" || exit 2
for command in pdsh ssh; do
    command -v "$command" >/dev/null || fail "DeepSpeed's launcher needs $command here (Debian, Ubuntu: apt install pdsh)"
done
plain='^[A-Za-z0-9_@%+=:,./-]*$'
for path in "$root" "$PWD"; do
    [[ "$path" =~ $plain ]] || fail "DeepSpeed's launcher needs a path without spaces or signs, not $path"
done

# The arguments pass a shell on each host, which DeepSpeed quotes for spaces only: the others travel encoded.
arguments=("$@")
for argument in "$@"; do
    if ! [[ "$argument" =~ $plain ]] || [ -z "$argument" ]; then
        arguments=(--base64 "$(printf '%s\0' "$@" | base64 | tr -d '\n')")
        break
    fi
done

variables="$(mktemp)"
trap 'rm -f "$variables"' EXIT
if [ -z "${OMP_NUM_THREADS:-}" ]; then  # first, so that .deepspeed_env can say otherwise
    slots="$(sed -n 's/#.*//; s/.*slots=\([0-9]*\).*/\1/p' "$hostfile" | sort -n | tail -n 1)"
    echo "OMP_NUM_THREADS=$(threads_for $((10#$slots)) && echo "$OMP_NUM_THREADS")" >"$variables"
fi
for file in "$HOME/.deepspeed_env" .deepspeed_env; do
    if [ -f "$file" ]; then cat "$file" >>"$variables"; fi
done
while IFS= read -r name; do
    if [ "$name" = DS_ACCELERATOR ] && [ -z "$given_accelerator" ]; then continue; fi
    case "$name" in
        NCCL_* | GLOO_* | OMP_* | TORCH* | DS_ACCELERATOR | DS_SKIP* | DEEPSPEED_* | CELO2_* | CUDA_* | HF_* | TOKENIZERS_*)
            case "${!name}" in
                *[\"\$\`\\]* | *$'\n'*) fail "$name: DeepSpeed's launcher can't hand on quotes, dollars or line ends: ${!name}" ;;
            esac
            echo "$name=${!name}" >>"$variables" ;;
    esac
done < <(compgen -e)

address=()
[ -z "$master" ] || address=(--master_addr "$master")
DS_ENV_FILE="$variables" "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --force_multi --no_local_rank \
    --log_level error --master_port "$port" ${address[@]+"${address[@]}"} "$root/launch/pretrain.py" \
    ${arguments[@]+"${arguments[@]}"}
