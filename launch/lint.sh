#!/usr/bin/env bash
# Sets up if needed and runs the linter and the formatter's check, as CI and pre-commit do.
#
#   launch/lint.sh          say what is wrong
#   launch/lint.sh --fix    mend what can be mended
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CELO2_EXTRA=dev source launch/setup.sh

if [ "${1:-}" = --fix ]; then
    ruff check --fix .
    ruff format .
else
    ruff check .
    ruff format --check .
fi
