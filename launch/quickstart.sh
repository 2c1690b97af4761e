#!/usr/bin/env bash
# The one command: sets up, collects a corpus that every machine has, and pretrains a small GPT-2-style model with
# Celo2 under DeepSpeed, ZeRO-2, on two ranks: the GPUs there are, or two processes on the CPU (2 to 3 minutes).
#
#   launch/quickstart.sh [--compare adamw] [key=value ...]
#
#   --compare adamw   then the same with AdamW, and both loss curves in one picture
#   key=value         any key of the configuration, e.g. train.max_steps=600 (celo2-pretrain train --list-keys)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

compare=no
overrides=()
while [ $# -gt 0 ]; do
    case "$1" in
        --compare)
            [ "${2:-}" = adamw ] || { echo "quickstart: error: --compare ${2:-(nothing)}: only adamw can be compared" >&2; exit 2; }
            compare=yes; shift 2 ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *=*) overrides+=("$1"); shift ;;
        *) echo "quickstart: error: unknown argument $1; see launch/quickstart.sh --help" >&2; exit 2 ;;
    esac
done

source launch/setup.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh  # only now: it looks for the Python that setup.sh may have to make
began=$SECONDS

ranks=2
if [ "$gpus" = 1 ]; then ranks=1; fi
threads_for "$ranks"

if [ ! -f data/python/index.json ]; then
    echo "== collecting a corpus: the sources of the installed Python"
    celo2-pretrain prepare --stdlib --out data/python --vocab-size 2048 --tokenizer-mb 2
fi

pretrain() {  # name of the run, then key=value arguments
    local run="$1"
    shift
    echo "== training $run on $ranks rank(s)"
    # "critical": a wrong argument is told once, by the driver, without the launcher's account of which process ended.
    deepspeed --log_level critical --no_local_rank --num_gpus "$ranks" --master_port "$(unused_port)" \
        launch/pretrain.py --config configs/tiny_cpu.yaml --overwrite run_dir="$run" "$@"
}

pretrain runs/quickstart ${overrides[@]+"${overrides[@]}"}
if [ "$compare" = yes ]; then
    pretrain runs/quickstart_adamw ${overrides[@]+"${overrides[@]}"} optimizer.name=adamw \
        optimizer.lr=2e-3 optimizer.adamw_lr_multiplier=6
    celo2-pretrain plot runs/quickstart runs/quickstart_adamw --out runs/quickstart_compare.png \
        --title "Celo2 and AdamW, the same model, data and steps"
fi
echo "== done in $((SECONDS - began)) s; before the command above, in this shell: source ${VIRTUAL_ENV#"$PWD/"}/bin/activate"
