"""Models are the sizes that their configs promise, and sampling is repeatable and stays in the vocabulary."""
from pathlib import Path

import pytest
import torch

from celo2_pretrain.model.build import build_model
from celo2_pretrain.model.sample import sample
from celo2_pretrain.train.config import Model, load_config
from celo2_pretrain.train.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = dict(layers=2, width=32, heads=4, context=16)


@pytest.mark.parametrize("name, millions", [("gpt2_124m", 124.5), ("gpt3_xl_1.3b", 1315.8), ("tiny_cpu", 1.07)])
def test_models_have_the_size_their_config_is_named_for(name, millions):
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    with torch.device("meta"):
        model = build_model(config.model, config.model.vocab_size or 2048, 0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert model.config._attn_implementation == "sdpa"


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
