"""What computes the passes: plain torch anywhere, or compiled kernels. Chosen by CELO2_BACKEND, and said once.

reference   plain torch (`plain.py`, `passes.py`), every device and shape
compile     C++ kernels on CPU tensors (kernels/cpu.cpp); what they don't cover goes to plain torch
triton      Triton kernels on GPU tensors; on CPU tensors only where Triton interprets them (TRITON_INTERPRET=1)
auto        compile on the CPU where a compiler is found, triton on a GPU where it is installed, else reference
"""

from __future__ import annotations

import functools
import logging
import os

import torch

from ...kernels import cpu
from ...weights.mlp import DIMS
from .compiled import Compiled
from .plain import TorchBackend

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "compile", "reference")
KERNEL_DIMS = (30, 8, 8)  # features and hidden units that the kernels are written for


def backend_for(device: torch.device) -> TorchBackend:
    """The backend for tensors of this device, by CELO2_BACKEND. Raises ValueError for an unknown name."""
    wanted = os.environ.get("CELO2_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise ValueError(f"CELO2_BACKEND={wanted!r} is none of {', '.join(BACKENDS)}")
    return _choose(wanted, device.type)


@functools.cache
def _choose(wanted: str, device: str) -> TorchBackend:
    if wanted == "reference":
        chosen, why = TorchBackend(), "CELO2_BACKEND asks for it"
    elif DIMS[:3] != KERNEL_DIMS:  # a changed rule (docs/meta_training.md)
        if wanted != "auto":
            raise RuntimeError(
                f"CELO2_BACKEND={wanted}, but the kernels are made for an MLP of {KERNEL_DIMS}, the rule "
                f"has {DIMS[:3]}: set CELO2_BACKEND=reference, or auto"
            )
        chosen, why = TorchBackend(), f"the kernels are made for an MLP of {KERNEL_DIMS}, the rule has {DIMS[:3]}"
    elif wanted == "triton" or device != "cpu":
        chosen, why = _choose_triton(wanted, device)
    else:
        try:
            chosen, why = Compiled(), "compiled CPU kernels"
        except cpu.Unavailable as error:
            if wanted == "compile":
                raise RuntimeError(f"CELO2_BACKEND=compile, but {error}") from None
            chosen, why = TorchBackend(), f"{error}; the plain-torch passes are some 40 times slower"
            logger.warning("Celo2 backend on %s: reference (%s)", device, why)
            return chosen
    logger.info("Celo2 backend on %s: %s (%s)", device, chosen.name, why)
    return chosen


def _choose_triton(wanted: str, device: str) -> tuple[TorchBackend, str]:
    """The Triton backend, or (unless it was asked for by name) plain torch, and why."""
    if wanted == "compile":
        return TorchBackend(), "CELO2_BACKEND=compile has kernels for CPU tensors only"
    try:
        from .triton import Triton, interpreted
    except ImportError as error:
        if wanted == "triton":
            raise RuntimeError(
                f"CELO2_BACKEND=triton, but Triton can't be imported ({error}); install triton, or set CELO2_BACKEND=auto"
            ) from None
        logger.warning("Triton can't be imported (%s): the plain-torch passes on %s are many times slower", error, device)
        return TorchBackend(), "Triton can't be imported"
    if device == "cuda":  # also what torch calls AMD's GPUs
        return Triton(), "Triton kernels"
    if wanted == "triton" and device == "cpu":
        if not interpreted():
            raise RuntimeError(
                "CELO2_BACKEND=triton, but the tensors are on the CPU, where Triton only interprets kernels "
                "(for tests): set TRITON_INTERPRET=1 for that, or CELO2_BACKEND=auto for fast kernels"
            )
        return Triton(), "Triton kernels, interpreted: very slow"
    if wanted == "triton":
        raise RuntimeError(f"CELO2_BACKEND=triton, but the tensors are on {device}; it serves cuda (NVIDIA and AMD)")
    return TorchBackend(), f"there are no kernels for {device} yet"
