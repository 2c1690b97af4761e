"""The model under one cell's engine, and its *full* parameters, gradients and states, whoever holds them, on the CPU.

Everything here is read through DeepSpeed's or torch's own means (`safe_get_full_*`, `full_tensor`), never through
Celo2's layouts, which are what the matrix tests. Every rank must ask for the same things in the same order.
"""

from __future__ import annotations

from contextlib import nullcontext

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from celo2_pretrain import Celo2, register
from celo2_pretrain.optimizer.matrices.param_groups import tag_of
from celo2_pretrain.weights import load_weights
from celo2_pretrain.weights.mlp import MLP

from .cells import Cell
from .model import MICRO_BATCH, Awkward, option_groups, theta

LOSS_SCALE = 256.0
SUB_GROUP = 700  # elements; makes several ZeRO-3 sub-groups
BUCKET = 1200  # elements of gradient reduced together; makes several buckets


def deepspeed_config(cell: Cell) -> dict:
    """The DeepSpeed JSON of a cell. Gradient clipping is off, so that the gradients read are those that are used."""
    zero = {"stage": int(cell.stage[-1])}
    if zero["stage"]:
        zero |= {"reduce_scatter": cell.reduce_scatter, "reduce_bucket_size": BUCKET}
        if cell.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if cell.extra == "round_robin":
            zero["round_robin_gradients"] = True
        if cell.extra == "alignment":
            zero["parameter_alignment"] = True
    if zero["stage"] == 3:
        zero |= {"sub_group_size": SUB_GROUP, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": cell.accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    if cell.precision.startswith("bf16"):
        config["bf16"] = {"enabled": True}
    if cell.precision == "bf16+fp32acc":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if cell.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": LOSS_SCALE}
    if cell.extra == "config":
        config["optimizer"] = {
            "type": "Celo2",
            "params": {"lr": 0.05, "weight_decay": 0.1, "adamw_weight_decay": 0.3, "newton_schulz_dtype": "fp32"},
        }
    return config


def own(x: Tensor) -> Tensor:
    """A copy on the CPU."""
    return x.detach().to("cpu", copy=True)


class DeepSpeedRun:
    """ZeRO 0–3."""

    def __init__(self, cell: Cell) -> None:
        config = deepspeed_config(cell)
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=config) if cell.zero_init else nullcontext():
            model = Awkward()
        if cell.extra == "config":
            self.options = tagged_by_register(model, config["optimizer"]["params"])
            self.engine, self.wrapper, _, _ = deepspeed.initialize(model=model, config=config)
            self.celo2 = self.engine.basic_optimizer
        else:
            register()
            groups, self.options = option_groups(model, cell.flipped)
            self.celo2 = Celo2(groups, weights=theta(), **own_options(cell))
            self.engine, self.wrapper, _, _ = deepspeed.initialize(model=model, optimizer=self.celo2, config=config)
        # A JSON config gets the bundled weights.
        self.mlp = load_weights("default") if cell.extra == "config" else MLP(**theta())
        self.model, self.cell = model, cell
        self.stage = int(cell.stage[-1])
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # DeepSpeed without ZeRO keeps fp32 copies of 16-bit parameters, in lists that run in parallel.
        self.copies = (
            {
                id(p): copy
                for lists in zip(getattr(self.wrapper, "fp16_groups", []), getattr(self.wrapper, "fp32_groups", []))
                for p, copy in zip(*lists)
            }
            if self.stage == 0
            else {}
        )
        self.scale = LOSS_SCALE if cell.precision == "fp16" else 1.0

    def backward(self, x: Tensor, use_sometimes: bool, factor: float, last: bool) -> None:
        self.engine.backward(self.engine(x.to(self.engine.device), use_sometimes, factor))
        if not last:
            self.engine.step()  # only counts micro-batches

    def step(self) -> None:
        self.engine.step()

    def overflowed(self) -> bool:
        return bool(self.wrapper.overflow)

    def parameter(self, name: str) -> Tensor:
        """The float32 master, whole."""
        p = self.params[name]
        if self.cell.gradients_from_plain:
            return own(p)  # float32 cells: the model's parameter is the master
        if self.stage:
            return own(safe_get_full_fp32_param(p))
        return own(self.copies.get(id(p), p))

    def gradient(self, name: str) -> Tensor | None:
        """The averaged gradient that the coming step uses, float32, without loss scale. None: it skips the tensor."""
        p = self.params[name]
        if self.stage == 0:
            if p.grad is None:
                return torch.zeros(p.shape) if self.copies else None
            return own(p.grad).float() / self.scale
        return own(safe_get_full_grad(p)).float().view(self.shape(name)) / self.scale

    def state(self, name: str, key: str) -> Tensor:
        p = self.params[name]
        if self.stage == 0:
            return self.celo2.state[self.copies.get(id(p), p)][key].cpu()
        return safe_get_full_optimizer_state(p, key).view(self.shape(name)).cpu()

    def ready_to_read_states(self) -> None:
        # DeepSpeed links states once, after the first group's first step, when the other groups have none yet.
        if hasattr(self.wrapper, "_hp_optimizer_states_linked"):
            self.wrapper._hp_optimizer_states_linked = False
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(getattr(self.params[name], "ds_shape", self.params[name].shape))

    def model_values(self) -> dict[str, Tensor]:
        """What the forward pass sees, frozen parameters included, in the model's dtype."""
        params = dict(self.model.named_parameters())
        with deepspeed.zero.GatheredParameters(list(params.values())) if self.stage == 3 else nullcontext():
            return {name: own(p) for name, p in params.items()}

    def close(self) -> None:
        self.engine.destroy()


