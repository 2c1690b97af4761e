"""Which rule every tensor of an architecture gets and which matrices it is, for those that people train."""

import pytest
import torch

from celo2_pretrain import param_groups

from architectures.cuts import by_name, check_reading, check_step, listed
from architectures.decoders import DECODERS
from architectures.encoders import ENCODERS
from architectures.forwards import SAME_OUTPUT
from architectures.modules import MODULES

ARCHITECTURES = DECODERS | ENCODERS | MODULES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_gets_its_rule_and_steps_as_separate_linears_would(architecture):
    build, expected = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = build()
    param_groups(model)
    check_reading(model, expected)
    check_step(model, expected)


@pytest.mark.parametrize("architecture", SAME_OUTPUT)
def test_the_expected_cuts_are_those_of_the_forward(architecture):
    build, expected = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    ids, expected = torch.randint(3, 96, (2, 7)), by_name(expected)
    model = build().eval()
    output = lambda: model(ids, use_cache=False).logits if model.can_generate() else model(ids).logits

    def scale(name: str, factors: tuple[float, ...]) -> None:
        param = model.get_parameter(name)
        cut = expected[listed(name, expected)]
        for number, part in enumerate(cut(torch.arange(param.numel()).view(param.shape))):
            param.view(-1)[part.flatten()] *= factors[number % len(factors)]

    with torch.no_grad():
        for param in model.parameters():
            if param.ndim >= 2:
                param.normal_(std=0.2)
        before = output()
        for change in SAME_OUTPUT[architecture]:
            for name, factors in change.items():
                scale(name, factors)
            torch.testing.assert_close(output(), before, rtol=1e-4, atol=1e-4)
            name, factors = next(iter(change.items()))
            first = next(number for number, factor in enumerate(factors) if factor != 1)
            scale(name, tuple(1 / factor if number == first else 1 for number, factor in enumerate(factors)))
            assert (output() - before).abs().max() > 1e-3, "the model doesn't feel this matrix, so it tells nothing"
            scale(name, tuple(factor if number == first else 1 for number, factor in enumerate(factors)))
