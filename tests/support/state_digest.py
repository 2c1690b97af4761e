"""All that a checkpoint holds, as hashes by name: to compare two of them bit for bit."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from celo2_pretrain.optimizer.state.adamw_checkpoint import load_plain


def digests(checkpoint: Path) -> dict[str, str]:
    """Every tensor and every number of every file of a checkpoint: name -> hash or value."""
    found: dict[str, str] = {}

    def walk(name: str, value) -> None:
        if isinstance(value, torch.Tensor):
            data = (
                value.detach().contiguous().flatten().view(torch.uint8) if value.numel() else torch.empty(0, dtype=torch.uint8)
            )
            found[name] = f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name}/{key}", part)
        elif isinstance(value, (list, tuple)):
            for key, part in enumerate(value):
                walk(f"{name}/{key}", part)
        elif hasattr(value, "__dict__"):
            walk(name, vars(value))
        else:
            found[name] = repr(value)

    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.suffix == ".pt":
            walk(name, load_plain(path, mmap=False))
        elif path.suffix == ".safetensors":
            walk(name, load_file(path))
    return found
