"""With data.mask_documents a document in a packed window is computed as if it were alone."""

import pytest
import torch

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Model
from celo2_pretrain.data.documents import document_inputs, mask_documents
from celo2_pretrain.model.build import build_model

EOS = 1
DOCUMENTS = [[EOS, 5, 9, 7, 30, 12], [EOS, 5, 9, 2], [EOS, EOS][:1], [EOS, 44, 45, 46, 47, 48, 49], [EOS, 3]]


def tiny(family: str, attention: str = "sdpa", **keys):
    torch.manual_seed(0)
    config = Model(family=family, layers=2, width=32, heads=4, context=32, attention=attention, **keys)
    return build_model(config, 64, EOS).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family, keys", [("gpt2", {}), ("llama", {}), ("llama", {"kv_heads": 2, "tied": False})])
def test_packed_documents_have_the_logits_of_documents_alone(family, keys, attention):
    model, plain = tiny(family, attention, **keys), tiny(family, attention, **keys)
    mask_documents(model, EOS)
    packed = torch.tensor([sum(DOCUMENTS, []), sum(DOCUMENTS[::-1], [])])
    with torch.no_grad():
        together = model(input_ids=packed).logits
        for row, documents in zip(together, (DOCUMENTS, DOCUMENTS[::-1])):
            start = 0
            for document in documents:
                alone = plain(input_ids=torch.tensor([document])).logits[0]
                torch.testing.assert_close(row[start : start + len(document)], alone, rtol=1e-4, atol=1e-5)
                start += len(document)
        assert not torch.allclose(together, plain(input_ids=packed).logits, atol=1e-3), "the mask must matter"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_gradient_crosses_a_boundary(family):
    model = tiny(family)
    mask_documents(model, EOS)
    seen = {}
    model.get_input_embeddings().register_forward_hook(lambda module, ids, out: seen.update(out=out) or out.retain_grad())
    ids = torch.tensor([sum(DOCUMENTS, [])])
    model(input_ids=ids).logits[0, 8].sum().backward()  # inside the second document: tokens 6 to 9
    reached = seen["out"].grad[0].abs().sum(1) > 0
    assert reached.tolist() == [k in (6, 7, 8) for k in range(ids.shape[1])]


def test_positions_and_mask_follow_the_end_of_text():
    found = document_inputs(torch.tensor([[8, 9, EOS, 4, EOS, EOS, 7]]), EOS)
    assert found["position_ids"].tolist() == [[0, 1, 0, 1, 0, 0, 1]]
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    assert found["attention_mask"][0, 0].int().tolist() == expected


def test_a_window_without_boundary_is_computed_as_without_masking():
    model, plain = tiny("llama"), tiny("llama")
    mask_documents(model, EOS)
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_models_with_a_window_of_their_own_are_refused():
    model = tiny("llama")
    model.config.sliding_window = 8
    with pytest.raises(UserError, match="does not work with the sliding window of llama models"):
        mask_documents(model, EOS)
