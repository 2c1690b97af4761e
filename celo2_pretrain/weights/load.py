"""Where do the weights of the learned rule come from: bundled, a dict, a file, or the Hugging Face hub?"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from celo2_pretrain.common.extras import install_line
from celo2_pretrain.weights.files import READERS, read_file
from celo2_pretrain.weights.layouts import to_canonical
from celo2_pretrain.weights.mlp import MLP

_HERE = Path(__file__).parent
# Names of the bundled weights; celo2.md says how they were made.
BUNDLED = {
    "default": _HERE / "celo2.safetensors",
    "default-base": _HERE / "celo2_base.safetensors",
    "constructed": _HERE / "constructed.safetensors",
    "constructed-base": _HERE / "constructed_base.safetensors",
}
# What a hub repo or a downloaded folder may call its weights: ours, the authors', PyLO's.
KNOWN_FILES = ("celo2.safetensors", "theta.state", "model.safetensors", "celo2_weights.pt")
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def load_weights(weights: str | os.PathLike | Mapping = "default") -> MLP:
    """The MLP of the learned rule, as float32 CPU tensors of the shapes in `mlp.MLP`.

    Args: `weights` is
    - "default" (for Celo2) or "default-base" (without orthogonalisation): bundled, see celo2.md beside this file;
      "constructed", "constructed-base": what their meta-training began with;
    - a dict of arrays or tensors w0 (30, 8), b0 (8,), w1 (8, 8), b1 (8,), w2 (8, 3), b2 (3,);
    - a file: our .safetensors, the authors' flax `theta.state`, PyLO's `.pt` or `.safetensors`,
      or a folder that holds one of them under its published name;
    - a Hugging Face hub repo "org/name" or "org/name@revision".
    Raises ValueError (wrong keys, shapes, dtype, NaN, damaged file, a pickle of more than tensors) or
    FileNotFoundError (no such file; hub not reached), both saying what was found and what was expected.
    """
    return MLP(**_canonical(weights))


def _canonical(weights) -> dict[str, Tensor]:
    if isinstance(weights, Mapping):
        return to_canonical(weights, "weights")
    if hasattr(weights, "_asdict"):  # an MLP, as load_weights returns it
        return to_canonical(weights._asdict(), "weights")
    if not isinstance(weights, (str, os.PathLike)):
        raise ValueError(f"weights is a {type(weights).__name__}; expected 'default', a path, a hub id or a dict")
    if isinstance(weights, str) and weights in BUNDLED:
        return read_file(BUNDLED[weights])
    path = Path(weights).expanduser()
    if path.is_dir():
        for name in KNOWN_FILES:
            if (path / name).is_file():
                return read_file(path / name)
        raise FileNotFoundError(f"folder {path} holds none of {', '.join(KNOWN_FILES)}; name the weights file")
    hub = HUB_ID.fullmatch(weights) if isinstance(weights, str) else None
    if path.exists() or hub is None or path.suffix in READERS:
        return read_file(path)
    return read_file(_download(hub["repo"], hub["revision"]))


def _download(repo: str, revision: str | None) -> Path:
    """The first of KNOWN_FILES in a hub repo, through the hub's cache (which also serves offline)."""
    name = f"{repo}@{revision}" if revision else repo
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"no weights file {name}, and the hub takes {install_line(error, 'train')}") from None
    offline = None
    try:
        for local_only in (False, True):  # a second round once the hub is found unreachable: cached files
            for file in KNOWN_FILES:
                try:
                    return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, local_files_only=local_only))
                except errors.LocalEntryNotFoundError as error:
                    offline = offline or error
                    if not local_only:
                        break
                except errors.EntryNotFoundError:
                    continue
            if offline is None:
                raise FileNotFoundError(f"hub repo {name} holds none of {', '.join(KNOWN_FILES)}")
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"no weights file {name}, and the hub has no such repo or revision (or it is private: log in with `hf auth login`)"
        ) from error
    raise FileNotFoundError(
        f"no weights file {name}, and hub repo {name} can't be reached and isn't cached;"
        " go online once, or download its weights file and give the path"
    ) from offline
