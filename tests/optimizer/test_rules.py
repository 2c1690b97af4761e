"""Which tensor gets which rule, read as which matrices, for the models people have."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, Phi3Config

from celo2_pretrain import Celo2, param_groups, register
from celo2_pretrain.optimizer.matrices.param_groups import table, tag_model, tag_of
from celo2_pretrain.optimizer.matrices.views import MatrixView

from architectures.modules import bare, tree


def gpt2(tied: bool = True) -> nn.Module:
    return AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=12, n_layer=2, n_head=3, tie_word_embeddings=tied)
    )


def llama(tied: bool = False) -> nn.Module:
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


def tags(model: nn.Module) -> dict[str, tuple]:
    return {name: (tag_of(p).kind, tag_of(p).rule, tag_of(p).view) for name, p in model.named_parameters()}


def test_gpt2_conv1d_lies_in_out_and_its_qkv_are_three_matrices():
    model = gpt2()
    groups = param_groups(model, weight_decay=0.1)
    found = tags(model)
    assert found["transformer.h.0.attn.c_attn.weight"] == ("hidden", "celo2", MatrixView(split=(12, 12, 12)))
    assert found["transformer.h.1.mlp.c_fc.weight"] == ("hidden", "celo2", MatrixView())
    assert found["transformer.wpe.weight"][:2] == ("embedding", "adamw")
    assert found["transformer.h.0.ln_1.bias"][:2] == ("vector", "adamw")
    assert [(g["rule"], g.get("weight_decay")) for g in groups] == [("celo2", 0.1), ("adamw", None), ("adamw", None)]
    assert len(groups[0]["params"]) == 8


def test_llama_linears_are_read_transposed():
    model = llama()
    param_groups(model)
    found = tags(model)
    assert found["model.layers.0.self_attn.q_proj.weight"] == ("hidden", "celo2", MatrixView(transpose=True))
    assert found["model.layers.1.mlp.down_proj.weight"][2] == MatrixView(transpose=True)
    assert found["lm_head.weight"][:2] == ("head", "adamw")
    assert found["model.norm.weight"][:2] == ("vector", "adamw")


@pytest.mark.parametrize("build", [gpt2, llama])
def test_tied_embeddings_count_once(build):
    model = build(tied=True)
    groups = param_groups(model)
    params = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in params}) == len(params) == len(list(model.parameters()))
    assert tag_of(model.get_output_embeddings().weight).rule == "adamw"
    Celo2(groups)  # torch refuses a parameter that stands in two groups


def test_per_head_views():
    model = gpt2()
    param_groups(model, per_head=True)
    assert tags(model)["transformer.h.0.attn.c_attn.weight"][2] == MatrixView(head_dim=4)
    model = llama()
    param_groups(model, per_head=True)
    assert tags(model)["model.layers.0.self_attn.k_proj.weight"][2] == MatrixView(transpose=True, head_dim=4)
    assert tags(model)["model.layers.0.self_attn.o_proj.weight"][2] == MatrixView(transpose=True)


def test_interleaved_qkv_is_three_matrices_and_with_per_head_one_for_each_head():
    model = AutoModelForCausalLM.from_config(
        GPTNeoXConfig(vocab_size=50, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=24)
    )
    param_groups(model)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert tags(model)[name][2] == MatrixView(transpose=True, split=(4, 4, 4), repeats=3)
    assert "(out, in), 3 parts of 4, 3 times in turn" in table(model)
    param_groups(model, per_head=True)
    assert tags(model)[name][2] == MatrixView(transpose=True, head_dim=4)


def test_per_head_holds_for_every_fused_projection_with_heads():
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    for config in (
        FalconConfig(**sizes, new_decoder_architecture=True, num_kv_heads=2),
        FalconConfig(**sizes),
        Phi3Config(**sizes, num_key_value_heads=2, intermediate_size=24, pad_token_id=0),
    ):
        model = AutoModelForCausalLM.from_config(config)
        param_groups(model, per_head=True)
        views = {name.split(".")[-2]: view for name, (_, _, view) in tags(model).items()}
        assert views.get("query_key_value", views.get("qkv_proj")) == MatrixView(transpose=True, head_dim=4)
    assert views["gate_up_proj"] == MatrixView(transpose=True, split=(24, 24))  # no heads in it


def test_a_fused_projection_of_an_unknown_class_is_one_matrix_and_the_table_says_so():
    attention = tree("MyAttention", num_heads=4, head_dim=8, query_key_value=nn.Linear(32, 96), q_proj=nn.Linear(32, 64))
    model = tree("MyModel", layers=nn.ModuleList([attention]), kernels=bare(3, 4, 5))
    param_groups(model)
    assert tags(model)["layers.0.query_key_value.weight"][1:] == ("celo2", MatrixView(transpose=True))
    assert tags(model)["layers.0.q_proj.weight"][2] == MatrixView(transpose=True)
    assert tags(model)["kernels"][1:] == ("celo2", MatrixView())
    lines = {line.split()[2]: line for line in table(model).splitlines()[1:-1]}
    for name in ("layers.*.query_key_value.weight", "layers.*.q_proj.weight"):
        assert "one matrix; if fused, its parts are unknown" in lines[name]
    assert "which axes are in and out is unknown" in lines["kernels"]


def test_experts_are_read_as_their_class_declares():
    """transformers 5 sets these attributes on experts, whatever their class is called."""
    experts = tree("NewExperts", is_transposed=True, is_concatenated=False, gate_up_proj=bare(3, 16, 24))
    param_groups(experts)
    assert tags(experts)["gate_up_proj"][2] == MatrixView(batch=1, split=(1, 1), repeats=12)


def test_experts_of_an_unknown_class_lie_as_their_sizes_say():
    experts = tree("MyExperts", hidden_size=16, up=bare(3, 24, 16), down_proj=bare(3, 16, 24), square=bare(3, 16, 16))
    model = tree("MyModel", layers=nn.ModuleList([tree("MoE", experts=experts)]))
    param_groups(model)
    views = {name.split(".")[-1]: view for name, (_, _, view) in tags(model).items()}
    assert views["up"] == views["down_proj"] == MatrixView(transpose=True, batch=1)
    assert views["square"] == MatrixView(batch=1) and table(model).count("which axes are in and out is unknown") == 1


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
        ),
        Phi3Config(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        ),
        GPT2Config(vocab_size=50, n_positions=16, n_embd=12, n_layer=1, n_head=3),
    ],
)
def test_wrapped_and_partitioned_models_are_read_as_the_model_itself(config):
    """Under ZeRO-3 a parameter is empty between uses, and its shape is `ds_shape`."""
    model = AutoModelForCausalLM.from_config(config)
    param_groups(model)
    plain = list(tags(model).values())
    for wrapped in (tree("DistributedDataParallel", module=model), torch.compile(model), tree("Trainee", student=model)):
        param_groups(wrapped)
        assert list(tags(wrapped).values()) == plain
    for param in model.parameters():
        param.ds_shape, param.data = param.shape, torch.empty(0)
    param_groups(model)
    assert list(tags(model).values()) == plain


def test_a_matrix_inside_of_a_layer_is_no_head_whatever_its_name():
    layer = lambda: tree("Layer", fc=nn.Linear(8, 16), output=nn.Linear(16, 8), classifier=nn.Linear(8, 4))
    for layers in (nn.ModuleList([layer()]), nn.ModuleList([layer(), layer()])):
        model = tree("Model", embed=nn.Embedding(9, 8), layers=layers)
        param_groups(model)
        assert {kind for name, (kind, _, _) in tags(model).items() if name.endswith("weight")} == {"embedding", "hidden"}


def test_the_last_linear_of_a_model_is_its_head_but_not_that_of_a_part():
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1))
    param_groups(model)
    assert [kind for kind, _, _ in tags(model).values()][::2] == ["hidden", "hidden", "head"]
    for part in (
        nn.Linear(12, 8),
        tree("MLP", up=nn.Linear(8, 32), down=nn.Linear(32, 8)),
        nn.ModuleList([nn.Linear(12, 8)]),
        nn.TransformerEncoderLayer(8, 2, 16),
    ):
        param_groups(part)
        assert {kind for kind, _, _ in tags(part).values()} == {"hidden", "vector"}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("pos_embed", "embedding"),
        ("positional_embedding", "embedding"),
        ("type_embeddings", "embedding"),
        ("query_tokens", "embedding"),
        ("rel_pos_h", "embedding"),
        ("relative_position_bias_table", "embedding"),
        ("expert_bias", "vector"),
        ("layer_scale", "vector"),
        ("A_log", "vector"),
        ("sinks", "vector"),
        ("composition", "hidden"),
        ("token_proj", "hidden"),
        ("upscale_weight", "hidden"),
        ("w1", "hidden"),
    ],
)
def test_bare_parameters_are_what_their_names_say(name, kind):
    model = tree("Model", **{name: bare(6, 4)})
    param_groups(model)
    assert tags(model)[name][:2] == (kind, "celo2" if kind == "hidden" else "adamw")


def test_the_weight_of_an_embedding_of_another_library_is_an_embedding():
    model = tree("Model", tokens=tree("VocabParallelEmbedding", weight=bare(50, 8)))
    param_groups(model)
    assert tags(model)["tokens.weight"][:2] == ("embedding", "adamw")


def test_a_matrix_as_large_as_the_vocabulary_is_a_head():
    model = tree("LM", tokens=nn.Embedding(50, 8), to_words=nn.Linear(8, 50), mix=nn.Linear(8, 8), norm=nn.LayerNorm(8))
    param_groups(model)
    assert tags(model)["to_words.weight"][0] == "head" and tags(model)["mix.weight"][0] == "hidden"


def test_a_plain_module():
    model = nn.Sequential(nn.Embedding(9, 6), nn.MultiheadAttention(6, 2), nn.Conv2d(3, 4, 3), nn.Linear(6, 5))
    model.add_module("head", nn.Linear(5, 9))
    model[3].requires_grad_(False)
    param_groups(model)
    found = {name: tag_of(p) for name, p in model.named_parameters()}
    assert found["3.weight"] is None
    assert found["0.weight"].kind == "embedding" and found["head.weight"].kind == "head"
    assert found["1.in_proj_weight"].view == MatrixView(transpose=True, split=(6, 6, 6))
    assert found["2.weight"].view == MatrixView(transpose=True, flatten=True) and found["2.weight"].rule == "celo2"
    assert "(out, in), further axes are input" in table(model)


def test_patterns_override_and_must_match():
    model = llama()
    groups = param_groups(model, adamw=["*.down_proj.weight"], celo2=["lm_head.weight"])
    assert tag_of(model.model.layers[0].mlp.down_proj.weight).rule == "adamw"
    assert tag_of(model.lm_head.weight).rule == "celo2"
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="gate_projj"):
        param_groups(model, adamw=["*.gate_projj.weight"])
    with pytest.raises(ValueError, match="both rules"):
        param_groups(model, adamw=["lm_head*"], celo2=["lm_*"])
    with pytest.raises(ValueError, match="no trainable"):
        param_groups(nn.Identity())


def test_the_optimizer_follows_the_tags_of_a_registered_model():
    model = gpt2()
    register(model)
    assert torch.optim.Celo2 is Celo2
    optimizer = Celo2(model.parameters())
    assert [(g["rule"], len(g["params"])) for g in optimizer.param_groups] == [("celo2", 8), ("adamw", 20)]
    names = [o.name for o in optimizer.originals_of(optimizer.param_groups[0])]
    assert names[0] == "transformer.h.0.attn.c_attn.weight"


def test_the_transposed_view_matters_for_a_square_linear():
    """A tie in the factored axes: read as it lies, a square nn.Linear would take another step."""
    theta = {
        "w0": torch.randn(30, 8),
        "b0": torch.zeros(8),
        "w1": torch.randn(8, 8),
        "b1": torch.zeros(8),
        "w2": torch.randn(8, 3),
        "b2": torch.zeros(3),
    }
    plain, tagged = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    tagged.load_state_dict(plain.state_dict())
    grad = torch.randn(6, 6) * torch.logspace(-2, 2, 6)
    plain.weight.grad, tagged.weight.grad = grad.clone(), grad.clone()
    Celo2(plain.parameters(), weights=theta).step()
    Celo2(param_groups(tagged), weights=theta).step()
    assert (plain.weight - tagged.weight).abs().max() > 1e-5


def test_the_table_shows_every_kind_of_tensor():
    model = gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    param_groups(model)
    text = table(model)
    assert "transformer.h.*.attn.c_attn.weight" in text and "3 parts of 12" in text
    assert "frozen" in text and text.splitlines()[-1].startswith("parameters: ")
    assert all(len(line) < 130 for line in text.splitlines())


class _Layer(nn.Module):
    """A layer with names that elsewhere are those of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.proj, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 16)


