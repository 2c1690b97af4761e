#!/usr/bin/env bash
# Makes everything ready to run: a virtual environment with torch for this machine and this package.
#
#   source launch/setup.sh     set up if needed, and activate the environment
#   bash launch/setup.sh       set up if needed
#
# Needs Python 3.11 or newer and g++. The environment is .venv in the repo, or $VENV; PYTHON names the interpreter.
# CELO2_EXTRA names the extra of pyproject.toml to install: train (the default), or dev to run the tests, meta, eval, track.
# A stamp in the environment makes a second call return at once, until pyproject.toml or setup.py change.

_celo2_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_celo2_venv="${VENV:-$_celo2_root/.venv}"
case "$_celo2_venv" in /*) ;; *) _celo2_venv="$PWD/$_celo2_venv" ;; esac

_celo2_setup() (  # a subshell: neither its options nor its variables reach a shell that sources this file
    set -euo pipefail
    cd "$_celo2_root"
    venv="$_celo2_venv"
    say() { echo "setup: $*"; }
    fail() { echo "setup: error: $*" >&2; exit 1; }
    export PIP_DISABLE_PIP_VERSION_CHECK=1

    gpu=no
    if nvidia-smi >/dev/null 2>&1; then gpu=yes; fi
    extra="${CELO2_EXTRA:-train}"
    # One stamp for each extra. The path is part of it because an editable install points into one clone.
    stamp="$venv/.celo2-setup-$extra"
    wanted="$(cat pyproject.toml setup.py launch/setup.sh launch/install_torch.sh | cksum) gpu=$gpu $_celo2_root"
    if [ -x "$venv/bin/python" ]; then
        if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
        # dev, meta and eval include train.
        if [ "$extra" = train ] && grep -qxF "$wanted" "$venv"/.celo2-setup-{dev,meta,eval} 2>/dev/null; then exit 0; fi
    fi

    recent='import sys; sys.exit(sys.version_info < (3, 11))'
    if [ ! -x "$venv/bin/python" ]; then
        python=""
        for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
            if "$candidate" -c "$recent" >/dev/null 2>&1; then python="$candidate"; break; fi
        done
        found="$("${PYTHON:-python3}" --version 2>/dev/null)" || found="no ${PYTHON:-python3}"
        [ -n "$python" ] || fail "need Python 3.11 or newer, found $found;" \
            "install it (Debian, Ubuntu: apt install python3.11 python3.11-venv python3.11-dev) or set PYTHON to one"
        "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || fail "$("$python" --version) lacks" \
            "venv or ensurepip; install them (Debian, Ubuntu: apt install python3-venv) or set PYTHON to another one"
    else
        "$venv/bin/python" -c "$recent" >/dev/null 2>&1 || fail "$venv has $("$venv/bin/python" --version 2>&1)," \
            "need 3.11 or newer; remove $venv, or set VENV to another folder"
    fi
    command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler ${CXX:-g++}," \
        "which DeepSpeed and the CPU kernels need; install it" \
        "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"

    if [ ! -x "$venv/bin/python" ]; then
        say "making the virtual environment $venv with $("$python" --version)"
        "$python" -m venv "$venv"
    fi
    python="$venv/bin/python"
    "$python" -m pip --version >/dev/null 2>&1 || fail "$venv has no pip; remove $venv and run this again"
    headers="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')"
    [ -e "$headers/Python.h" ] ||
        say "warning: no Python.h, which DeepSpeed's operations need (Debian, Ubuntu: apt install python3-dev)"

    install_torch "$python" "$gpu"
    # Hold torch where it is: another version could bring CUDA to a machine without a GPU.
    version="$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))')"
    constraint="$(mktemp)"
    trap 'rm -f "$constraint"' EXIT
    echo "torch==$version" >"$constraint"
    say "installing this package with its extra $extra (torch stays $version)"
    "$python" -m pip install -q -c "$constraint" -e ".[$extra]" || fail "pip could not install the package; see above"
    echo "$wanted" >"$stamp"
    say "done; activate with: source $venv/bin/activate"
)

# shellcheck source=launch/install_torch.sh
source "$_celo2_root/launch/install_torch.sh"
_celo2_setup
_celo2_status=$?
# shellcheck disable=SC1091
if [ "$_celo2_status" = 0 ]; then source "$_celo2_venv/bin/activate"; fi
unset -f _celo2_setup install_torch
unset _celo2_root _celo2_venv
# `return` when sourced, `exit` when executed.
return "$_celo2_status" 2>/dev/null || exit "$_celo2_status"
