"""What a tensor is: a hidden matrix, an embedding, a head, or a vector in disguise."""

from __future__ import annotations

import re
from math import prod

from torch import Tensor, nn

from .places import Place, is_layer_list, matrix_sizes, places, shape_of

# What output layers are called. Inside of layers these names mean other things (a router's `classifier`).
HEAD = re.compile(
    r"(?!pre_)(.*_)?(lm_heads?|heads?|classifier|score|logits?)|embed_out|output_layer|unembed(ding)?|"
    r"qa_outputs|seq_relationship"
)
COUNTED = re.compile(r"pos|wpe|type|segment|time|step")  # embeddings of what no model puts out
# Bare parameters (held by no nn.Embedding, nn.Linear, …) that are looked up or added, and multiply nothing.
EMBEDDING = re.compile(
    r"(?!.*(proj|kernel|weight)$)(.*_)?(embed|emb$|pos_|rel_pos|position|token|cls|latents?$|probe|prompt|"
    r"codevectors|codebook).*|.*(embed(ding)?s?|emb|table)"
)
# Bare parameters that act elementwise: biases, gains, and the decay and skip of state space models.
ELEMENTWISE = re.compile(
    r"(?!.*(proj|kernel|weight|matrix)$).*(bias|scale|gamma|beta|sink|lambda|temperature|alpha).*|"
    r"A_logs?|rpb|time_(mix|decay|first).*"
)


def kinds(model: nn.Module) -> dict[int, str]:
    """The kind of every parameter, by id: "hidden", "embedding", "head" or "vector"."""
    found = list(places(model))
    heads = _heads(model, found)
    return {id(place.param): _kind(place, heads) for place in found}


def _kind(place: Place, heads: set[int]) -> str:
    shape, module = place.shape, place.module
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "lora_embedding_" in place.name:
        return "embedding"
    if prod(shape) == max(shape, default=1):  # all axes but one of size 1
        return "vector"
    if id(place.param) in heads:
        return "head"
    if place.bare and not isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)):
        if place.leaf == "weight" and "Embedding" in type(module).__name__:  # as Megatron's VocabParallelEmbedding
            return "embedding"
        if EMBEDDING.fullmatch(place.leaf) or (len(shape) > 2 and shape[0] == 1):  # the same for the whole batch
            return "embedding"
        if place.leaf in ("query", "queries") and not hasattr(module, "key"):  # learned queries, not a projection
            return "embedding"
        if ELEMENTWISE.fullmatch(place.leaf) or "Norm" in type(module).__name__:
            return "vector"
        if place.leaf in ("A", "D", "Ds") and any(
            name.startswith(("dt_", "A_log")) for name in (*module._parameters, *module._modules)
        ):  # of a state space model; LoRA calls its factors A and B
            return "vector"
    if isinstance(module, nn.modules.conv._ConvNd):
        group = module.out_channels // module.groups
        # One input channel a group (depthwise), or one output channel: a vector for each of them.
        if module.groups > 1 and (module.in_channels == module.groups or group == 1):
            return "vector"
    return "hidden"


def _heads(model: nn.Module, found: list[Place]) -> set[int]:
    """Ids of the matrices of output layers."""
    modules = [module for _, module in model.named_modules()]
    outputs = [output for module in modules for output in (*_declared(module), *_task_heads(module))]
    named = [place.param for place in found if HEAD.fullmatch(place.projection) and not place.bare and not place.in_layer]
    named += [parameter for name, module in model.named_modules() for parameter in _list_of_heads(name, module)]
    heads = {id(param) for output in outputs for param in output.parameters() if len(shape_of(param)) > 1}
    heads |= {id(param) for param in named if len(shape_of(param)) > 1}
    vocabularies = {
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not COUNTED.search(name.rsplit(".", 1)[-1])
    }
    heads |= {
        id(place.param)
        for place in found
        if isinstance(place.module, nn.Linear)
        and not place.in_layer
        and len(place.shape) == 2
        and place.shape[0] in vocabularies
        and place.shape[0] > place.shape[1]
    }
    if not heads:
        last = _last_linear(model)
        heads = {id(last.weight)} if last is not None else set()
    return heads


def _declared(module: nn.Module) -> list[nn.Module]:
    """What a transformers model says its output layer is."""
    if not hasattr(module, "get_output_embeddings"):
        return []
    try:
        output = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    return [output] if isinstance(output, nn.Module) else []


def _task_heads(module: nn.Module) -> list[nn.Module]:
    """Output layers of a transformers model for a task: matrices outside of its base model, as wide as the labels."""
    base = getattr(module, getattr(module, "base_model_prefix", None) or "?", None)
    if not isinstance(base, nn.Module) or base is module:
        return []
    config = getattr(module, "config", None)
    labels = getattr(config, "num_labels", 0) or 0
    widths = {getattr(config, "vocab_size", None), labels, labels + 1} - {None, 0, 1}
    task = re.search("For.*(Classification|Answering|Choice|Prediction|Regression)", type(module).__name__)
    outside = [(name, child) for name, child in module.named_children() if child is not base]
    linears = [(name, sub) for name, child in outside for sub in child.modules() if isinstance(sub, nn.Linear)]
    heads = [linear for name, linear in linears if linear.out_features in widths]
    return heads or ([linears[-1][1]] if task and linears else [])


def _list_of_heads(name: str, module: nn.Module) -> list[Tensor]:
    """The matrices of an `nn.ModuleList` of heads, one for each codebook or task."""
    if not isinstance(module, nn.ModuleList) or not HEAD.fullmatch(name.rsplit(".", 1)[-1]):
        return []
    return [child.weight for child in module if isinstance(child, nn.Linear)]


def _last_linear(model: nn.Module) -> nn.Linear | None:
    """The `nn.Linear` whose output is the model's, where the order of the modules tells; its width is another than
    the input's, or the model may be no more than a part of one."""
    module = model
    while not isinstance(module, nn.Linear):
        children = [child for child in module.children() if next(child.parameters(), None) is not None]
        if (
            not children
            or is_layer_list(module)
            or isinstance(module, nn.MultiheadAttention)
            or (hasattr(module, "base_model_prefix"))
        ):
            return None
        last = children[-1]
        if (
            not isinstance(last, nn.Linear)
            and any(type(child) is type(last) for child in children[:-1])
            and (not isinstance(last, nn.Sequential))
        ):
            return None  # one of many equal layers
        module = last
    inputs = next((sizes[0] for m in model.modules() if (sizes := matrix_sizes(m))), 0)
    first = next((m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Embedding))), None)
    return module if module is not model and (first is not None or inputs != module.out_features) else None
