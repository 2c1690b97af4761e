"""What tests/optimizer/test_architectures.py expects of modules from other libraries, written small with their names."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import BertConfig, BertModel

from .cuts import each, kernel, linear, repeated, rows


def tree(kind: str, base: type[nn.Module] = nn.Module, /, **members) -> nn.Module:
    """A module of a class called `kind` with these submodules, parameters and attributes."""
    module = type(kind, (base,), {})()
    for name, member in members.items():
        setattr(module, name, member)
    return module


def bare(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def litgpt(name: str, **sizes) -> nn.Module:
    """`lm_head` comes first there, so that the last nn.Linear is one of the last layer."""
    config = SimpleNamespace(n_head=4, n_query_groups=2, head_size=8, n_embd=32, **sizes)
    attention = tree("CausalSelfAttention", config=config, **{name: nn.Linear(32, 64), "proj": nn.Linear(32, 32)})
    block = tree(
        "Block", attn=attention, mlp=tree("LLaMAMLP", fc_1=nn.Linear(32, 48), fc_2=nn.Linear(32, 48), proj=nn.Linear(48, 32))
    )
    return tree(
        "GPT", lm_head=nn.Linear(32, 96), transformer=nn.ModuleDict({"wte": nn.Embedding(96, 32), "h": nn.ModuleList([block])})
    )


def nano_gpt() -> nn.Module:
    attention = tree("CausalSelfAttention", c_attn=nn.Linear(32, 96), c_proj=nn.Linear(32, 32), n_head=4, n_embd=32)
    block = tree("Block", attn=attention, mlp=tree("MLP", c_fc=nn.Linear(32, 128), c_proj=nn.Linear(128, 32)))
    model = tree(
        "GPT",
        transformer=nn.ModuleDict({"wte": nn.Embedding(96, 32), "wpe": nn.Embedding(16, 32), "h": nn.ModuleList([block])}),
        lm_head=nn.Linear(32, 96, bias=False),
    )
    model.transformer["wte"].weight = model.lm_head.weight  # tied
    return model


def llama_of_meta() -> nn.Module:
    block = tree(
        "TransformerBlock",
        attention=tree("Attention", wq=nn.Linear(32, 32), wo=nn.Linear(32, 32)),
        feed_forward=tree("FeedForward", w1=nn.Linear(32, 48), w2=nn.Linear(48, 32), w3=nn.Linear(32, 48)),
    )
    return tree(
        "Transformer",
        tok_embeddings=nn.Embedding(96, 32),
        layers=nn.ModuleList([block]),
        norm=nn.LayerNorm(32),
        output=nn.Linear(32, 96, bias=False),
    )


def torchtitan_moe() -> nn.Module:
    experts = tree("GroupedExperts", w1=bare(3, 48, 32), w2=bare(3, 32, 48), w3=bare(3, 48, 32))
    block = tree(
        "TransformerBlock",
        moe=tree("MoE", experts=experts, dim=32, router=tree("TokenChoiceTopKRouter", gate=nn.Linear(32, 3, bias=False))),
    )
    experts.dim = 32
    return tree(
        "Transformer", tok_embeddings=nn.Embedding(96, 32), layers=nn.ModuleDict({"0": block}), output=nn.Linear(32, 96)
    )


def chatglm() -> nn.Module:
    attention = tree(
        "SelfAttention",
        multi_query_attention=True,
        num_attention_heads_per_partition=4,
        num_multi_query_groups_per_partition=2,
        hidden_size_per_attention_head=8,
        query_key_value=nn.Linear(32, 64),
        dense=nn.Linear(32, 32),
    )
    mlp = tree("MLP", dense_h_to_4h=nn.Linear(32, 96), dense_4h_to_h=nn.Linear(48, 32))  # chunk(2): a gated MLP
    return tree(
        "ChatGLMModel",
        layers=nn.ModuleList([tree("GLMBlock", self_attention=attention, mlp=mlp)]),
        output_layer=nn.Linear(32, 96),
    )


def resnet() -> nn.Module:
    block = lambda: tree(
        "BasicBlock",
        conv1=nn.Conv2d(8, 12, 3, bias=False),
        bn1=nn.BatchNorm2d(12),
        conv2=nn.Conv2d(12, 8, 3, bias=False),
        downsample=nn.Sequential(nn.Conv2d(8, 12, 1)),
    )
    return tree(
        "ResNet",
        conv1=nn.Conv2d(3, 8, 7),
        bn1=nn.BatchNorm2d(8),
        layer1=nn.Sequential(block(), block()),
        avgpool=nn.AdaptiveAvgPool2d(1),
        fc=nn.Linear(12, 10),
    )


def mobilenet() -> nn.Module:
    layer = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, groups=3))
    return tree(
        "MobileNetV2",
        features=nn.Sequential(nn.Conv2d(3, 8, 3), layer),
        classifier=nn.Sequential(nn.Dropout(), nn.Linear(12, 10)),
    )


def vgg() -> nn.Module:
    return tree(
        "VGG",
        features=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
        classifier=nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10)),
    )


def vision_transformer() -> nn.Module:
    """torchvision's; its `EncoderBlock`s have an nn.MultiheadAttention and an MLP that is an nn.Sequential."""
    block = tree(
        "EncoderBlock",
        self_attention=nn.MultiheadAttention(32, 4, batch_first=True),
        mlp=nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Dropout(), nn.Linear(48, 32), nn.Dropout()),
    )
    encoder = tree("Encoder", pos_embedding=bare(1, 5, 32), layers=nn.Sequential(block), ln=nn.LayerNorm(32))
    return tree(
        "VisionTransformer",
        class_token=bare(1, 1, 32),
        conv_proj=nn.Conv2d(3, 32, 8, 8),
        encoder=encoder,
        heads=nn.Sequential(nn.Linear(32, 10)),
    )


