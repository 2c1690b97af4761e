"""What tests/optimizer/test_architectures.py expects of transformers' encoders, state space, vision and composite models."""

import transformers as tf
from torch import Tensor

from .cuts import columns, each, kernel, linear, repeated, rows
from .decoders import ATTENTION, EMBEDDED, GROUPED, HALVES, SIZES, UNTIED, lm

BERT = SIZES | {"intermediate_size": 48, "max_position_embeddings": 16}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
SEQ2SEQ = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MAMBA = {"vocab_size": 96, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "expand": 2}
CLIP_TOWER = {"encoder.layers.*.self_attn.{q,k,v,out}_proj.weight": linear, "encoder.layers.*.mlp.{fc1,fc2}.weight": linear}
VIT_LAYER = {"attention.{q,k,v,o}_proj.weight": linear, "mlp.{fc1,fc2}.weight": linear}
# in_proj.chunk(2): x and gate; x_proj.split: time step, B, C
MAMBA_MIXER = {
    "in_proj.weight": rows(64, 64),
    "x_proj.weight": rows(3, 4, 4),
    "{dt,out}_proj.weight": linear,
    "A_log": "vector",
    "conv1d.weight": "vector",
}


def under(prefix, expected):
    return {f"{prefix}.{name}": want for name, want in expected.items()}


def bert(name, embeddings=("word", "position", "token_type")):
    return {
        f"{name}.embeddings.{{{','.join(embeddings)}}}_embeddings.weight": "embedding",
        f"{name}.encoder.layer.*.attention.self.{{query,key,value}}.weight": linear,
        f"{name}.encoder.layer.*.{{attention.output,intermediate,output}}.dense.weight": linear,
    }


def heads_as_outputs_transposed(w: Tensor) -> list[Tensor]:
    """(in, heads, head_dim), used as x @ w.view(in, -1), but read as its transpose: `table` says so."""
    return [w.flatten(1)]


