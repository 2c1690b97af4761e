"""GPT-2- and Llama-style models, built by transformers from our configuration."""
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from celo2_pretrain.train.config import Model
from celo2_pretrain.train.errors import UserError


def vocab_rows(config: Model, data_vocab: int) -> int:
    """Rows of the embedding. Raises UserError when the data's ids would not fit."""
    if config.vocab_size is not None and config.vocab_size < data_vocab:
        raise UserError(
            f"model.vocab_size={config.vocab_size} is smaller than the data's vocabulary of {data_vocab}: "
            f"set model.vocab_size=null, or prepare the data with a smaller vocabulary"
        )
    return config.vocab_size or data_vocab


def build_model(config: Model, data_vocab: int, eos_id: int) -> PreTrainedModel:
    """A randomly initialised float32 model; dropout is 0, attention is torch's scaled_dot_product_attention.

    Args:
        config: the `model` section.
        data_vocab: size of the tokenizer's vocabulary.
        eos_id: its end-of-text id.
    """
    common = dict(
        vocab_size=vocab_rows(config, data_vocab), tie_word_embeddings=config.tied,
        bos_token_id=eos_id, eos_token_id=eos_id, use_cache=False,
    )
    if config.family == "gpt2":
        hf = GPT2Config(
            n_layer=config.layers, n_embd=config.width, n_head=config.heads, n_positions=config.context,
            n_inner=config.mlp_width, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
        )
    else:
        # 8/3 × width, rounded up to a multiple of 32, has the parameters of a 4 × width MLP without the gate.
        mlp_width = config.mlp_width or (8 * config.width // 3 + 31) // 32 * 32
        hf = LlamaConfig(
            num_hidden_layers=config.layers, hidden_size=config.width, num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads or config.heads, intermediate_size=mlp_width,
            max_position_embeddings=config.context, **common,
        )
    model = AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa")
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