def timm_vit() -> nn.Module:
    block = tree(
        "Block",
        attn=tree("Attention", num_heads=4, head_dim=8, qkv=nn.Linear(32, 96), proj=nn.Linear(32, 32)),
        ls1=tree("LayerScale", gamma=bare(32)),
        mlp=tree("SwiGLUFFN", w12=nn.Linear(32, 96), w3=nn.Linear(48, 32)),
    )
    return tree(
        "VisionTransformer",
        cls_token=bare(1, 1, 32),
        reg_token=bare(1, 4, 32),
        pos_embed=bare(1, 5, 32),
        patch_embed=tree("PatchEmbed", proj=nn.Conv2d(3, 32, 8, 8)),
        blocks=nn.Sequential(block),
        norm=nn.LayerNorm(32),
        head=nn.Linear(32, 10),
    )


def lora(layer: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """As PEFT wraps an nn.Linear."""
    layer.requires_grad_(False)
    return tree(
        "Linear",
        base_layer=layer,
        lora_A=nn.ModuleDict({"default": nn.Linear(inputs, 4, bias=False)}),
        lora_B=nn.ModuleDict({"default": nn.Linear(4, outputs, bias=False)}),
        lora_embedding_A=nn.ParameterDict(),
        lora_embedding_B=nn.ParameterDict(),
    )


def peft() -> nn.Module:
    embedding = nn.Embedding(96, 32).requires_grad_(False)
    wrapped = tree(
        "Embedding",
        base_layer=embedding,
        lora_embedding_A=nn.ParameterDict({"default": bare(4, 96)}),
        lora_embedding_B=nn.ParameterDict({"default": bare(32, 4)}),
    )
    attention = tree(
        "Attention",
        num_heads=4,
        head_dim=8,
        num_key_value_heads=2,
        qkv_proj=lora(nn.Linear(32, 64), 32, 64),
        o_proj=lora(nn.Linear(32, 32), 32, 32),
    )
    head = nn.Linear(32, 3)
    saved = tree(
        "ModulesToSaveWrapper",
        original_module=nn.Linear(32, 3).requires_grad_(False),
        modules_to_save=nn.ModuleDict({"default": head}),
    )
    model = tree("Llama", embed_tokens=wrapped, layers=nn.ModuleList([tree("Layer", self_attn=attention)]), score=saved)
    return tree("PeftModel", base_model=tree("LoraModel", model=model))


def recurrent() -> nn.Module:
    return tree(
        "Tagger",
        embed=nn.Embedding(40, 12),
        lstm=nn.LSTM(12, 16, proj_size=6),
        gru=nn.GRU(6, 10),
        rnn=nn.RNN(10, 8),
        cell=nn.LSTMCell(8, 10),
        fc=nn.Linear(10, 7),
    )


def unet() -> nn.Module:
    return tree(
        "UNet",
        down=nn.Conv2d(1, 8, 3),
        mid=nn.Conv3d(8, 6, (1, 3, 3)),
        up=nn.ConvTranspose2d(6, 4, 2),
        gates=nn.Conv2d(4, 6, 1, groups=2),
        out=nn.Conv2d(6, 2, 1),
    )


def gates(times: int, size: int):
    return rows(*(size,) * times)


LAYER = "transformer.h.*."
GPT_MLP = {LAYER + "mlp.{c_fc,c_proj}.weight": linear}
LITGPT = {
    "lm_head.weight": "head",
    "transformer.wte.weight": "embedding",
    LAYER + "attn.proj.weight": linear,
    LAYER + "mlp.{fc_1,fc_2,proj}.weight": linear,
}
MODULES = {
    "litgpt": (lambda: litgpt("qkv"), LITGPT | {LAYER + "attn.qkv.weight": rows(32, 16, 16)}),
    # before 0.5.4: view(query groups, heads of each + 2, head_size)
    "litgpt of old": (lambda: litgpt("attn"), LITGPT | {LAYER + "attn.attn.weight": repeated(2, 16, 8, 8)}),
    "nanoGPT": (
        nano_gpt,
        GPT_MLP
        | {
            "transformer.{wte,wpe}.weight": "embedding",
            LAYER + "attn.c_attn.weight": rows(32, 32, 32),
            LAYER + "attn.c_proj.weight": linear,
        },
    ),
    "Meta's llama": (
        llama_of_meta,
        {
            "tok_embeddings.weight": "embedding",
            "output.weight": "head",
            "layers.*.attention.{wq,wo}.weight": linear,
            "layers.*.feed_forward.{w1,w2,w3}.weight": linear,
        },
    ),
    "torchtitan's experts": (
        torchtitan_moe,
        {
            "tok_embeddings.weight": "embedding",
            "output.weight": "head",
            "layers.*.moe.experts.{w1,w2,w3}": each(linear),
            "layers.*.moe.router.gate.weight": linear,
        },
    ),
    "ChatGLM": (
        chatglm,
        {
            "output_layer.weight": "head",
            "layers.*.self_attention.query_key_value.weight": rows(32, 16, 16),
            "layers.*.self_attention.dense.weight": linear,
            "layers.*.mlp.dense_h_to_4h.weight": rows(48, 48),
            "layers.*.mlp.dense_4h_to_h.weight": linear,
        },
    ),
    "torchvision's ResNet": (
        resnet,
        {"conv1.weight": kernel, "layer1.*.{conv1,conv2,downsample.*}.weight": kernel, "fc.weight": "head"},
    ),
    "torchvision's VGG": (vgg, {"features.*.weight": kernel, "classifier.*.weight": linear, "classifier.5.weight": "head"}),
    # features.1 is a depthwise, a pointwise and a grouped convolution (3 groups of 4 inputs and outputs)
    "torchvision's MobileNet": (
        mobilenet,
        {
            "features.0.weight": kernel,
            "features.1.0.weight": "vector",
            "features.1.1.weight": kernel,
            "features.1.2.weight": lambda w: list(w.flatten(1).split(4)),
            "classifier.1.weight": "head",
        },
    ),
    "torchvision's ViT": (
        vision_transformer,
        {
            "class_token": "vector",
            "encoder.pos_embedding": "embedding",
            "conv_proj.weight": kernel,
            "encoder.layers.*.self_attention.in_proj_weight": rows(32, 32, 32),
            "encoder.layers.*.self_attention.out_proj.weight": linear,
            "encoder.layers.*.mlp.*.weight": linear,
            "heads.*.weight": "head",
        },
    ),
    "timm's ViT": (
        timm_vit,
        {
            "cls_token": "vector",
            "{reg_token,pos_embed}": "embedding",
            "patch_embed.proj.weight": kernel,
            "blocks.*.attn.qkv.weight": rows(32, 32, 32),
            "blocks.*.attn.proj.weight": linear,
            "blocks.*.mlp.w12.weight": rows(48, 48),
            "blocks.*.mlp.w3.weight": linear,
            "head.weight": "head",
        },
    ),
    "nn.Transformer": (
        lambda: nn.Transformer(32, 4, 1, 1, 48),
        {
            "{encoder,decoder}.layers.*.self_attn.in_proj_weight": rows(32, 32, 32),
            "decoder.layers.*.multihead_attn.in_proj_weight": rows(32, 32, 32),
            "{encoder,decoder}.layers.*.self_attn.out_proj.weight": linear,
            "decoder.layers.*.multihead_attn.out_proj.weight": linear,
            "{encoder,decoder}.layers.*.{linear1,linear2}.weight": linear,
        },
    ),
    "nn.MultiheadAttention of other keys": (
        lambda: nn.MultiheadAttention(32, 4, kdim=24, vdim=20, add_bias_kv=True),
        {"{q,k,v}_proj_weight": linear, "out_proj.weight": linear, "bias_{k,v}": "vector"},
    ),
    "nn.LSTM, nn.GRU, nn.RNN": (
        recurrent,
        {
            "embed.weight": "embedding",
            "lstm.weight_{ih,hh}_l0": gates(4, 16),
            "lstm.weight_hr_l0": linear,
            "gru.weight_{ih,hh}_l0": gates(3, 10),
            "rnn.weight_{ih,hh}_l0": linear,
            "cell.weight_{ih,hh}": gates(4, 10),
            "fc.weight": "head",
        },
    ),
    "convolutions": (
        unet,
        {
            "down.weight": kernel,
            "mid.weight": kernel,
            "out.weight": kernel,
            "up.weight": lambda w: [w.transpose(0, 1).flatten(1)],  # (in, out, kernel): as (in · kernel, out), transposed
            "gates.weight": lambda w: list(w.flatten(1).split(3)),
        },
    ),
    "LoRA": (
        peft,
        {
            "base_model.model.embed_tokens.lora_embedding_{A,B}.default": "embedding",
            "base_model.model.layers.*.self_attn.{qkv_proj,o_proj}.lora_A.default.weight": linear,
            "base_model.model.layers.*.self_attn.qkv_proj.lora_B.default.weight": rows(32, 16, 16),
            "base_model.model.layers.*.self_attn.o_proj.lora_B.default.weight": linear,
            "base_model.model.score.modules_to_save.default.weight": "head",
        },
    ),
    "a head on a trunk": (
        lambda: tree(
            "Tagger",
            bert=BertModel(
                BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
            ),
            dropout=nn.Dropout(),
            fc=nn.Linear(32, 7),
        ),
        {
            "bert.embeddings.{word,position,token_type}_embeddings.weight": "embedding",
            "bert.encoder.layer.*.attention.self.{query,key,value}.weight": linear,
            "bert.encoder.layer.*.{attention.output,intermediate,output}.dense.weight": linear,
            "bert.pooler.dense.weight": linear,
            "fc.weight": "head",
        },
    ),
}
