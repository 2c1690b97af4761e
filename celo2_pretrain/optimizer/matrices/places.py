"""Where a parameter stands in a model: the module that holds it, and the module that uses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from .. import names as model_names

# Names that wrappers put between a module and the one that uses it; the last two are PEFT's.
WRAPPERS = {*model_names.WRAPPERS, model_names.ROOT_WRAPPER, "base_layer", "original_module"}
# Those that are followed by one more name: PEFT's adapters, and torch's parametrizations (weight norm).
NAMED_WRAPPERS = {"lora_A", "lora_B", "modules_to_save", "parametrizations"}


def shape_of(param: Tensor) -> tuple[int, ...]:
    """The shape of a whole parameter. ZeRO-3 parameters are empty between uses and keep it in `ds_shape`."""
    return tuple(getattr(param, "ds_shape", param.shape))


@dataclass(frozen=True)
class Place:
    """Where a parameter stands.

    Args:
        name: the parameter's name in the model ("model.layers.0.self_attn.q_proj.weight").
        param: the parameter.
        module: the module that holds it (the `nn.Linear`).
        projection: what the module that uses it calls it, wrappers left out ("q_proj"). A bare parameter: its own name.
        owner: the module that uses it (the attention). A bare parameter: the module that holds it.
        config: of the owner, or of the nearest module above that has one; None where there is none.
        in_layer: the parameter belongs to one of several layers: in an `nn.ModuleList`, or beside others of its class.
    """

    name: str
    param: Tensor
    module: nn.Module
    projection: str
    owner: nn.Module
    config: Any
    in_layer: bool

    @property
    def leaf(self) -> str:
        """The parameter's own name ("weight")."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def adapter(self) -> str:
        """ "lora_A" or "lora_B" for a factor of a LoRA update, else empty."""
        return next((part for part in self.name.split(".") if part in ("lora_A", "lora_B")), "")

    @property
    def bare(self) -> bool:
        """The module that uses the parameter holds it itself; no `nn.Linear` or the like stands between."""
        return self.owner is self.module

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.param)

    def owned_by(self, *patterns: str) -> bool:
        """Whether the owner's class or a base class of it has a name like one of `patterns` (as `fnmatch`)."""
        return any(fnmatchcase(cls.__name__, pattern) for cls in type(self.owner).__mro__ for pattern in patterns)

    def size(self, *names: str) -> int:
        """The first of `names` that is a positive integer of the owner, else of the config; 0 where there is none."""
        found = (getattr(source, name, None) for source in (self.owner, self.config) for name in names)
        return next((value for value in found if isinstance(value, int) and value > 0), 0)

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key/value heads, size of a head) of an attention; zeros where they are unknown."""
        queries = self.size("num_heads", "num_attention_heads", "n_heads", "n_head")
        width = self.size("hidden_size", "embed_dim", "n_embd", "d_model", "dim")
        head_dim = self.size("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
        if not queries or not (head_dim or width):
            return 0, 0, 0
        keys = self.size("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_query_groups", "kv_heads") or queries
        return queries, keys, head_dim or width // queries


def is_layer_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def matrix_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of an `nn.Linear`, of a class with its attributes, or of a transformers `Conv1D`; None for others."""
    module = getattr(module, "base_layer", module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or len(shape_of(weight)) < 2:
        return None
    if isinstance(getattr(module, "nf", None), int):
        return shape_of(weight)[0], module.nf
    for names in (("in_features", "out_features"), ("input_size", "output_size")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes
    return None


def places(model: nn.Module) -> Iterator[Place]:
    """The place of every parameter; tied ones come once, under their first name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    # Not by the model's own named_parameters: some wrappers give names there that their modules don't have.
    own: dict[int, tuple[str, str, Tensor]] = {}
    for prefix, module in modules.items():
        for leaf, param in module.named_parameters(recurse=False):
            own.setdefault(id(param), (prefix, leaf, param))
    for prefix, leaf, param in own.values():
        name = f"{prefix}.{leaf}" if prefix else leaf
        module, above = modules[prefix], prefix.split(".") if prefix else []
        while above and (above[-1] in WRAPPERS or (len(above) > 1 and above[-2] in NAMED_WRAPPERS)):
            above = above[:-1] if above[-1] in WRAPPERS else above[:-2]
        if isinstance(module, nn.ParameterDict) or type(module).__name__ == "ParametrizationList":
            module = modules[".".join(above)] if above else model
        projection, owner = leaf, module
        if above and leaf in ("weight", "original0", "original1") and _is_matrix_layer(module):
            projection, owner = above[-1], modules[".".join(above[:-1])]
        chain = [modules[".".join(above[:depth])] for depth in range(len(above) + 1)]
        config = next((m.config for m in (owner, *reversed(chain)) if getattr(m, "config", None) is not None), None)
        in_layer = any(is_layer_list(above) or _one_of_several(above, below) for above, below in zip(chain, chain[1:-1]))
        yield Place(name, param, module, projection, owner, config, in_layer or (len(chain) > 1 and is_layer_list(chain[-2])))


def _one_of_several(above: nn.Module, layer: nn.Module) -> bool:
    """Whether `layer` has a sibling of its class; two towers may both be an `nn.Sequential`."""
    return not isinstance(layer, nn.Sequential) and sum(type(child) is type(layer) for child in above.children()) > 1


def _is_matrix_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or matrix_sizes(module) is not None
