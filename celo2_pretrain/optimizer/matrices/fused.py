"""Which matrices a tensor consists of, for the layers that people have: fused projections, experts, convolutions.

What decides is how the forward of the class that uses the tensor cuts the output. `FUSED` states it class by class, or by
the attributes that give the sizes of the parts. A tensor of which neither the class nor the sizes tell is read as one
matrix, with a note that `table` shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from .places import Place, matrix_sizes, shape_of
from .views import MatrixView

UNKNOWN_PARTS = "one matrix; if fused, its parts are unknown"
UNKNOWN_AXES = "which axes are in and out is unknown"
TRANSPOSED = "the transpose of what the model uses"
PER_HEAD = {
    "q_proj",
    "k_proj",
    "v_proj",
    "query",
    "key",
    "value",
    "to_q",
    "to_k",
    "to_v",
    "q_b_proj",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
}
LOOKS_FUSED = re.compile(r".*(qkv|query_key|kv_proj|gate_up|c_attn).*", re.IGNORECASE)


class Parts(NamedTuple):
    """The output axis: parts of these sizes one after the other, `repeats` times; per_head: matrices of that width."""

    sizes: tuple[int, ...]
    repeats: int = 1
    head_dim: int = 0


class Fact(NamedTuple):
    """How the classes with such names (as `fnmatch`, by "|") cut the output of such projections, where it fits."""

    owner: str
    projections: str
    parts: Callable[[Place], Parts]


def _in(place: Place) -> int:
    """Inputs of the projection, of which a LoRA factor has the rank only."""
    sizes = matrix_sizes(getattr(place.owner, place.projection, place.module))
    return sizes[0] if sizes else place.shape[-1]


def _out(place: Place) -> int:
    return place.shape[_output_axis(place, orientation(place)[0])]


def _halves(place: Place) -> Parts:
    return Parts((_out(place) // 2,) * 2)


def _columns_of_two(place: Place) -> Parts:
    """Columns that belong to two matrices in turn."""
    return Parts((1, 1), _out(place) // 2)


def _gate_up(place: Place) -> Parts:
    """transformers' experts say whether the columns of gate and up alternate."""
    return _columns_of_two(place) if getattr(place.owner, "is_concatenated", True) is False else _halves(place)


def _cross_attention(place: Place) -> Parts:
    """K and V; GPT-2's cross attention has its query elsewhere."""
    return _halves(place) if place.size("is_cross_attention") else Parts(())


def _qkv(place: Place) -> Parts:
    """All of Q, all of K, all of V."""
    queries, keys, head_dim = place.heads
    return Parts((queries * head_dim, keys * head_dim, keys * head_dim), 1, head_dim)


def _qkv_of_each_head(place: Place) -> Parts:
    queries, _, head_dim = place.heads
    return Parts((head_dim,) * 3, queries, head_dim)