def test_layers_in_a_sequential_are_no_heads_however_large_an_embedding_of_positions_is():
    net = nn.Module()
    net.tokens, net.wpe = nn.Embedding(100, 16), nn.Embedding(64, 16)
    net.blocks, net.out = nn.Sequential(_Layer(), _Layer()), nn.Linear(16, 100)
    tag_model(net)
    assert {name: tag_of(p).kind for name, p in net.named_parameters() if p.ndim == 2} == {
        "tokens.weight": "embedding",
        "wpe.weight": "embedding",
        "out.weight": "head",
        **{f"blocks.{k}.{name}.weight": "hidden" for k in (0, 1) for name in ("fc", "proj", "head")},
    }


def test_a_head_has_as_many_outputs_as_the_vocabulary_whatever_its_inputs():
    net = nn.Module()
    net.embed, net.rnn = nn.Embedding(100, 16), nn.LSTM(16, 32)
    net.decoder, net.value = nn.Linear(32, 100), nn.Linear(32, 1)
    tag_model(net)
    assert tag_of(net.decoder.weight).kind == "head" and tag_of(net.value.weight).kind == "vector"


def test_bare_matrices_with_short_names_are_matrices():
    """LoRA's factors and hand-written projections, not the A and D of a state space model or learned queries."""
    net = nn.Module()
    for name in ("A", "B", "query", "key", "value", "alpha_matrix"):
        setattr(net, name, nn.Parameter(torch.randn(8, 8)))
    tag_model(net)
    assert {tag_of(p).kind for p in net.parameters()} == {"hidden"}
    net.dt_proj = nn.Linear(8, 8)
    del net.key
    tag_model(net)
    assert tag_of(net.A).kind == "vector" and tag_of(net.query).kind == "embedding"
