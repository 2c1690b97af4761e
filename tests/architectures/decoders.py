"""What tests/optimizer/test_architectures.py expects of transformers' decoders, by hand from each model's forward."""

import transformers as tf
from transformers import AutoModelForCausalLM

from .cuts import columns, conv1d, each, linear, repeated, rows

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}  # heads of 8
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
DELTA = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
HALVES = rows(48, 48)
EMBEDDED = {"model.embed_tokens.weight": "embedding"}
UNTIED = EMBEDDED | {"lm_head.weight": "head"}
ATTENTION = {"model.layers.*.self_attn.{q,k,v,o}_proj.weight": linear}
GATED_MLP = {"model.layers.*.mlp.{gate,up,down}_proj.weight": linear}
LLAMA = UNTIED | ATTENTION | GATED_MLP
GPT2 = {
    "transformer.{wte,wpe}.weight": "embedding",
    "transformer.h.*.attn.c_attn.weight": columns(32, 32, 32),
    "transformer.h.*.attn.c_proj.weight": conv1d,
    "transformer.h.*.mlp.{c_fc,c_proj}.weight": conv1d,
}
# F.linear(x, gate_up_proj[expert]).chunk(2); the router is F.linear(x, weight), too
QWEN_EXPERTS = {
    "model.layers.*.mlp.gate.weight": linear,
    "model.layers.*.mlp.experts.gate_up_proj": each(rows(24, 24)),
    "model.layers.*.mlp.experts.down_proj": each(linear),
}
SHARED_EXPERT = {
    "model.layers.*.mlp.shared_expert.{gate,up,down}_proj.weight": linear,
    "model.layers.*.mlp.shared_expert_gate.weight": "vector",
}
MULTI_LATENT = {
    "model.layers.*.self_attn.kv_a_proj_with_mqa.weight": rows(20, 4),  # latent, rotary key
    "model.layers.*.self_attn.kv_b_proj.weight": repeated(4, 8, 6),  # view(heads, nope + v)
    "model.layers.*.self_attn.o_proj.weight": linear,
    "model.layers.*.mlp.shared_experts.{gate,up,down}_proj.weight": linear,
}
DELTA_NET = {
    "model.layers.*.linear_attn.conv1d.weight": "vector",
    "model.layers.*.linear_attn.out_proj.weight": linear,
    "model.layers.*.self_attn.q_proj.weight": repeated(4, 8, 8),  # view(heads, 2 · 8).chunk(2): query and gate
    "model.layers.*.self_attn.{k,v,o}_proj.weight": linear,
}


def lm(config):
    return lambda: AutoModelForCausalLM.from_config(config())


def falcon(query_key_value):
    return {
        "transformer.word_embeddings.weight": "embedding",
        "transformer.h.*.self_attention.query_key_value.weight": query_key_value,
        "transformer.h.*.self_attention.dense.weight": linear,
        "transformer.h.*.mlp.{dense_h_to_4h,dense_4h_to_h}.weight": linear,
    }


def gpt_bigcode(c_attn):
    return {
        "transformer.{wte,wpe}.weight": "embedding",
        "transformer.h.*.attn.c_attn.weight": c_attn,
        "transformer.h.*.attn.c_proj.weight": linear,
        "transformer.h.*.mlp.{c_fc,c_proj}.weight": linear,
    }


