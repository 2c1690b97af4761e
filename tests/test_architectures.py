"""Which rule every tensor of an architecture gets and which matrices it is, for those that people train."""
import pytest
import torch
from architectures.cuts import check_reading, check_step
from architectures.decoders import DECODERS
from architectures.encoders import ENCODERS
from architectures.modules import MODULES

from celo2_pretrain import param_groups

ARCHITECTURES = DECODERS | ENCODERS | MODULES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_gets_its_rule_and_steps_as_separate_linears_would(architecture):
    build, expected = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = build()
    param_groups(model)
    check_reading(model, expected)
    check_step(model, expected)
