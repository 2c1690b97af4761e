"""Bytes that the activations of one micro-batch take: traced on the real model with tensors that hold no data.

The model of the config is built with one and with two layers on fake tensors and taken through forward and backward
pass, while every storage that comes to life or dies is counted. Bytes are a straight line in the number of layers, so
two points give any depth. No formula per architecture or attention has to be kept up to date.

The trace is of eager kernels on the CPU; what a GPU's flash attention saves is the same (q, k, v, output, log-sum-exp).
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from celo2_pretrain.model.build import checkpoint_activations
from celo2_pretrain.model.loss import training_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Activations:
    saved: float  # bytes alive between forward and backward pass
    peak: float  # most bytes alive at a time, in the backward pass; parameters and their gradients don't count


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, while they live: `now`, and the most at a time, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def ignore(self, tensors) -> None:
        """Don't count what is here already."""
        for tensor in tensors:
            self._know(tensor.untyped_storage(), 0)

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._know(storage, storage.nbytes())
        return out


def live_bytes(model: torch.nn.Module, windows: torch.Tensor, z_loss: float = 0.0) -> Activations:
    """Forward and backward pass of `windows` (B, context + 1), counted. Gradients are dropped as soon as they are there."""
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in model.parameters()]
    try:
        with LiveBytes() as live:
            live.ignore([*model.parameters(), *model.buffers(), windows])
            loss, _ = training_loss(model, windows, z_loss)
            saved = live.now
            loss.backward()
        return Activations(saved, live.peak)
    finally:
        for hook in hooks:
            hook.remove()


def _with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):  # models that mix kinds of layers list them
        text.layer_types = text.layer_types[:layers]
    return config


def trace(
    config: PretrainedConfig,
    layers: int,
    sequences: int,
    context: int,
    precision: str,
    checkpointing: bool,
    z_loss: float = 0.0,
) -> Activations:
    """One micro-batch of `sequences` windows of `context` tokens through so many layers of a model like `config`."""
    # A flash-attn kernel can't be traced without a GPU; torch's own saves the same tensors.
    attention = "eager" if config._attn_implementation == "eager" else "sdpa"
    # Whether windows hold several packed texts, transformers reads from data, which fake tensors don't have: ours don't.
    with FakeTensorMode(), patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None):
        model = AutoModelForCausalLM.from_config(
            _with_layers(config, layers), dtype=DTYPES[precision], attn_implementation=attention
        ).train()
        if checkpointing:
            checkpoint_activations(model)
        return live_bytes(model, torch.zeros(sequences, context + 1, dtype=torch.int64), z_loss)


def activations(
    model: PreTrainedModel, sequences: int, context: int, precision: str, checkpointing: bool, z_loss: float = 0.0
) -> Activations:
    """Bytes for the whole depth of `model` (which may lie on the meta device)."""
    one, two = (trace(model.config, layers, sequences, context, precision, checkpointing, z_loss) for layers in (1, 2))
    more = model.config.get_text_config().num_hidden_layers - 1
    return Activations(*(getattr(one, part) + more * (getattr(two, part) - getattr(one, part)) for part in ("saved", "peak")))
