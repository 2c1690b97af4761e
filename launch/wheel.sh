#!/usr/bin/env bash
# Builds the wheel and the source distribution into dist/, installs the wheel into an empty environment, and uses it away
# from the source tree: first the optimizer alone, then the driver and a swapped training loop, on two ranks of the CPU.
# Needs a package index, some gigabytes for torch, and about five minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CELO2_EXTRA=dev source launch/setup.sh
# shellcheck source=launch/install_torch.sh
source launch/install_torch.sh

say() { echo "wheel: $*"; }
fail() { echo "wheel: error: $*" >&2; exit 1; }

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
root="$PWD"
rm -rf dist
say "building"
python -m build --outdir dist . >"$work/build.log" 2>&1 || { cat "$work/build.log"; fail "it does not build"; }
ls -l dist
wheel="$(echo "$root"/dist/*.whl)"

python -m venv "$work/empty"
deactivate
unset PYTHONPATH
export PATH="$work/empty/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu
export TORCH_EXTENSIONS_DIR="$work/extensions"  # what DeepSpeed compiles for this environment is for no other
install_torch "$work/empty/bin/python" no
python -m pip install -q "$wheel"
mkdir "$work/use"
cd "$work/use"

say "the optimizer alone, version $(python "$root/tests/support/core_use.py" "$work/use/state")"
celo2-pretrain --help >/dev/null
if celo2-pretrain train 2>refused; then fail "train runs without its packages"; fi
grep -q 'pip install "celo2-pretrain\[train\]"' refused || fail "train says: $(cat refused)"

say "the driver, with the configs inside the wheel"
python -m pip install -q "${wheel}[train]"
celo2-pretrain prepare --stdlib --out data/python --max-mb 2 --vocab-size 512 --tokenizer-mb 1
deepspeed --log_level critical --no_local_rank --num_gpus 2 --module celo2_pretrain train --config configs/tiny_cpu.yaml \
    train.max_steps=8 eval.every=4 checkpoint.every=4 run_dir=run
celo2-pretrain train --resume run train.max_steps=10
celo2-pretrain generate run --prompt "def " --tokens 8
celo2-pretrain export run --out exported
celo2-pretrain plan --config configs/gpt2_124m.yaml --gpus 8 >plan.txt
grep -q "tokens a day" plan.txt || fail "plan says: $(cat plan.txt)"

say "a training loop of one's own, with the change of examples/fsdp2.diff"
mkdir examples
cp "$root/examples/fsdp2.py" examples/
git apply "$root/examples/fsdp2.diff"
torchrun --nproc_per_node 2 examples/fsdp2.py
say "done"
