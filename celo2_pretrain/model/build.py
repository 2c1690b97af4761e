"""GPT-2- and Llama-style models, built by transformers from our configuration, or taken from a folder or the hub."""

import math

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from celo2_pretrain.common.errors import UserError, one_line
from celo2_pretrain.config import Model

# What writes into the residual stream, in both families: (attention, MLP).
RESIDUAL_PROJECTIONS = {"gpt2": ("attn.c_proj", "mlp.c_proj"), "llama": ("self_attn.o_proj", "mlp.down_proj")}


def vocab_rows(config: Model, data_vocab: int) -> int:
    """Rows of the embedding. Raises UserError when the data's ids would not fit."""
    if config.vocab_size is not None and config.vocab_size < data_vocab:
        raise UserError(
            f"model.vocab_size={config.vocab_size} is smaller than the data's vocabulary of {data_vocab}: "
            f"set model.vocab_size=null, or prepare the data with a smaller vocabulary"
        )
    return config.vocab_size or data_vocab


def build_model(config: Model, data_vocab: int, eos_id: int, pretrained: bool = True) -> PreTrainedModel:
    """A float32 model without dropout: randomly initialised, or with the weights of `model.from`.

    Args:
        config: the `model` section.
        data_vocab: size of the tokenizer's vocabulary.
        eos_id: its end-of-text id.
        pretrained: False takes only the shape of `model.from`, for weights that are loaded afterwards.

    Raises UserError for data that doesn't fit the model, a model that can't be loaded, an attention that isn't installed.
    """
    if config.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "model.attention=flash_attention_2 needs an NVIDIA GPU and the flash-attn package: install it, or "
            "use model.attention=sdpa, which has a flash kernel too"
        )
    if config.from_ is not None:
        model = _existing(config, data_vocab, pretrained)
    else:
        hf = _configuration(config, vocab_rows(config, data_vocab), eos_id)
        model = AutoModelForCausalLM.from_config(hf, attn_implementation=config.attention)
        _scale_residuals(model, config)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each block's activations in the backward pass."""
    # transformers 5 renamed it, and warns of the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _configuration(config: Model, rows: int, eos_id: int) -> GPT2Config | LlamaConfig:
    common = dict(vocab_size=rows, tie_word_embeddings=config.tied, bos_token_id=eos_id, eos_token_id=eos_id, use_cache=False)
    if config.family == "gpt2":
        return GPT2Config(
            n_layer=config.layers,
            n_embd=config.width,
            n_head=config.heads,
            n_positions=config.context,
            n_inner=config.mlp_width,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    # 8/3 × width, rounded up to a multiple of 32, has the parameters of a 4 × width MLP without the gate.
    mlp_width = config.mlp_width or (8 * config.width // 3 + 31) // 32 * 32
    return LlamaConfig(
        num_hidden_layers=config.layers,
        hidden_size=config.width,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        intermediate_size=mlp_width,
        max_position_embeddings=config.context,
        **common,
    )


@torch.no_grad()
def _scale_residuals(model: PreTrainedModel, config: Model) -> None:
    """Scale the residual projections' initial weights by 1/sqrt(2 × layers), or not, in both families alike.

    transformers does so for GPT-2 and not for Llama. Scaling what was drawn leaves the random numbers as they are.
    """
    drawn_scaled = config.family == "gpt2"
    if config.scaled_init == drawn_scaled:
        return
    factor = math.sqrt(2 * config.layers) ** (-1 if config.scaled_init else 1)
    for name, module in model.named_modules():
        if name.endswith(RESIDUAL_PROJECTIONS[config.family]):
            module.weight.mul_(factor)


def _existing(config: Model, data_vocab: int, pretrained: bool) -> PreTrainedModel:
    """The model of `model.from`, its weights in float32."""
    where = f"model.from={config.from_}"
    try:
        hf = AutoConfig.from_pretrained(config.from_)
    except Exception as error:  # a config.json with odd values fails in the model's own code, in any way
        raise UserError(
            f"{where}: no transformers model there ({one_line(error)}); give a folder with "
            "config.json and model.safetensors, or a hub name"
        ) from None
    text = hf.get_text_config()
    if text.vocab_size < data_vocab:
        raise UserError(
            f"{where} has a vocabulary of {text.vocab_size}, the data one of {data_vocab}: prepare the data "
            "with that model's tokenizer (celo2-pretrain prepare --tokenizer …)"
        )
    longest = getattr(text, "max_position_embeddings", None)
    if longest and longest < config.context:
        raise UserError(
            f"{where} has positions for {longest} tokens, model.context={config.context}: set model.context={longest} or less"
        )
    hf.use_cache = False
    for name in [name for name in hf.to_dict() if name.endswith(("pdrop", "dropout"))]:
        setattr(hf, name, 0.0)
    try:
        if not pretrained:
            return AutoModelForCausalLM.from_config(hf, dtype=torch.float32, attn_implementation=config.attention)
        return AutoModelForCausalLM.from_pretrained(
            config.from_, config=hf, dtype=torch.float32, attn_implementation=config.attention
        )
    except Exception as error:  # as above, and damaged or other weights
        raise UserError(f"{where}: {one_line(error)}") from None
