"""Use the optimizer as a training loop of one's own does, with torch, numpy and safetensors only; prints the version.

python core_use.py FOLDER_FOR_A_STATE
"""

import sys

import torch

import celo2_pretrain
from celo2_pretrain import Celo2, load_state, param_groups, register, save_state, table


def new():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 7))
    return model, Celo2(param_groups(model), lr=1e-3, adamw_lr_multiplier=2.0)


def step(model, optimizer):
    model(torch.arange(7)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


model, optimizer = new()
register(model)
assert "celo2" in table(model)
step(model, optimizer)
save_state(optimizer, sys.argv[1])
other, resumed = new()
other.load_state_dict(model.state_dict())
load_state(resumed, sys.argv[1])
step(model, optimizer)
step(other, resumed)
assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
for name in celo2_pretrain.__all__:
    getattr(celo2_pretrain, name)
print(celo2_pretrain.__version__)
