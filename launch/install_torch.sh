#!/usr/bin/env bash
# Sourced by setup.sh and wheel.sh, which define say and fail: installs torch for this machine. Not for starting by itself.

install_torch() {  # python, gpu=yes|no
    if "$1" -c 'import torch; raise SystemExit([int(x) for x in torch.__version__.split(".")[:2]] < [2, 13])' \
        >/dev/null 2>&1; then
        say "torch is there"
    elif [ "$2" = yes ]; then
        say "installing torch with CUDA (nvidia-smi finds a GPU)"
        "$1" -m pip install -q "torch>=2.13" || fail "pip could not install torch; see above"
    elif [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
        say "installing torch"  # the plain package is the CPU build here
        "$1" -m pip install -q "torch>=2.13" || fail "pip could not install torch; see above"
    else
        say "installing torch for the CPU (nvidia-smi finds no GPU)"
        if "$1" -m pip install -q "torch==2.13.0+cpu" 2>/dev/null; then return; fi  # where pip is told of a CPU wheel
        # uv knows where PyTorch keeps its CPU builds.
        if "$1" -m pip install -q uv && "$1" -m uv pip install -q --python "$1" --torch-backend=cpu "torch>=2.13"; then
            return
        fi
        say "warning: found no CPU build of torch; the plain one brings gigabytes of CUDA libraries that stay unused"
        "$1" -m pip install -q "torch>=2.13" || fail "pip could not install torch; see above"
    fi
}