def _qkv_of_each_group(place: Place) -> Parts:
    """The queries that share a key, this key, its value; then those of the next key."""
    queries, keys, head_dim = place.heads
    return Parts((queries // max(keys, 1) * head_dim, head_dim, head_dim), keys, head_dim)


def _falcon(place: Place) -> Parts:
    queries, _, head_dim = place.heads
    if place.size("new_decoder_architecture"):
        return _qkv_of_each_group(place)
    if place.size("multi_query"):
        return Parts((queries * head_dim, head_dim, head_dim), 1, head_dim)
    return _qkv_of_each_head(place)


def _gpt_bigcode(place: Place) -> Parts:
    return _qkv(place) if place.size("multi_query") else _qkv_of_each_head(place)


def _codegen(place: Place) -> Parts:
    """Query, value, key of each of the shards that CodeGen was trained on."""
    shards = place.size("mp_num") or 4
    return Parts((place.size("embed_dim") // shards,) * 3, shards, place.heads[2])


def _chatglm(place: Place) -> Parts:
    queries, head_dim = place.size("num_attention_heads_per_partition"), place.size("hidden_size_per_attention_head")
    keys = place.size("num_multi_query_groups_per_partition")
    if place.size("multi_query_attention"):
        return Parts((queries * head_dim, keys * head_dim, keys * head_dim), 1, head_dim)
    return Parts((head_dim,) * 3, queries, head_dim)


def _query_and_gate(place: Place) -> Parts:
    queries, _, head_dim = place.heads
    return Parts((head_dim, head_dim), queries, head_dim)


def _multi_head(place: Place) -> Parts:
    width = place.size("embed_dim")
    return Parts((width,) * 3, 1, width // max(place.size("num_heads"), 1))


def _delta_net(place: Place) -> Parts:
    """Query, key, value and gate of each key head, which serves several value heads."""
    keys, key_dim = place.size("num_k_heads"), place.size("head_k_dim")
    values = place.size("num_v_heads") // max(keys, 1) * place.size("head_v_dim")
    return Parts((key_dim, key_dim, values, values), keys)


def _delta_net_rates(place: Place) -> Parts:
    keys = place.size("num_k_heads")
    return Parts((place.size("num_v_heads") // max(keys, 1),) * 2, keys)


def _mamba2(place: Place) -> Parts:
    """Gate, x, B, C and the time steps."""
    inner = place.size("intermediate_size", "d_inner")
    states = place.size("n_groups", "ngroups") * place.size("ssm_state_size", "d_state")
    return Parts((inner, inner, states, states, place.size("num_heads", "nheads")))


def _mamba_states(place: Place) -> Parts:
    """The time steps, B and C."""
    states = place.size("ssm_state_size", "d_state")
    return Parts((place.size("time_step_rank", "dt_rank"), states, states))


def _mla_values(place: Place) -> Parts:
    keys, values = place.size("qk_nope_head_dim"), place.size("v_head_dim")
    return Parts((keys, values), place.heads[0], keys if keys == values else 0)


QKV = "qkv|qkv_proj|Wqkv|c_attn|W_pack|att_proj|qkv_linear"
# The first fact whose sizes fit decides.
FUSED = (
    # One class, one cut
    Fact("GPTNeoX*Attention|BloomAttention|PersimmonAttention", "query_key_value", _qkv_of_each_head),
    Fact("DisentangledSelfAttention", "in_proj", _qkv_of_each_head),
    Fact("MiniMaxLightningAttention", "qkv_proj", _qkv_of_each_head),
    Fact("FalconAttention", "query_key_value", _falcon),
    Fact("GPTBigCodeAttention", "c_attn", _gpt_bigcode),
    Fact("*Attention", "c_attn", _cross_attention),
    Fact("GptOssExperts", "gate_up_proj", _columns_of_two),
    Fact("CodeGenAttention", "qkv_proj", _codegen),
    Fact("SelfAttention", "query_key_value", _chatglm),
    Fact("InternLM2*Attention", "wqkv", _qkv_of_each_group),
    Fact("CausalSelfAttention", "attn", _qkv_of_each_group),  # litgpt before it was called qkv
    Fact("Qwen3Next*|Qwen3_5*|Qwen4Exp*", "q_proj", _query_and_gate),
    Fact("*GatedDeltaNet", "in_proj_qkvz", _delta_net),
    Fact("*GatedDeltaNet", "in_proj_ba", _delta_net_rates),
    Fact("*GatedDeltaNet", "in_proj_qkv", lambda p: Parts((p.size("key_dim"),) * 2 + (p.size("value_dim"),))),
    Fact("ZambaMambaMixer", "in_proj", _columns_of_two),
    Fact("*ShortConv", "in_proj", lambda p: Parts((_out(p) // 3,) * 3)),
    Fact("xLSTM*", "qkv_opreact", lambda p: Parts((p.size("qk_dim"),) * 2 + (p.size("v_dim"),) * 2)),
    Fact("JetMoeAttention", "kv_proj", _halves),
    Fact("*GEGLU|*SwiGLU|*GatedLinearUnit", "proj", _halves),
    Fact("MultiheadAttention", "in_proj_weight", _multi_head),
    Fact("LSTM|LSTMCell", "weight_ih*|weight_hh*", lambda p: Parts((_out(p) // 4,) * 4)),
    Fact("GRU|GRUCell", "weight_ih*|weight_hh*", lambda p: Parts((_out(p) // 3,) * 3)),
    Fact("DbrxExpertGLU", "w1|v1|w2", lambda p: Parts((p.size("ffn_hidden_size"),) * p.size("moe_num_experts"))),
    # Any class that has these sizes
    Fact("*", "kv_b_proj|wkv_b", _mla_values),
    Fact("*", "kv_a_proj_with_mqa|wkv_a", lambda p: Parts((p.size("kv_lora_rank"), p.size("qk_rope_head_dim")))),
    Fact("*Mamba*|Bamba*|FalconH1*", "in_proj", _mamba2),
    Fact("*Mamba*", "in_proj", lambda p: Parts((p.size("intermediate_size", "d_inner"),) * 2)),
    Fact("*Mamba*", "x_proj|x_proj_weight", _mamba_states),
    Fact("*", QKV, _qkv),
    Fact("*", QKV, lambda p: Parts((_in(p),) * 3)),
    Fact("*", "gate_up_proj", _gate_up),
    Fact("*", "to_kv", _halves),
)

# Bare parameters of more axes than a matrix has: how the forward multiplies by them.
STACKED = (
    ("ZambaMambaMixer", "x_proj_weight|dt_proj_weight", MatrixView(transpose=True, batch=1), ""),  # weight[head] @ x
    ("XLNetRelativeAttention", "o", MatrixView(transpose=True, flatten=True), ""),  # (out, heads, head_dim)
    ("XLNetRelativeAttention", "q|k|v|r", MatrixView(transpose=True, flatten=True), TRANSPOSED),  # (in, heads, head_dim)
    ("FunnelRelMultiheadAttention", "r_kernel", MatrixView(transpose=True, flatten=True), TRANSPOSED),
    ("RecurrentGemmaRglru", "input_gate_weight|recurrent_gate_weight", MatrixView(batch=1), ""),  # x @ weight[head]
)


def read(place: Place, per_head: bool = False) -> tuple[MatrixView, str]:
    """How a tensor is read as matrices, and a note for `table` where it may be read in another way."""
    view, note = orientation(place)
    if place.adapter == "lora_A" or note or len(place.shape) < 2:
        return view, note
    if isinstance(place.module, nn.modules.conv._ConvNd):
        return view, note
    parts = parts_of(place)
    if parts is not None:
        if per_head and parts.head_dim and not any(size % parts.head_dim for size in parts.sizes):
            return replace(view, head_dim=parts.head_dim), ""
        return replace(view, split=parts.sizes, repeats=parts.repeats), ""
    if LOOKS_FUSED.fullmatch(place.projection) or _holds_more_than_the_query(place):
        return view, UNKNOWN_PARTS
    head_dim = _query_dim(place) if place.projection.startswith("q_") else place.heads[2]
    if per_head and place.projection in PER_HEAD and head_dim and _out(place) % head_dim == 0:
        return replace(view, head_dim=head_dim), ""
    return view, ""


def orientation(place: Place) -> tuple[MatrixView, str]:
    """How a tensor lies, before its output axis is cut; with a note where this is not known."""
    shape, module = place.shape, place.module
    if isinstance(module, nn.modules.conv._ConvNd) and len(shape) > 2:
        return _convolution(module, shape)
    for owner, names, view, note in STACKED:
        if place.owned_by(owner) and place.leaf in names.split("|"):
            return view, note
    if len(shape) == 3 and _is_experts(place):
        transpose = _experts_store_out_in(place)
        return MatrixView(bool(transpose), batch=1), UNKNOWN_AXES if transpose is None else ""
    if len(shape) != 2:
        return MatrixView(), UNKNOWN_AXES if len(shape) > 2 else ""
    if isinstance(module, (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)):
        return MatrixView(True), ""
    sizes = matrix_sizes(module)
    if place.bare and place.leaf == "weight" and re.search("Router|Gate", type(module).__name__):
        return MatrixView(True), ""
    if place.owned_by("DbrxExpertGLU"):  # w2 is (experts · in, out), whose experts can't be cut apart as it lies
        return MatrixView(True), ""
    return MatrixView(sizes is not None and shape == sizes[::-1] and not hasattr(module, "nf")), ""


def _convolution(module: nn.modules.conv._ConvNd, shape: tuple[int, ...]) -> tuple[MatrixView, str]:
    groups = module.groups
    if module.transposed:  # (in, out / groups, kernel …)
        return MatrixView(flatten=True), "one matrix, though of several groups" if groups > 1 else ""
    if shape[:2] != (module.out_channels, module.in_channels // groups):  # the lengths of a weight norm
        return MatrixView(), ""
    cut = groups > 1 and min(module.in_channels, module.out_channels) > groups  # not depthwise
    return MatrixView(True, split=(shape[0] // groups,) * groups if cut else (), flatten=True), ""


def parts_of(place: Place) -> Parts | None:
    """The cut of the output axis: the first fact whose sizes fit, or a gated MLP by its sizes; else None."""
    for fact in FUSED:
        if place.owned_by(*fact.owner.split("|")) and any(
            fnmatchcase(place.projection, name) for name in fact.projections.split("|")
        ):
            parts = fact.parts(place)
            if parts.sizes and min(parts.sizes) > 0 and sum(parts.sizes) * parts.repeats == _out(place):
                return parts
    return _halves(place) if _is_gate_and_up(place) else None


def _is_gate_and_up(place: Place) -> bool:
    """The first of the two matrices of an MLP has twice as many outputs as the second has inputs."""
    if place.owned_by("*Attention*") or LOOKS_FUSED.fullmatch(place.projection):
        return False
    sizes = {name: sizes for name, child in place.owner.named_children() if (sizes := matrix_sizes(child))}
    if len(sizes) != 2 or next(iter(sizes)) != place.projection:
        return False
    (inputs, wide), (inner, outputs) = sizes.values()
    return wide == 2 * inner and inputs == outputs


def _holds_more_than_the_query(place: Place) -> bool:
    queries, head_dim = place.heads[0], _query_dim(place)
    return place.projection == "q_proj" and queries > 0 and _out(place) == 2 * queries * head_dim


def _query_dim(place: Place) -> int:
    return place.size("qk_head_dim") or place.heads[2]


def _is_experts(place: Place) -> bool:
    return (
        hasattr(place.owner, "is_transposed")
        or "experts" in place.name.split(".")
        or ("Experts" in type(place.module).__name__)
    )


def _experts_store_out_in(place: Place) -> bool | None:
    """Whether stacked experts are (experts, out, in), as `nn.Linear`, or (experts, in, out); None: nothing tells."""
    declared = getattr(place.owner, "is_transposed", None)  # transformers 5
    if isinstance(declared, bool):
        return not declared
    sizes = matrix_sizes(place.module)
    if sizes:
        return place.shape[1:] == sizes[::-1]
    up, down = (getattr(place.owner, name, None) for name in ("gate_up_proj", "down_proj"))
    if up is not None and down is not None:
        return shape_of(up)[1] == 2 * shape_of(down)[2]
    hidden = place.size("hidden_size", "hidden_dim", "d_model", "dim", "n_embd")
    axes = [axis for axis in (1, 2) if place.shape[axis] == hidden]
    if len(axes) != 1:
        return None
    return axes == ([1] if re.match("down|w2|output|fc2|c_proj", place.leaf) else [2])


def _output_axis(place: Place, view: MatrixView) -> int:
    return view.batch + (0 if view.transpose else 1)
