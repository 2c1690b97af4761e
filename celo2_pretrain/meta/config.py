"""Everything that a meta-training is set up with: read from YAML and `key=value` arguments, checked at the door."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..common.errors import UserError, one_line
from ..common.settings import Reader, key


@dataclass
class MetaConfig:
    """Defaults: the paper's recipe for Celo2 (arXiv 2602.19142, section 4 and appendix)."""

    families: str = key(
        "mlp/digits mlp/photos mlp/digits_on_photos mlp/orientation",
        "task families, separated by blanks: mlp/SET, conv/SET, residual/SET, transformer, text, quadratic",
    )
    problems: int = key(8, "inner problems of each family at a time (PES: antithetic pairs)", 1)
    estimator: Literal["pes", "analytic", "evolution"] = key(
        "pes", "outer gradient by persistent evolution strategies or back-propagation; or none: CMA-ES over constructed rules"
    )
    population: int = key(12, "candidates of a generation (evolution)", 4)
    long_momenta: bool = key(False, "momenta that remember more steps than the trainings have, too (evolution)")
    truncation: int = key(50, "inner steps between two outer steps", 1)
    tail: float = key(1.0, "share of a truncation's steps, the last ones, whose losses count", 0, 1)
    sigma: float = key(0.01, "deviation of PES's perturbations, or of evolution's first candidates", 1e-8)
    length_min: int = key(100, "inner steps of an unroll, log-uniform between length_min and length_max", 1)
    length_max: int = key(2000, "see length_min", 1)
    lr_min: float = key(1e-3, "inner learning rate, log-uniform between lr_min and lr_max", 1e-12)
    lr_max: float = key(1e-3, "see lr_min", 1e-12)
    scale_min: float = key(
        1e-3,
        "reparametrisation augmentation: a problem's parameters are divided by a scale, "
        "log-uniform between scale_min and scale_max",
        1e-12,
    )
    scale_max: float = key(1e3, "see scale_min", 1e-12)
    schedule: Literal["constant", "cosine"] = key("constant", "inner learning rate: constant, or warm-up and cosine")
    adamw: bool = key(False, "give 1-D tensors, embeddings and heads to AdamW, as deployment does")
    adamw_lr: float = key(5e-3, "peak rate of that AdamW", 0)
    weight_decay: float = key(0.0, "inner weight decay", 0)
    inner_clip: float = key(0.0, "inner clipping of the gradients' global norm; 0: none", 0)
    orthogonalize: bool = key(True, "Celo2; false: Celo2-base")
    normalize_inputs: bool = key(True, "divide each input feature by its root mean square (false: an ablation)")
    rms_decay: float = key(0.95, "decay of the second moment (0.999: an ablation)", 0, 1)
    init: str = key("random", "theta to begin with: random, or weights (default, a path, a hub repository)")
    live_units: float = key(0.0, "deviation of the noise put into hidden units that the initial theta leaves dead", 0)
    outer_steps: int = key(100_000, "outer steps", 1)
    outer_lr: float = key(5e-5, "AdamW's rate for theta: 5e-5 for Celo2, 1e-4 for Celo2-base", 0)
    outer_weight_decay: float = key(0.0, "AdamW's weight decay for theta", 0)
    outer_clip: float = key(1.0, "clipping of the outer gradient's norm", 0)
    average: float = key(0.0, "decay of the average of theta that is saved; 0: theta itself", 0, 0.999999)
    seed: int = key(0, "seed of everything", 0)
    device: str = key("cpu", "cpu, cuda or cuda:N")
    save_every: int = key(100, "outer steps between checkpoints", 1)
    out: str = key("runs/meta", "folder for checkpoints, metrics.jsonl, meta_loss.png and theta_*.safetensors")

    @property
    def family_names(self) -> list[str]:
        return self.families.replace(",", " ").split()


READER = Reader(MetaConfig, "celo2-pretrain meta-train", "configs/meta/", "outer_lr=1e-4")
list_keys = READER.list_keys


def load_config(path: str | None, overrides: list[str]) -> MetaConfig:
    """The configuration of YAML file `path` (None: the defaults) with `key=value` overrides. Raises UserError."""
    config, _ = READER.load(path, overrides)
    for low, high in (("length_min", "length_max"), ("lr_min", "lr_max"), ("scale_min", "scale_max")):
        if getattr(config, low) > getattr(config, high):
            raise UserError(f"{low}={getattr(config, low)} is above {high}={getattr(config, high)}: exchange them")
    if config.truncation > config.length_max:
        raise UserError(
            f"truncation={config.truncation} is above length_max={config.length_max}: an unroll is at least one truncation"
        )
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={config.device} can't be used here ({one_line(error)}): cpu, cuda or cuda:N") from None
    if not config.family_names:
        raise UserError("families is empty: name at least one, for example families=mlp/digits")
    return config
