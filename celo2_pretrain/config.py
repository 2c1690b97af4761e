"""The run's configuration: every key, its meaning and its default, read from YAML and from `key=value` arguments.

Unknown keys, wrong types and impossible values raise UserError naming the key, the value and what to do.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from celo2_pretrain.common.errors import UserError, shown
from celo2_pretrain.common.settings import Key, Reader, as_tree, key
from celo2_pretrain.common.yaml_text import dump_yaml


@dataclass
class Data:
    path: str = key("data/tokens", "folder written by `celo2-pretrain prepare`")
    mixture: list = key([], "several such folders in path's stead: a list of {path, weight}")
    mask_documents: bool = key(False, "attend within documents only, each with positions of its own")


@dataclass
class Model:
    family: Literal["gpt2", "llama"] = key("gpt2", "gpt2 (learned positions, GELU) or llama (rotary, SwiGLU)")
    layers: int = key(12, "transformer blocks", 1, 10_000)
    width: int = key(768, "width of the residual stream; a multiple of heads", 8, 2**20)
    heads: int = key(12, "attention heads", 1, 2**20)
    kv_heads: int | None = key(None, "key/value heads (llama only); null: as many as heads", 1)
    mlp_width: int | None = key(None, "width of the MLP's hidden layer; null: 4 × width (gpt2), 8/3 × width (llama)", 1, 2**24)
    context: int = key(1024, "tokens in a training window", 2, 2**24)
    vocab_size: int | None = key(None, "rows of the embedding; null: as many as the data's vocabulary", 2, 2**31)
    tied: bool = key(True, "share the embedding's weights with the output head")
    scaled_init: bool = key(True, "begin residual projections smaller by 1/sqrt(2 × layers), as GPT-2")
    from_: str | None = key(None, "hub name or folder of a transformers model to train on; its shape is then the model's")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = key(
        "sdpa", "sdpa (torch's fused kernels), eager, or flash_attention_2 (the flash-attn package, NVIDIA GPUs)"
    )
    activation_checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = key(False, "torch.compile the model: a slow first step, faster ones after it")


@dataclass
class Optimizer:
    name: Literal["celo2", "celo2_base", "adamw"] = key("celo2", "celo2, celo2_base (no orthogonalisation) or adamw")
    lr: float = key(1e-3, "peak learning rate of the hidden matrices (a Celo2 step has RMS 1)", 0)
    adamw_lr_multiplier: float = key(20.0, "embeddings, head and 1-D tensors get AdamW at this many times lr", 0)
    weight_decay: float = key(0.0, "decoupled weight decay of the hidden matrices", 0)
    adamw_weight_decay: float = key(0.0, "the same of all other tensors: embeddings, head, 1-D tensors", 0)
    weights: str = key("default", "weights of the learned rule: default, a path, or a hub repository")
    newton_schulz_dtype: Literal["auto", "fp32", "bf16"] = key(
        "auto", "orthogonalisation in fp32, bf16, or auto: bf16 on GPUs that have it in matrix units"
    )
    state_dtype: Literal["fp32", "bf16", "fp8"] = key("fp32", "Celo2's accumulators: 16, 8 or 4 bytes a parameter")
    check_replicas_every: int = key(0, "steps between comparisons of what must be the same on all ranks; 0: never", 0)


@dataclass
class Schedule:
    name: Literal["cosine", "wsd", "constant"] = key("cosine", "after the warm-up; wsd: stable, then a decay at the end")
    warmup: float = key(0.05, "fraction of the steps with linear warm-up", 0, 1)
    decay: float = key(0.2, "wsd: fraction of the steps, at the end, in which the learning rate falls", 0, 1)
    shape: Literal["sqrt", "linear", "cosine"] = key("sqrt", "wsd: how it falls: 1 - sqrt(progress), linear or cosine")
    final: float = key(0.0, "cosine, wsd: learning rate at the end, as a fraction of the peak", 0, 1)
    steps: int | None = key(None, "length of the schedule in steps; null: train.max_steps", 1)


@dataclass
class Train:
    max_steps: int = key(1000, "optimizer steps in all (resumed ones included)", 1)
    micro_batch_size: int = key(8, "windows per rank in one forward pass", 1, 2**20)
    global_batch_size: int = key(32, "windows per step over all ranks; a multiple of micro_batch_size × ranks", 1, 2**31)
    batch_warmup: list = key([], "stages before global_batch_size: a list of {steps or tokens, global_batch_size}")
    grad_clip: float = key(1.0, "largest norm of the gradient; 0 turns clipping off", 0)
    z_loss: float = key(0.0, "weight of the mean squared log-normaliser of the logits in the loss; PaLM: 1e-4", 0)
    seed: int = key(0, "seed of the initial weights and of the data order", 0)
    precision: Literal["fp32", "bf16", "fp16"] = key("fp32", "arithmetic of the model; master weights are fp32 in each")
    zero_stage: Literal[0, 1, 2, 3] = key(2, "shards: 1 optimizer state, 2 also gradients, 3 also parameters")
    log_every: int = key(10, "steps between lines of metrics.jsonl", 1)
    stop_file: str | None = key(None, "when this file appears, the run saves and stops; null: STOP in run_dir")
    watchdog_seconds: float = key(1800.0, "end all ranks when one makes no progress for so long; 0: never", 0)
    on_nonfinite: Literal["stop", "skip"] = key("skip", "a step with NaN, Inf or overflow: stop the run, or leave it out")
    max_skipped: int = key(10, "such steps in a row that are left out before the run stops after all", 0)
    on_spike: Literal["ignore", "warn", "rollback"] = key(
        "warn", "rollback: to the newest checkpoint, and on with the data after the spike's"
    )
    spike_nats: float = key(1.0, "a loss so far above the median of the last 64 steps is a spike", 0)
    max_rollbacks: int = key(3, "rollbacks before the run stops", 0)


@dataclass
class Eval:
    every: int = key(100, "steps between validations; there is always one at the end", 1)
    sequences: int = key(256, "validation windows, the same ones each time", 1)
    prompt: str = key("", "text that the sample at the end continues; empty: no sample")
    sample_tokens: int = key(100, "tokens to generate for the sample", 1)


@dataclass
class Checkpoint:
    every: int = key(500, "steps between checkpoints; there is always one at the end", 1)
    keep_last: int = key(2, "newest checkpoints to keep", 1)
    keep_every: int = key(0, "also keep for good the checkpoints of every so many steps; 0: none", 0)
    staging: str | None = key(None, "write here first (fast, of this machine, e.g. /dev/shm), and copy while training goes on")
    on_error: Literal["stop", "continue"] = key("stop", "when one can't be saved: stop, or continue with a warning")
    any_world: bool = key(True, "also save what resumes with other ranks, ZeRO stage or precision (doubles the size)")


@dataclass
class Track:
    norms: bool = key(True, "record norms of gradient, update and weights by rule; takes a copy of a rank's weights")
    peak_tflops: float | None = key(None, "TFLOP/s of a device, for mfu; null: the data sheet's of a known GPU", 0)
    tensorboard: bool = key(False, "write the metrics for TensorBoard too, to run_dir/tensorboard")
    wandb_project: str = key("", "project of Weights & Biases that the metrics go to; empty: none")


@dataclass
class Profile:
    steps: str = key("", "steps to trace with torch.profiler, such as 10-12, to run_dir/profile; empty: none")
    all_ranks: bool = key(False, "trace every rank, not only the first")


@dataclass
class Config:
    run_dir: str = key("runs/default", "folder for checkpoints, metrics.jsonl, loss.png and the resolved config.yaml")
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    track: Track = field(default_factory=Track)
    profile: Profile = field(default_factory=Profile)
    deepspeed: dict = key({}, "raw DeepSpeed configuration, merged over the one made from the other keys")


READER = Reader(Config, "celo2-pretrain train", "configs/", "optimizer.lr=2e-3")
KEYS, list_keys = READER.keys, READER.list_keys
# What a model that training starts from brings itself.
ARCHITECTURE = tuple(
    f"model.{name}"
    for name in ("family", "layers", "width", "heads", "kv_heads", "mlp_width", "vocab_size", "tied", "scaled_init")
)


def load_config(path: str | None, overrides: list[str] = ()) -> Config:
    """The configuration of YAML file `path` (None: the defaults) with `key=value` overrides. Raises UserError."""
    config, given = READER.load(path, overrides)
    shape = [name for name in ARCHITECTURE if name in given]
    if config.model.from_ is not None and shape:
        raise UserError(
            f"{shape[0]}={given[shape[0]]} can't be given with model.from={config.model.from_}, which says what "
            f"the model is: leave out {', '.join(shape)}"
        )
    check(config)
    return config


def check_entries(name: str, entries: list, example: str, *choices: dict[str, type]) -> None:
    """Each of `entries` has the keys of one of `choices`, with values of that type, numbers above 0."""
    for entry in entries:
        kinds = next((choice for choice in choices if isinstance(entry, dict) and choice.keys() == entry.keys()), None)
        if kinds is None:
            raise UserError(f"{name}: {shown(entry)} is not of the form {example}")
        for part, kind in kinds.items():
            try:
                entry[part] = Key(f"{name}: {part}", kind, f"as in {example}", None if kind is str else 0).convert(entry[part])
            except UserError as error:
                raise UserError(f"{error} in {shown(entry)}") from None
            if entry[part] in (0, ""):
                raise UserError(f"{name}: {part}={entry[part]!r} in {shown(entry)}: must be above 0")


def check(config: Config) -> None:
    """What no single key can tell."""
    model, optimizer, schedule = config.model, config.optimizer, config.schedule
    check_entries("data.mixture", config.data.mixture, "{path: data/a, weight: 0.7}", {"path": str, "weight": float})
    check_entries(
        "train.batch_warmup",
        config.train.batch_warmup,
        "{steps: 100, global_batch_size: 8} or {tokens: 1e6, …}",
        {"steps": int, "global_batch_size": int},
        {"tokens": float, "global_batch_size": int},
    )
    if schedule.name == "wsd" and schedule.warmup + schedule.decay > 1:
        raise UserError(
            f"schedule.warmup={schedule.warmup:g} and schedule.decay={schedule.decay:g} are more than all "
            f"steps: lower one of them"
        )
    if config.data.mask_documents and model.attention == "flash_attention_2":
        raise UserError("data.mask_documents=true needs model.attention=sdpa or eager, not flash_attention_2")
    if model.width % model.heads:
        raise UserError(f"model.width={model.width} is not a multiple of model.heads={model.heads}: change one of them")
    if model.kv_heads and (model.family != "llama" or model.heads % model.kv_heads):
        raise UserError(f"model.kv_heads={model.kv_heads}: for llama only, and must divide model.heads={model.heads}")
    if model.family == "llama" and (model.width // model.heads) % 2:
        raise UserError(f"model.width / model.heads = {model.width // model.heads}: llama needs an even number")
    if model.attention == "flash_attention_2" and config.train.precision == "fp32":
        raise UserError("model.attention=flash_attention_2 has no float32: set train.precision=bf16, or model.attention=sdpa")
    if optimizer.lr == 0:
        raise UserError("optimizer.lr=0: nothing would be learned; give a rate such as 1e-3")
    if config.track.peak_tflops == 0:
        raise UserError("track.peak_tflops=0: give the device's TFLOP/s, or null")
    profiled = profiled_steps(config.profile.steps)
    if profiled and profiled[0] > config.train.max_steps:
        raise UserError(
            f"profile.steps={config.profile.steps!r}: the run ends before, at train.max_steps={config.train.max_steps}"
        )
    if config.train.global_batch_size % config.train.micro_batch_size:
        raise UserError(
            f"train.global_batch_size={config.train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={config.train.micro_batch_size}: change one of them"
        )


def profiled_steps(text: str) -> tuple[int, int] | None:
    """profile.steps as the first and the last step, counted from 1. Raises UserError."""
    if not text:
        return None
    parts = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", text)
    first, last = (int(parts[1]), int(parts[2] or parts[1])) if parts else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"profile.steps={text!r}: give a step or a range of steps from 1 on, for example 10-12")
    return first, last


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches per rank and step. Raises UserError when the global batch, or one of its warm-up, doesn't divide."""
    micro, total = config.train.micro_batch_size, config.train.global_batch_size
    warmup = config.train.batch_warmup
    stages = [("train.batch_warmup: global_batch_size", stage["global_batch_size"]) for stage in warmup]
    for name, batch in [*stages, ("train.global_batch_size", total)]:
        if batch % (micro * world_size):
            raise UserError(
                f"{name}={batch} is no multiple of train.micro_batch_size={micro} × {world_size} ranks: "
                f"try {name}={micro * world_size * max(1, round(batch / (micro * world_size)))}"
            )
    return total // (micro * world_size)


def dump_config(config: Config) -> str:
    tree = as_tree(config)
    if config.model.from_ is not None:  # the shape is that model's, and may not be given
        tree["model"] = {name: value for name, value in tree["model"].items() if f"model.{name}" not in ARCHITECTURE}
    return dump_yaml(tree)
