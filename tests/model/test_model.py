"""Models are what their configs promise, and sampling is repeatable and stays in the vocabulary."""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from celo2_pretrain.cli import main
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Model, dump_config, load_config
from celo2_pretrain.model.build import build_model
from celo2_pretrain.model.loss import training_loss
from celo2_pretrain.model.sample import sample

from support.paths import ROOT

CONFIGS = ROOT / "configs"
TINY = dict(layers=2, width=32, heads=4, context=16)


@pytest.mark.parametrize("name, millions", [("gpt2_124m", 124.5), ("gpt3_xl_1.3b", 1315.8), ("tiny_cpu", 1.07)])
def test_models_have_the_size_their_config_is_named_for(name, millions):
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    with torch.device("meta"):
        model = build_model(config.model, config.model.vocab_size or 2048, 0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "name, millions", [("gpt2_124m", 125), ("gpt3_350m", 350), ("gpt3_760m", 760), ("gpt3_xl_1.3b", 1300), ("gpt3_6.7b", 6700)]
)
def test_models_have_the_size_that_the_gpt3_paper_says(name, millions):
    """Table 2.1 of arXiv 2005.14165, whose figures are rounded."""
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    with torch.device("meta"):
        model = build_model(config.model, 50257, 0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("family, projections", [("gpt2", ("c_proj",)), ("llama", ("o_proj", "down_proj"))])
def test_residual_projections_begin_smaller_by_the_square_root_of_the_depth(family, projections):
    shape = dict(family=family, layers=8, width=64, heads=4, context=16)
    for scaled, expected in ((True, 0.02 / 4), (False, 0.02)):
        torch.manual_seed(0)
        model = build_model(Model(scaled_init=scaled, **shape), 300, 0)
        spread = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.ndim == 2}
        residual = {name for name in spread if name.split(".")[-2] in projections}
        assert len(residual) == 16
        assert all(spread[name] == pytest.approx(expected if name in residual else 0.02, rel=0.1) for name in spread)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attentions_and_checkpointing_compute_the_same(family):
    def run(**options) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = build_model(Model(family=family, **options, **TINY), 300, 0).train()
        loss, _ = training_loss(model, torch.arange(34).view(2, 17))
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    plain = run()
    for options in ({"attention": "eager"}, {"activation_checkpointing": True}):
        for a, b in zip(plain, run(**options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_attention_that_is_not_installed_or_has_no_such_precision_is_refused():
    if not is_flash_attn_2_available():
        with pytest.raises(
            UserError, match="model.attention=flash_attention_2 needs an NVIDIA GPU and the flash-attn package"
        ):
            build_model(Model(attention="flash_attention_2", **TINY), 300, 0)
    with pytest.raises(UserError, match="has no float32: set train.precision=bf16"):
        load_config(None, ["model.attention=flash_attention_2"])
    with pytest.raises(UserError, match="model.attention='flash': must be one of sdpa, eager"):
        load_config(None, ["model.attention=flash"])


def test_z_loss_adds_the_squared_log_normaliser_and_nothing_to_the_loss_that_is_logged():
    torch.manual_seed(0)
    model = build_model(Model(**TINY), 300, 0)
    windows = torch.randint(0, 300, (2, 17))
    loss, cross_entropy = training_loss(model, windows, z_loss=0.1)
    logits = model(input_ids=windows[:, :-1]).logits
    torch.testing.assert_close(loss - cross_entropy, 0.1 * logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(cross_entropy, training_loss(model, windows)[0])
    with pytest.raises(UserError, match="train.z_loss=-1.0: must be at least 0"):
        load_config(None, ["train.z_loss=-1"])


@pytest.fixture(scope="module")
def existing(tmp_path_factory) -> str:
    """A saved untied Llama with a vocabulary of 300 and positions for 16 tokens."""
    folder = tmp_path_factory.mktemp("existing")
    torch.manual_seed(3)
    build_model(Model(family="llama", tied=False, **TINY), 300, 0).save_pretrained(folder)
    return str(folder)


def test_training_starts_from_an_existing_models_weights_and_shape(existing, tmp_path):
    config = load_config(None, [f"model.from={existing}", "model.context=16"])
    model = build_model(config.model, 300, 0)
    torch.manual_seed(3)
    expected = build_model(Model(family="llama", tied=False, **TINY), 300, 0)
    for (name, a), (other, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b) and a.dtype == torch.float32
    assert not torch.equal(build_model(config.model, 300, 0, pretrained=False).lm_head.weight, expected.lm_head.weight)
    # The config that a run writes down reads back, though no shape may be given with model.from.
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    "overrides, vocabulary, message",
    [
        (["model.layers=2"], 300, "model.layers=2 can't be given with model.from"),
        (["model.context=32"], 300, "has positions for 16 tokens, model.context=32"),
        (["model.context=16"], 400, "has a vocabulary of 300, the data one of 400"),
    ],
)
def test_an_existing_model_that_does_not_fit_is_refused(existing, overrides, vocabulary, message):
    with pytest.raises(UserError) as error:
        build_model(load_config(None, [f"model.from={existing}", *overrides]).model, vocabulary, 0)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no transformers model there"):
        build_model(load_config(None, [f"model.from={tmp_path}"]).model, 300, 0)


@pytest.mark.slow
def test_the_driver_trains_compiled_with_z_loss_from_an_existing_model(tmp_path):
    data, existing = str(tmp_path / "tokens"), str(tmp_path / "existing")
    build_model(Model(family="llama", tied=False, **TINY), 512, 0).save_pretrained(existing)
    assert main(["prepare", "--stdlib", "--max-mb", "0.2", "--vocab-size", "512", "--out", data]) == 0
    run = f"run_dir={tmp_path / 'run'}"
    assert (
        main(
            [
                "train",
                run,
                f"data.path={data}",
                f"model.from={existing}",
                "model.context=16",
                "model.compile=true",
                "train.z_loss=1e-4",
                "train.max_steps=2",
                "train.micro_batch_size=2",
                "train.global_batch_size=4",
                "eval.sequences=4",
                "optimizer.lr=1e-3",
            ]
        )
        == 0
    )
    assert main(["train", "--resume", str(tmp_path / "run"), "train.max_steps=3"]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "exported")]) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_both_families_run_tied_and_untied(family, tied):
    model = build_model(Model(family=family, tied=tied, **TINY), 300, 0)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    logits = model(input_ids=torch.arange(16)[None]).logits
    assert logits.shape == (1, 16, 300)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    # a token must not see the ones after it
    other = model(input_ids=torch.tensor([[*range(8), *range(100, 108)]])).logits
    torch.testing.assert_close(logits[:, :8], other[:, :8])


def test_vocabulary_smaller_than_the_datas_is_refused():
    with pytest.raises(UserError, match="model.vocab_size=256 is smaller than the data's vocabulary of 300"):
        build_model(Model(vocab_size=256, **TINY), 300, 0)


def test_samples_are_repeatable_and_stay_in_the_vocabulary():
    torch.manual_seed(0)
    model = build_model(Model(vocab_size=4096, **TINY), 300, 0)
    options = dict(context=16, eos_id=0, vocab_size=300)
    first = sample(model, [5, 6], 40, seed=1, **options)
    assert len(first) == 40 and max(first) < 300
    assert first == sample(model, [5, 6], 40, seed=1, **options) != sample(model, [5, 6], 40, seed=2, **options)
    assert len(sample(model, [], 3, temperature=0, **options)) == 3
