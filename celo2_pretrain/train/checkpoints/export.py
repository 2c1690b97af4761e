"""From a run's checkpoint to a plain transformers model, in memory or as a Hugging Face folder."""

import contextlib
import io
import logging
import os
import shutil
from pathlib import Path

import torch

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import load_config
from celo2_pretrain.data.documents import mask_documents
from celo2_pretrain.data.mixture import open_mixture
from celo2_pretrain.data.tokenizer import load_tokenizer
from celo2_pretrain.model.build import build_model
from celo2_pretrain.optimizer.state.adamw_checkpoint import load_plain
from celo2_pretrain.train.checkpoints import select


def run_config_path(path: str) -> str:
    """The config.yaml of the run that `path` (a run folder or one of its checkpoints) belongs to."""
    select.find(path)
    for folder in (Path(path), *Path(path).parents[:2], *Path(path).resolve().parents[:2]):
        if (folder / "config.yaml").is_file():
            return str(folder / "config.yaml")
    raise UserError(f"{path!r} is not a run: no config.yaml there; give the run_dir of a training run")


def master_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's weights by name, in float32 where DeepSpeed kept float32 masters.

    Nothing of it is executed: `verify` found plain data in its files, before DeepSpeed opens them.
    """
    if any(folder.glob("*zero_pp_rank_*optim_states.pt")):
        from deepspeed.utils import logger
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        logger.setLevel(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints a lot
            return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name)
    return load_plain(folder / "mp_rank_00_model_states.pt")["module"]  # ZeRO-0


def load_trained(path: str):
    """(model, tokenizer, config) of the newest checkpoint of run `path`, or of one checkpoint; the model in float32."""
    config = load_config(run_config_path(path))
    folder = select.find(path)
    select.verify(folder)
    mixture = open_mixture(config.data.path, config.data.mixture)
    index = mixture.index
    description = select.read_state(folder, {})["description"]
    if description["data.path's tokenizer"] != index["tokenizer"]["sha256"][:12]:
        raise UserError(
            f"{mixture.paths[0]} was prepared again with another tokenizer since {folder} was written: "
            f"prepare it with the old one"
        )
    model = build_model(config.model, index["vocab_size"], index["eos_id"], pretrained=False)
    weights = {name: tensor.float() for name, tensor in master_weights(folder).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if config.model.tied:
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        raise UserError(
            f"{folder} holds another model than config.yaml says: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    model.tie_weights()
    if config.data.mask_documents:
        mask_documents(model, index["eos_id"])
    return model.eval(), load_tokenizer(mixture.paths[0]), config


def export(path: str, out: str, dtype: str = "float32", overwrite: bool = False) -> None:
    """Write model and tokenizer as a folder for transformers' `from_pretrained`; whole or not at all.

    Raises UserError when `out` exists (unless `overwrite`), or `path` is not a run with a checkpoint.
    """
    target = Path(out)
    if target.exists() and not overwrite:
        raise UserError(f"{out!r} exists: choose another --out, or pass --overwrite to replace it")
    if target.exists() and any(target.iterdir()) and not (target / "config.json").exists():
        raise UserError(f"{out!r} exists and is not an exported model: choose another --out")
    model, tokenizer, config = load_trained(path)
    model.config.use_cache = True  # off in training only
    model.generation_config.use_cache = True
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.to(getattr(torch, dtype)).save_pretrained(unfinished)
        tokenizer.save_for_transformers(unfinished, config.model.context)
        if target.exists():
            shutil.rmtree(target)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