class FSDP2Run:
    """`fully_shard` of some modules and of the root, with torch's own mixed precision."""

    def __init__(self, cell: Cell) -> None:
        torch.manual_seed(0)
        self.device = torch.device(get_accelerator().device_name())
        model = Awkward().to(self.device)
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        low = {"fp32": None, "fp16": torch.float16}.get(cell.precision, torch.bfloat16)
        reduce = torch.float32 if cell.precision == "bf16+fp32acc" else low
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=reduce)
        for module in (model.qkv, model.fc, model.proj):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        groups, self.options = option_groups(model, cell.flipped)
        self.celo2 = Celo2(groups, weights=theta(), nonfinite="skip", **own_options(cell))
        self.model, self.cell, self.mlp = model, cell, MLP(**theta())
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.scale = LOSS_SCALE if cell.precision == "fp16" else 1.0
        self.skipped = False

    def backward(self, x: Tensor, use_sometimes: bool, factor: float, last: bool) -> None:
        (self.model(x.to(self.device), use_sometimes, factor) * (self.scale / self.cell.accumulation)).backward()

    def step(self) -> None:
        for p in self.params.values():
            if p.grad is not None and self.scale != 1:
                p.grad.div_(self.scale)
        before = self.celo2.skipped_steps
        self.celo2.step()
        self.celo2.zero_grad()
        self.skipped = self.celo2.skipped_steps > before

    def overflowed(self) -> bool:
        return self.skipped

    def parameter(self, name: str) -> Tensor:
        return own(self.params[name].detach().full_tensor())

    def gradient(self, name: str) -> Tensor | None:
        grad = self.params[name].grad
        return None if grad is None else own(grad.detach().full_tensor()) / self.scale

    def state(self, name: str, key: str) -> Tensor:
        x = self.celo2.state[self.params[name]][key]
        return (x.full_tensor() if isinstance(x, DTensor) else x).cpu()

    def ready_to_read_states(self) -> None:
        pass

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.params[name].shape)

    def model_values(self) -> dict[str, Tensor]:
        return {name: own(p.detach().full_tensor()) for name, p in self.model.named_parameters()}

    def close(self) -> None:
        pass


def tagged_by_register(model: nn.Module, params: dict) -> dict[str, dict]:
    """Tags the model as a user would whose optimizer stands in the config; returns the options by parameter name."""
    register(model)
    return {
        name: {
            "rule": tag_of(p).rule,
            "orthogonalize": True,
            "adamw_lr_multiplier": 20.0,
            "lr": params["lr"],
            "weight_decay": params["weight_decay"] if tag_of(p).rule == "celo2" else params["adamw_weight_decay"],
        }
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def own_options(cell: Cell) -> dict:
    """Celo2's own options: what an extra cell sets, and the reference's float32 products (GPUs have bfloat16 by default)."""
    return {"newton_schulz_dtype": "fp32"} | {
        "buckets": {"bucket_size": 1},
        "bf16_products": {"newton_schulz_dtype": "bf16"},
        "fp8": {"state_dtype": "fp8"},
    }.get(cell.extra, {})


def start(cell: Cell) -> DeepSpeedRun | FSDP2Run:
    return FSDP2Run(cell) if cell.stage == "fsdp2" else DeepSpeedRun(cell)