ENCODERS = {
    "bert, pretraining": (
        lambda: tf.BertForPreTraining(tf.BertConfig(**BERT)),
        bert("bert")
        | {
            "bert.pooler.dense.weight": linear,
            "cls.predictions.transform.dense.weight": linear,
            "cls.seq_relationship.weight": "head",
        },
    ),
    "bert, question answering": (
        lambda: tf.BertForQuestionAnswering(tf.BertConfig(**BERT)),
        bert("bert") | {"qa_outputs.weight": "head"},
    ),
    "bert, no head": (
        lambda: tf.BertModel(tf.BertConfig(**BERT)),
        {name.removeprefix("bert."): want for name, want in bert("bert").items()} | {"pooler.dense.weight": linear},
    ),
    "roberta, classification": (
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**BERT, num_labels=3)),
        bert("roberta") | {"classifier.dense.weight": linear, "classifier.out_proj.weight": "head"},
    ),
    "distilbert, classification": (
        lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(
                vocab_size=96, dim=32, n_layers=1, n_heads=4, hidden_dim=48, max_position_embeddings=16, num_labels=5
            )
        ),
        {
            "distilbert.embeddings.{word,position}_embeddings.weight": "embedding",
            "distilbert.transformer.layer.*.attention.{q,k,v,out}_lin.weight": linear,
            "distilbert.transformer.layer.*.ffn.{lin1,lin2}.weight": linear,
            "pre_classifier.weight": linear,
            "classifier.weight": "head",
        },
    ),
    "modernbert": (
        lambda: tf.ModernBertForMaskedLM(
            tf.ModernBertConfig(
                **SIZES, intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
            )
        ),
        {
            "model.embeddings.tok_embeddings.weight": "embedding",
            "model.layers.*.attn.Wqkv.weight": rows(32, 32, 32),  # view(3, heads, head_dim)
            "model.layers.*.mlp.Wi.weight": HALVES,
            "model.layers.*.{attn,mlp}.Wo.weight": linear,
            "head.dense.weight": linear,
        },
    ),
    "deberta": (
        lambda: tf.DebertaForMaskedLM(tf.DebertaConfig(**BERT, relative_attention=True, pos_att_type=["c2p", "p2c"])),
        {
            "deberta.embeddings.{word,position}_embeddings.weight": "embedding",
            "deberta.encoder.rel_embeddings.weight": "embedding",
            "deberta.encoder.layer.*.attention.self.in_proj.weight": repeated(4, 8, 8, 8),  # view(heads, -1).chunk(3)
            "deberta.encoder.layer.*.attention.self.{pos,pos_q}_proj.weight": linear,
            "deberta.encoder.layer.*.{attention.output,intermediate,output}.dense.weight": linear,
            "cls.predictions.transform.dense.weight": linear,
        },
    ),
    "electra": (
        lambda: tf.ElectraForPreTraining(tf.ElectraConfig(**BERT, embedding_size=24)),
        bert("electra")
        | {
            "electra.embeddings_project.weight": linear,
            "discriminator_predictions.dense.weight": linear,
            "discriminator_predictions.dense_prediction.weight": "vector",
        },
    ),
    "xlnet": (
        lambda: tf.XLNetLMHeadModel(tf.XLNetConfig(vocab_size=96, d_model=32, n_layer=1, n_head=4, d_inner=48)),
        {
            "transformer.mask_emb": "vector",
            "transformer.word_embedding.weight": "embedding",
            "transformer.layer.*.rel_attn.{q,k,v,r}": heads_as_outputs_transposed,
            "transformer.layer.*.rel_attn.o": kernel,  # (out, heads, head_dim)
            "transformer.layer.*.rel_attn.{r_r,r_s,r_w}_bias": "vector",
            "transformer.layer.*.rel_attn.seg_embed": "embedding",
            "transformer.layer.*.ff.{layer_1,layer_2}.weight": linear,
        },
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, feed_forward_proj="gated-gelu")),
        {
            "shared.weight": "embedding",
            "{encoder,decoder}.block.*.layer.*.SelfAttention.{q,k,v,o}.weight": linear,
            "decoder.block.*.layer.*.EncDecAttention.{q,k,v,o}.weight": linear,
            "{encoder,decoder}.block.*.layer.*.SelfAttention.relative_attention_bias.weight": "embedding",
            "{encoder,decoder}.block.*.layer.*.DenseReluDense.{wi_0,wi_1,wo}.weight": linear,
        },
    ),
    # A router called classifier is no head
    "switch transformers": (
        lambda: tf.SwitchTransformersForConditionalGeneration(
            tf.SwitchTransformersConfig(
                **T5 | {"num_layers": 2, "num_decoder_layers": 2},
                num_experts=2,
                num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
            )
        ),
        {
            "shared.weight": "embedding",
            "{encoder,decoder}.block.*.layer.*.SelfAttention.{q,k,v,o}.weight": linear,
            "decoder.block.*.layer.*.EncDecAttention.{q,k,v,o}.weight": linear,
            "{encoder,decoder}.block.*.layer.*.SelfAttention.relative_attention_bias.weight": "embedding",
            "{encoder,decoder}.block.*.layer.*.mlp.{wi,wo,router.classifier}.weight": linear,
            "{encoder,decoder}.block.*.layer.*.mlp.experts.{expert_0,expert_1}.{wi,wo}.weight": linear,
        },
    ),
    "bart": (
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ, max_position_embeddings=16)),
        {
            "model.shared.weight": "embedding",
            "model.{encoder,decoder}.embed_positions.weight": "embedding",
            "model.{encoder,decoder}.layers.*.self_attn.{q,k,v,out}_proj.weight": linear,
            "model.decoder.layers.*.encoder_attn.{q,k,v,out}_proj.weight": linear,
            "model.{encoder,decoder}.layers.*.{fc1,fc2}.weight": linear,
        },
    ),
    "whisper": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(**SEQ2SEQ, num_mel_bins=20, max_source_positions=10, max_target_positions=12)
        ),
        {
            "model.encoder.{conv1,conv2}.weight": kernel,
            "model.decoder.{embed_tokens,embed_positions}.weight": "embedding",
            "model.{encoder,decoder}.layers.*.self_attn.{q,k,v,out}_proj.weight": linear,
            "model.decoder.layers.*.encoder_attn.{q,k,v,out}_proj.weight": linear,
            "model.{encoder,decoder}.layers.*.{fc1,fc2}.weight": linear,
        },
    ),
    "wav2vec2": (
        lambda: tf.Wav2Vec2ForCTC(
            tf.Wav2Vec2Config(
                vocab_size=20,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=48,
                conv_dim=(16, 16),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=4,
            )
        ),
        {
            "wav2vec2.feature_extractor.conv_layers.*.conv.weight": kernel,
            "wav2vec2.feature_projection.projection.weight": linear,
            "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0": "vector",  # a weight norm's lengths
            # 4 groups, each of its own 8 inputs
            "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1": lambda w: list(w.flatten(1).split(8)),
            "wav2vec2.encoder.layers.*.attention.{q,k,v,out}_proj.weight": linear,
            "wav2vec2.encoder.layers.*.feed_forward.{intermediate,output}_dense.weight": linear,
            "lm_head.weight": "head",
        },
    ),
    # Vision, and models of two towers
    "vit, classification": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=5)),
        under("vit.layers.*", VIT_LAYER)
        | {
            "vit.embeddings.cls_token": "vector",
            "vit.embeddings.position_embeddings": "embedding",
            "vit.embeddings.patch_embeddings.projection.weight": kernel,
            "classifier.weight": "head",
        },
    ),
    "swin, classification": (
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(
                image_size=16,
                patch_size=4,
                embed_dim=16,
                depths=[1],
                num_heads=[2],
                window_size=2,
                num_labels=5,
                use_absolute_embeddings=True,
            )
        ),
        under("swin.encoder.layers.*.blocks.*", VIT_LAYER)
        | {
            "swin.embeddings.position_embeddings": "embedding",
            "swin.embeddings.patch_embeddings.projection.weight": kernel,
            "swin.encoder.layers.*.blocks.*.attention.relative_position_bias.relative_position_bias_table": "embedding",
            "classifier.weight": "head",
        },
    ),
    "patchtst, prediction": (
        lambda: tf.PatchTSTForPrediction(
            tf.PatchTSTConfig(
                num_input_channels=2,
                d_model=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                ffn_dim=48,
                context_length=32,
                patch_length=4,
                patch_stride=4,
                prediction_length=6,
            )
        ),
        {
            "model.encoder.embedder.input_embedding.weight": linear,
            "model.encoder.layers.*.self_attn.{q,k,v,out}_proj.weight": linear,
            "model.encoder.layers.*.ff.*.weight": linear,
            "head.projection.weight": "head",
        },
    ),
    "clip": (
        lambda: tf.CLIPModel(tf.CLIPConfig(text_config=BERT, vision_config=VISION, projection_dim=24)),
        under("{text,vision}_model", CLIP_TOWER)
        | {
            "text_model.embeddings.{token,position}_embedding.weight": "embedding",
            "vision_model.embeddings.position_embedding.weight": "embedding",
            "vision_model.embeddings.patch_embedding.weight": kernel,
            "{text,visual}_projection.weight": linear,
        },
    ),
    # The sizes of the language model's Q, K, V are those of its own config, not of the vision tower's
    "llava": (
        lambda: tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                text_config=tf.Phi3Config(**GROUPED, pad_token_id=0),
                vision_config=tf.CLIPVisionConfig(**VISION | {"hidden_size": 24, "num_attention_heads": 2}),
            )
        ),
        under("model.vision_tower", CLIP_TOWER)
        | {
            "model.vision_tower.embeddings.patch_embedding.weight": kernel,
            "model.vision_tower.embeddings.position_embedding.weight": "embedding",
            "model.multi_modal_projector.{linear_1,linear_2}.weight": linear,
            "model.language_model.embed_tokens.weight": "embedding",
            "lm_head.weight": "head",
            "model.language_model.layers.*.self_attn.qkv_proj.weight": rows(32, 16, 16),
            "model.language_model.layers.*.self_attn.o_proj.weight": linear,
            "model.language_model.layers.*.mlp.gate_up_proj.weight": HALVES,
            "model.language_model.layers.*.mlp.down_proj.weight": linear,
        },
    ),
    "qwen2-vl": (
        lambda: tf.Qwen2VLForConditionalGeneration(
            tf.Qwen2VLConfig(
                text_config=GROUPED
                | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
                vision_config={
                    "depth": 1,
                    "embed_dim": 24,
                    "hidden_size": 32,
                    "num_heads": 2,
                    "mlp_ratio": 2,
                    "patch_size": 4,
                },
            )
        ),
        {
            "model.visual.patch_embed.proj.weight": kernel,
            "model.visual.blocks.*.attn.qkv.weight": rows(24, 24, 24),  # reshape(3, heads, head_dim)
            "model.visual.blocks.*.attn.proj.weight": linear,
            "model.visual.blocks.*.mlp.{fc1,fc2}.weight": linear,
            "model.visual.merger.mlp.*.weight": linear,
            "lm_head.weight": "head",
            "model.language_model.embed_tokens.weight": "embedding",
            "model.language_model.layers.*.self_attn.{q,k,v,o}_proj.weight": linear,
            "model.language_model.layers.*.mlp.{gate,up,down}_proj.weight": linear,
        },
    ),
    "aria": (
        lambda: tf.AriaForConditionalGeneration(
            tf.AriaConfig(
                vision_config=VISION | {"model_type": "idefics3_vision"},
                projector_patch_to_query_dict={4: 2},
                text_config=GROUPED | {"moe_num_experts": 3, "moe_num_shared_experts": 1, "model_type": "aria_text"},
            )
        ),
        under("model.vision_tower", CLIP_TOWER)
        | {
            "model.vision_tower.embeddings.patch_embedding.weight": kernel,
            "model.vision_tower.embeddings.position_embedding.weight": "embedding",
            "model.multi_modal_projector.query": "embedding",
            "model.multi_modal_projector.cross_attn.{q_proj,k_proj,v_proj,linear,multihead_attn.out_proj}.weight": linear,
            "model.multi_modal_projector.cross_attn.multihead_attn.in_proj_weight": rows(32, 32, 32),
            "model.multi_modal_projector.feed_forward.{linear_in,linear_out}.weight": linear,
            "model.language_model.embed_tokens.weight": "embedding",
            "lm_head.weight": "head",
            "model.language_model.layers.*.self_attn.{q,k,v,o}_proj.weight": linear,
            "model.language_model.layers.*.mlp.router.weight": linear,
            "model.language_model.layers.*.mlp.experts.gate_up_proj": each(columns(48, 48)),  # (x @ w).chunk(2)
            "model.language_model.layers.*.mlp.experts.down_proj": each(lambda w: [w.T]),
            "model.language_model.layers.*.mlp.shared_experts.{gate,up,down}_proj.weight": linear,
        },
    ),
    # State space models
    "mamba": (
        lm(lambda: tf.MambaConfig(**MAMBA, time_step_rank=3)),
        {"backbone.embeddings.weight": "embedding"} | under("backbone.layers.*.mixer", MAMBA_MIXER),
    ),
    "falcon-mamba": (
        lm(lambda: tf.FalconMambaConfig(**MAMBA, time_step_rank=3)),
        {"backbone.embeddings.weight": "embedding"} | under("backbone.layers.*.mixer", MAMBA_MIXER),
    ),
    # gate, x, B and C of 2 groups, time steps of 4 heads
    "mamba2": (
        lm(lambda: tf.Mamba2Config(**MAMBA | {"state_size": 6}, num_heads=4, head_dim=16, n_groups=2)),
        {
            "backbone.embeddings.weight": "embedding",
            "lm_head.weight": "head",
            "backbone.layers.*.mixer.conv1d.weight": "vector",
            "backbone.layers.*.mixer.in_proj.weight": rows(64, 64, 12, 12, 4),
            "backbone.layers.*.mixer.out_proj.weight": linear,
        },
    ),
    "bamba": (
        lm(
            lambda: tf.BambaConfig(
                **GROUPED, attn_layer_indices=[], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=6
            )
        ),
        UNTIED
        | {
            "model.layers.*.feed_forward.{gate,up,down}_proj.weight": linear,
            "model.layers.*.mamba.conv1d.weight": "vector",
            "model.layers.*.mamba.in_proj.weight": rows(64, 64, 6, 6, 8),
            "model.layers.*.mamba.out_proj.weight": linear,
        },
    ),
    "jamba": (
        lm(
            lambda: tf.JambaConfig(
                **GROUPED | {"num_hidden_layers": 2},
                attn_layer_period=2,
                attn_layer_offset=1,
                num_experts=3,
                num_experts_per_tok=2,
                mamba_d_state=4,
                mamba_dt_rank=3,
                use_mamba_kernels=False,
            )
        ),
        UNTIED
        | ATTENTION
        | under("model.layers.*.mamba", MAMBA_MIXER)
        | {
            "model.layers.*.feed_forward.{gate,up,down}_proj.weight": linear,
            "model.layers.*.feed_forward.router.weight": linear,
            "model.layers.*.feed_forward.experts.gate_up_proj": each(HALVES),
            "model.layers.*.feed_forward.experts.down_proj": each(linear),
        },
    ),
    # in_proj.view(-1, 2).chunk(2): rows of x and gate in turn; x_proj and dt_proj are w[head] @ x
    "zamba": (
        lm(
            lambda: tf.ZambaConfig(
                **SIZES,
                num_key_value_heads=4,
                intermediate_size=48,
                mamba_d_state=4,
                mamba_dt_rank=3,
                n_mamba_heads=2,
                layers_block_type=["mamba"],
                use_mamba_kernels=False,
            )
        ),
        EMBEDDED
        | {
            "model.layers.*.mamba.in_proj.weight": lambda w: [w[0::2], w[1::2]],
            "model.layers.*.mamba.x_proj_weight": each(rows(3, 4, 4)),
            "model.layers.*.mamba.dt_proj_weight": each(linear),
            "model.layers.*.mamba.{A_log,D,dt_proj_bias,conv1d.weight}": "vector",
            "model.layers.*.mamba.out_proj.weight": linear,
        },
    ),
    # The gates are baddbmm(bias, x of each head, weight)
    "recurrent-gemma": (
        lm(lambda: tf.RecurrentGemmaConfig(**GROUPED, lru_width=32, block_types=["recurrent"])),
        EMBEDDED
        | {
            "model.layers.*.temporal_block.conv_1d.weight": "vector",
            "model.layers.*.temporal_block.{linear_x,linear_y,linear_out}.weight": linear,
            "model.layers.*.temporal_block.rg_lru.{input,recurrent}_gate_weight": each(lambda w: [w.T]),
            "model.layers.*.temporal_block.rg_lru.{input,recurrent}_gate_bias": "vector",
            "model.layers.*.mlp_block.{gate,up,down}_proj.weight": linear,
        },
    ),
    "lfm2": (
        lm(
            lambda: tf.Lfm2Config(
                **GROUPED | {"num_hidden_layers": 2}, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
            )
        ),
        EMBEDDED
        | {
            "model.layers.*.conv.conv.weight": "vector",
            "model.layers.*.conv.in_proj.weight": rows(32, 32, 32),  # B, C, x
            "model.layers.*.conv.out_proj.weight": linear,
            "model.layers.*.feed_forward.{w1,w2,w3}.weight": linear,
            "model.layers.*.self_attn.{q,k,v,out}_proj.weight": linear,
        },
    ),
}
