"""How are weights read from and written to a file? Nothing here ever unpickles an arbitrary object."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from celo2_pretrain.common.durable import write_atomically
from celo2_pretrain.common.extras import install_line
from celo2_pretrain.weights.layouts import SHAPES, to_canonical
from celo2_pretrain.weights.mlp import MLP

FLAX_NDARRAY = 1  # the msgpack extension code of flax.serialization for (shape, dtype name, bytes)
FLAX_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def _line(error: Exception) -> str:
    """What an error of some library says, as a part of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # a header with odd shapes, dtypes or offsets gives errors of many kinds
        raise ValueError(f"{path} is no complete safetensors file: {_line(error)}") from error


def _flax_extension(code: int, data: bytes) -> Tensor:
    """Decode flax's ndarray extension; every other extension (complex numbers, …) is refused."""
    if code != FLAX_NDARRAY:
        raise ValueError(f"it holds msgpack extension {code}, expected only arrays (extension {FLAX_NDARRAY})")
    import msgpack

    shape, dtype, buffer = msgpack.unpackb(data)
    if dtype not in FLAX_DTYPES:
        raise ValueError(f"an array has dtype {dtype}, expected a float")
    if not buffer:
        raise ValueError(f"an array has no data, shape {tuple(shape)}")
    return torch.frombuffer(bytearray(buffer), dtype=FLAX_DTYPES[dtype]).reshape(shape)


def _leaves(tree: Mapping, prefix: str = "") -> dict[str, Tensor]:
    """A nested dict → {"a/b": leaf}."""
    flat = {}
    for key, value in tree.items():
        flat.update(_leaves(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _read_flax(path: Path) -> dict[str, Tensor]:
    """The authors' `theta.state`: flax.serialization.to_bytes of {"ff_mod_stack": {"~": {"w0__0": …}}}."""
    try:
        import msgpack
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} is a flax checkpoint, which takes {install_line(error, 'train')}") from None
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_flax_extension)
    except Exception as error:  # flipped bits make any msgpack out of any other
        raise ValueError(f"{path} is no complete flax checkpoint (msgpack): {_line(error)}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, expected flax's dict of MLP weights")
    flat = _leaves(tree)
    # The MLP's module is the one with w0; leaves elsewhere (Celo's or VeLO's LSTM) keep their full names as extra keys.
    module = next((name.rpartition("/")[0] + "/" for name in flat if name.endswith(("/w0__0", "/w0"))), "")
    return {name.removeprefix(module): leaf for name, leaf in flat.items()}


def _read_torch(path: Path) -> dict[str, Tensor]:
    """PyLO's state dict, by the restricted unpickler that knows tensors and plain containers only."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"refusing to unpickle {path}: it is damaged or holds more than tensors; save a plain"
            " state dict, or better a .safetensors"
        ) from error
    except Exception as error:  # an unpickler that meets flipped bits raises whatever the next instruction does
        raise ValueError(f"{path} is no complete torch file: {_line(error)}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict of MLP weights")
    return dict(state)


READERS = {
    ".safetensors": _read_safetensors,
    ".state": _read_flax,
    ".msgpack": _read_flax,
    ".pt": _read_torch,
    ".pth": _read_torch,
}


def read_file(path: str | os.PathLike) -> dict[str, Tensor]:
    """Canonical tensors (see `layouts`) from a file of any known format, told by its suffix and key names.

    Raises FileNotFoundError, or ValueError that names the file, what was found and what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}; give 'default', a file, or a hub id org/name")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        pickled = "refusing to unpickle; " if path.suffix.lower() in (".pkl", ".pickle") else ""
        raise ValueError(f"{path}: {pickled}suffix {path.suffix!r} is not one of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; copy or download it again")
    return to_canonical(reader(path), str(path))


def save_weights(mlp: MLP, path: str | os.PathLike, metadata: Mapping) -> None:
    """Write the MLP as float32 safetensors, whole or not at all.

    Args: `mlp` with the shapes of `layouts.SHAPES`; `path` ends in .safetensors; `metadata` is
    JSON-serialisable and says how the weights were made. It lies under the one key "celo2", because the order
    of several keys in the file is arbitrary and equal weights are to give equal bytes.
    Raises ValueError for another suffix, a wrong shape or non-finite weights.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are saved as .safetensors, got {path}")
    tensors = to_canonical(dict(zip(SHAPES, mlp)), str(path))
    data = safetensors.torch.save(tensors, metadata={"celo2": json.dumps(dict(metadata), sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