DECODERS = {
    "gpt2": (lm(lambda: tf.GPT2Config(**GPT)), GPT2),
    "gpt2 with cross attention": (
        lm(lambda: tf.GPT2Config(**GPT, add_cross_attention=True)),
        GPT2
        | {
            "transformer.h.*.crossattention.c_attn.weight": columns(32, 32),  # split: key, value
            "transformer.h.*.crossattention.{q_attn,c_proj}.weight": conv1d,
        },
    ),
    "openai-gpt": (
        lm(lambda: tf.OpenAIGPTConfig(**GPT)),
        {
            "transformer.{tokens_embed,positions_embed}.weight": "embedding",
            "transformer.h.*.attn.c_attn.weight": columns(32, 32, 32),
            "transformer.h.*.attn.c_proj.weight": conv1d,
            "transformer.h.*.mlp.{c_fc,c_proj}.weight": conv1d,
        },
    ),
    "llama": (lm(lambda: tf.LlamaConfig(**GROUPED)), LLAMA),
    "mistral": (lm(lambda: tf.MistralConfig(**GROUPED)), LLAMA),
    "qwen2": (lm(lambda: tf.Qwen2Config(**GROUPED)), LLAMA),
    "qwen3": (lm(lambda: tf.Qwen3Config(**GROUPED, head_dim=16)), LLAMA),
    "olmo2": (lm(lambda: tf.Olmo2Config(**GROUPED)), LLAMA),
    "granite": (lm(lambda: tf.GraniteConfig(**GROUPED)), LLAMA),
    "stablelm": (lm(lambda: tf.StableLmConfig(**GROUPED)), LLAMA),
    "gemma2": (lm(lambda: tf.Gemma2Config(**GROUPED, head_dim=8)), EMBEDDED | ATTENTION | GATED_MLP),
    "gemma3": (lm(lambda: tf.Gemma3TextConfig(**GROUPED, head_dim=8)), EMBEDDED | ATTENTION | GATED_MLP),
    "cohere": (lm(lambda: tf.CohereConfig(**GROUPED)), EMBEDDED | ATTENTION | GATED_MLP),
    "starcoder2": (
        lm(lambda: tf.Starcoder2Config(**GROUPED)),
        EMBEDDED | ATTENTION | {"model.layers.*.mlp.{c_fc,c_proj}.weight": linear},
    ),
    "phi": (
        lm(lambda: tf.PhiConfig(**SIZES, intermediate_size=48)),
        UNTIED
        | {
            "model.layers.*.self_attn.{q_proj,k_proj,v_proj,dense}.weight": linear,
            "model.layers.*.mlp.{fc1,fc2}.weight": linear,
        },
    ),
    "phi3": (
        lm(lambda: tf.Phi3Config(**GROUPED, pad_token_id=0)),
        UNTIED
        | {
            "model.layers.*.self_attn.qkv_proj.weight": rows(32, 16, 16),
            "model.layers.*.self_attn.o_proj.weight": linear,
            "model.layers.*.mlp.gate_up_proj.weight": HALVES,
            "model.layers.*.mlp.down_proj.weight": linear,
        },
    ),
    "glm4": (
        lm(lambda: tf.Glm4Config(**GROUPED, head_dim=8, pad_token_id=0, eos_token_id=2)),
        UNTIED | ATTENTION | {"model.layers.*.mlp.gate_up_proj.weight": HALVES, "model.layers.*.mlp.down_proj.weight": linear},
    ),
    "gptj": (
        lm(lambda: tf.GPTJConfig(**GPT, rotary_dim=4)),
        {
            "transformer.wte.weight": "embedding",
            "transformer.h.*.attn.{q,k,v,out}_proj.weight": linear,
            "transformer.h.*.mlp.{fc_in,fc_out}.weight": linear,
            "lm_head.weight": "head",
        },
    ),
    "opt": (
        lm(lambda: tf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=24, max_position_embeddings=16)),
        {
            "model.decoder.{embed_tokens,embed_positions}.weight": "embedding",
            "model.decoder.{project_in,project_out}.weight": linear,
            "model.decoder.layers.*.self_attn.{q,k,v,out}_proj.weight": linear,
            "model.decoder.layers.*.{fc1,fc2}.weight": linear,
        },
    ),
    # view(heads, 3 · head_dim).chunk(3)
    "gpt-neox": (
        lm(lambda: tf.GPTNeoXConfig(**SIZES, intermediate_size=48)),
        {
            "gpt_neox.embed_in.weight": "embedding",
            "lm_head.weight": "head",
            "gpt_neox.layers.*.attention.query_key_value.weight": repeated(4, 8, 8, 8),
            "gpt_neox.layers.*.attention.dense.weight": linear,
            "gpt_neox.layers.*.mlp.{dense_h_to_4h,dense_4h_to_h}.weight": linear,
        },
    ),
    "persimmon": (
        lm(lambda: tf.PersimmonConfig(**SIZES, intermediate_size=48)),
        UNTIED
        | {
            "model.layers.*.self_attn.query_key_value.weight": repeated(4, 8, 8, 8),
            "model.layers.*.self_attn.dense.weight": linear,
            "model.layers.*.mlp.{dense_h_to_4h,dense_4h_to_h}.weight": linear,
        },
    ),
    "bloom": (lm(lambda: tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4)), falcon(repeated(4, 8, 8, 8))),
    "falcon": (
        lm(lambda: tf.FalconConfig(**SIZES, multi_query=False, new_decoder_architecture=False)),
        falcon(repeated(4, 8, 8, 8)),
    ),  # view(heads, 3, head_dim)
    "falcon, multi-query": (
        lm(lambda: tf.FalconConfig(**SIZES, multi_query=True, new_decoder_architecture=False)),
        falcon(rows(32, 8, 8)),
    ),  # view(heads + 2, head_dim)
    "falcon, new decoder": (
        lm(lambda: tf.FalconConfig(**SIZES, num_kv_heads=2, new_decoder_architecture=True)),
        falcon(repeated(2, 16, 8, 8)),
    ),  # view(kv heads, heads of each + 2, head_dim)
    "mpt": (
        lm(lambda: tf.MptConfig(vocab_size=96, d_model=32, n_layers=1, n_heads=4, max_seq_len=16)),
        {
            "transformer.wte.weight": "embedding",
            "transformer.blocks.*.attn.Wqkv.weight": rows(32, 32, 32),
            "transformer.blocks.*.attn.out_proj.weight": linear,
            "transformer.blocks.*.ffn.{up,down}_proj.weight": linear,
        },
    ),
    "gpt-bigcode": (
        lm(lambda: tf.GPTBigCodeConfig(**GPT, multi_query=False)),
        gpt_bigcode(repeated(4, 8, 8, 8)),
    ),  # view(heads, 3 · head_dim)
    "gpt-bigcode, multi-query": (lm(lambda: tf.GPTBigCodeConfig(**GPT, multi_query=True)), gpt_bigcode(rows(32, 8, 8))),
    # view(4 shards, 3 · 8).split: query, value, key of two heads each
    "codegen": (
        lm(lambda: tf.CodeGenConfig(**GPT | {"n_head": 8}, rotary_dim=4)),
        {
            "transformer.wte.weight": "embedding",
            "lm_head.weight": "head",
            "transformer.h.*.attn.qkv_proj.weight": repeated(4, 8, 8, 8),
            "transformer.h.*.attn.out_proj.weight": linear,
            "transformer.h.*.mlp.{fc_in,fc_out}.weight": linear,
        },
    ),
    "bark": (
        lambda: tf.BarkSemanticModel(
            tf.BarkSemanticConfig(
                input_vocab_size=96, output_vocab_size=96, hidden_size=32, num_layers=1, num_heads=4, block_size=16
            )
        ),
        {
            "{input,position}_embeds_layer.weight": "embedding",
            "lm_head.weight": "head",
            "layers.*.attn.att_proj.weight": rows(32, 32, 32),
            "layers.*.attn.out_proj.weight": linear,
            "layers.*.mlp.{in,out}_proj.weight": linear,
        },
    ),
    # Mixtures of experts
    "mixtral": (
        lm(lambda: tf.MixtralConfig(**GROUPED, num_local_experts=3)),
        UNTIED
        | ATTENTION
        | {
            "model.layers.*.mlp.gate.weight": linear,
            "model.layers.*.mlp.experts.gate_up_proj": each(HALVES),
            "model.layers.*.mlp.experts.down_proj": each(linear),
        },
    ),
    "mixtral, square experts": (
        lm(lambda: tf.MixtralConfig(**GROUPED | {"intermediate_size": 32}, num_local_experts=3)),
        UNTIED
        | ATTENTION
        | {
            "model.layers.*.mlp.gate.weight": linear,
            "model.layers.*.mlp.experts.gate_up_proj": each(rows(32, 32)),
            "model.layers.*.mlp.experts.down_proj": each(linear),
        },
    ),
    "qwen2-moe": (
        lm(lambda: tf.Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=40)),
        UNTIED | ATTENTION | QWEN_EXPERTS | SHARED_EXPERT,
    ),
    "qwen3-moe": (lm(lambda: tf.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=8)), UNTIED | ATTENTION | QWEN_EXPERTS),
    "qwen3-next": (
        lm(lambda: tf.Qwen3NextConfig(**GROUPED | DELTA, **EXPERTS, shared_expert_intermediate_size=40)),
        UNTIED
        | QWEN_EXPERTS
        | SHARED_EXPERT
        | DELTA_NET
        | {
            # view(key heads, …).split: query, key, and value and gate of the two value heads that share a key
            "model.layers.*.linear_attn.in_proj_qkvz.weight": repeated(2, 8, 8, 12, 12),
            "model.layers.*.linear_attn.in_proj_ba.weight": repeated(2, 2, 2),
        },
    ),
    "qwen3.5": (
        lm(lambda: tf.Qwen3_5TextConfig(**GROUPED | DELTA)),
        UNTIED
        | GATED_MLP
        | DELTA_NET
        | {
            "model.layers.*.linear_attn.in_proj_qkv.weight": rows(16, 16, 24),
            "model.layers.*.linear_attn.in_proj_{z,a,b}.weight": linear,
        },
    ),
    "deepseek-v2": (
        lm(lambda: tf.DeepseekV2Config(**GROUPED | MLA, q_lora_rank=None)),
        UNTIED | GATED_MLP | QWEN_EXPERTS | MULTI_LATENT | {"model.layers.*.self_attn.q_proj.weight": linear},
    ),
    "deepseek-v3": (
        lm(lambda: tf.DeepseekV3Config(**GROUPED | MLA, q_lora_rank=24)),
        UNTIED | GATED_MLP | QWEN_EXPERTS | MULTI_LATENT | {"model.layers.*.self_attn.{q_a,q_b}_proj.weight": linear},
    ),
    # x @ gate_up_proj[expert], of which [..., ::2] is the gate
    "gpt-oss": (
        lm(lambda: tf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=3, num_experts_per_tok=2)),
        UNTIED
        | ATTENTION
        | {
            "model.layers.*.mlp.router.weight": linear,
            "model.layers.*.mlp.experts.gate_up_proj": each(lambda w: [w[:, 0::2].T, w[:, 1::2].T]),
            "model.layers.*.mlp.experts.down_proj": each(conv1d),
            "model.layers.*.mlp.experts.{gate_up,down}_proj_bias": "vector",
        },
    ),
    # bmm(x, gate_up_proj).chunk(2)
    "llama4": (
        lm(lambda: tf.Llama4TextConfig(**GROUPED, head_dim=8, num_local_experts=3, moe_layers=[0])),
        UNTIED
        | ATTENTION
        | {
            "model.layers.*.feed_forward.router.weight": linear,
            "model.layers.*.feed_forward.experts.gate_up_proj": each(columns(48, 48)),
            "model.layers.*.feed_forward.experts.down_proj": each(conv1d),
            "model.layers.*.feed_forward.shared_expert.{gate,up,down}_proj.weight": linear,
        },
    ),
    "granite-moe": (
        lm(lambda: tf.GraniteMoeSharedConfig(**GROUPED, num_local_experts=3, shared_intermediate_size=40)),
        UNTIED
        | ATTENTION
        | {
            "model.layers.*.block_sparse_moe.router.weight": linear,
            "model.layers.*.block_sparse_moe.experts.gate_up_proj": each(HALVES),
            "model.layers.*.block_sparse_moe.experts.down_proj": each(linear),
            "model.layers.*.shared_mlp.input_linear.weight": rows(40, 40),
            "model.layers.*.shared_mlp.output_linear.weight": linear,
        },
    ),
    "jetmoe": (
        lm(
            lambda: tf.JetMoeConfig(
                vocab_size=96,
                hidden_size=32,
                num_hidden_layers=1,
                num_key_value_heads=4,
                kv_channels=8,
                intermediate_size=48,
                num_local_experts=3,
            )
        ),
        EMBEDDED
        | {
            "model.layers.*.mlp.input_linear.weight": each(HALVES),
            "model.layers.*.mlp.output_linear.weight": each(linear),
            "model.layers.*.mlp.router.layer.weight": linear,
            "model.layers.*.self_attention.experts.{input,output}_linear.weight": each(linear),
            "model.layers.*.self_attention.experts.router.layer.weight": linear,
            "model.layers.*.self_attention.kv_proj.weight": rows(32, 32),
        },
    ),
    # w1, v1 and w2 are view(experts, 24, 32): x @ w1.T, x @ v1.T, y @ w2
    "dbrx": (
        lm(
            lambda: tf.DbrxConfig(
                vocab_size=96,
                d_model=32,
                n_layers=1,
                n_heads=4,
                max_seq_len=16,
                attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
                ffn_config={"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2},
            )
        ),
        {
            "transformer.wte.weight": "embedding",
            "lm_head.weight": "head",
            "transformer.blocks.*.norm_attn_norm.attn.Wqkv.weight": rows(32, 16, 16),
            "transformer.blocks.*.norm_attn_norm.attn.out_proj.weight": linear,
            "transformer.blocks.*.ffn.router.layer.weight": linear,
            "transformer.blocks.*.ffn.experts.mlp.{w1,v1}": rows(24, 24, 24),
            # read as its transpose, which is the same step where the expert isn't square
            "transformer.blocks.*.ffn.experts.mlp.w2": rows(24, 24, 24),
        },
    ),
    "minimax": (
        lm(lambda: tf.MiniMaxConfig(**GROUPED, head_dim=8, num_local_experts=3, layer_types=["linear_attention"])),
        UNTIED
        | {
            "model.layers.*.self_attn.qkv_proj.weight": repeated(4, 8, 8, 8),  # view(heads, 3 · head_dim)
            "model.layers.*.self_attn.{out_proj,output_gate}.weight": linear,
            "model.layers.*.mlp.gate.weight": linear,
            "model.layers.*.mlp.experts.gate_up_proj": each(HALVES),
            "model.layers.*.mlp.experts.down_proj": each(linear),
        },
    ),
}
