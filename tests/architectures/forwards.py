"""Changes of the matrices that leave a model's output as it is, if the cuts are those of its forward.

Queries of twice the size and keys of half make the same scores; values, and the `up` of a gated MLP, of twice the size are
made up for by the next matrix. A change gives the factors of a tensor's matrices, in turn.
"""

NEOX = "gpt_neox.layers.0.attention."
FALCON = "transformer.h.0.self_attention."
LAYER = "model.layers.0."
GPT2 = "transformer.h.0.attn."
QK, V, UP, HALF = (2, 0.5, 1), (1, 1, 2), (1, 2), (0.5,)


def qkv(fused, output):
    return [{fused: QK}, {fused: V, output: HALF}]


def gated(gate_up, down):
    return [{gate_up: UP, down: HALF}]


def experts(mlp):
    return gated(f"{LAYER}{mlp}.experts.gate_up_proj", f"{LAYER}{mlp}.experts.down_proj")


B_C = (1, 2, 0.5)  # of the time step, B and C of a state space model
SAME_OUTPUT = {
    "gpt2": qkv(f"{GPT2}c_attn.weight", f"{GPT2}c_proj.weight"),
    "openai-gpt": qkv(f"{GPT2}c_attn.weight", f"{GPT2}c_proj.weight"),
    "gpt-bigcode": qkv(f"{GPT2}c_attn.weight", f"{GPT2}c_proj.weight"),
    "gpt-bigcode, multi-query": qkv(f"{GPT2}c_attn.weight", f"{GPT2}c_proj.weight"),
    "codegen": [
        {f"{GPT2}qkv_proj.weight": (2, 1, 0.5)},  # query, value, key
        {f"{GPT2}qkv_proj.weight": (1, 2, 1), f"{GPT2}out_proj.weight": HALF},
    ],
    "gpt-neox": qkv(f"{NEOX}query_key_value.weight", f"{NEOX}dense.weight"),
    "bloom": qkv(f"{FALCON}query_key_value.weight", f"{FALCON}dense.weight"),
    "falcon": qkv(f"{FALCON}query_key_value.weight", f"{FALCON}dense.weight"),
    "falcon, multi-query": qkv(f"{FALCON}query_key_value.weight", f"{FALCON}dense.weight"),
    "falcon, new decoder": qkv(f"{FALCON}query_key_value.weight", f"{FALCON}dense.weight"),
    "mpt": qkv("transformer.blocks.0.attn.Wqkv.weight", "transformer.blocks.0.attn.out_proj.weight"),
    "dbrx": qkv(*(f"transformer.blocks.0.norm_attn_norm.attn.{name}.weight" for name in ("Wqkv", "out_proj"))),
    "phi3": qkv(f"{LAYER}self_attn.qkv_proj.weight", f"{LAYER}self_attn.o_proj.weight")
    + gated(f"{LAYER}mlp.gate_up_proj.weight", f"{LAYER}mlp.down_proj.weight"),
    "modernbert": qkv(f"{LAYER}attn.Wqkv.weight", f"{LAYER}attn.Wo.weight")
    + gated(f"{LAYER}mlp.Wi.weight", f"{LAYER}mlp.Wo.weight"),
    "persimmon": [{f"{LAYER}self_attn.query_key_value.weight": V, f"{LAYER}self_attn.dense.weight": HALF}],
    "deberta": [
        {
            "deberta.encoder.layer.0.attention.self.in_proj.weight": V,
            "deberta.encoder.layer.0.attention.output.dense.weight": HALF,
        }
    ],
    "deepseek-v3": [{f"{LAYER}self_attn.kv_b_proj.weight": (1, 2), f"{LAYER}self_attn.o_proj.weight": HALF}],
    "mixtral": experts("mlp"),
    "qwen3-moe": experts("mlp"),
    "llama4": experts("feed_forward"),
    "granite-moe": experts("block_sparse_moe")
    + gated(f"{LAYER}shared_mlp.input_linear.weight", f"{LAYER}shared_mlp.output_linear.weight"),
    "jetmoe": gated(f"{LAYER}mlp.input_linear.weight", f"{LAYER}mlp.output_linear.weight")
    + [{f"{LAYER}self_attention.kv_proj.weight": (1, 2), f"{LAYER}self_attention.experts.output_linear.weight": HALF}],
    "mamba": [{"backbone.layers.0.mixer.x_proj.weight": B_C}],
    "zamba": [{f"{LAYER}mamba.x_proj_weight": B_C}],
}
