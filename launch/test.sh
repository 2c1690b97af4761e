#!/usr/bin/env bash
# Sets up if needed and runs the tests; `--everything` runs the slow ones, too. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CELO2_EXTRA=dev source launch/setup.sh

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # several ranks share the cores in many tests
export TOKENIZERS_PARALLELISM=false
if ! nvidia-smi >/dev/null 2>&1; then export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"; fi
if [ "${DS_ACCELERATOR:-}" = cpu ]; then  # DeepSpeed compiles its communication in the first run, which is no test's time
    python -c 'from celo2_pretrain.train.start.ranks import join_ranks; join_ranks()'
fi
exec python -m pytest -q --numprocesses 2 --dist loadfile --durations 15 "$@"
