#!/usr/bin/env bash
# Sets up if needed and runs the tests; arguments go to pytest, e.g. `launch/test.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # several ranks share the cores in many tests
export TOKENIZERS_PARALLELISM=false
if ! nvidia-smi >/dev/null 2>&1; then export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"; fi
# Many tests start several processes that meet over the network; on a busy machine one may come too late. A test that
# fails is tried once more, and the summary names it (RERUN).
exec python -m pytest -q --reruns 1 -rR "$@"
