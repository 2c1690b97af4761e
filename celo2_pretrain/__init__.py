"""Pretrain GPT-style models with Celo2, a learned optimizer, under DeepSpeed.

    from celo2_pretrain import Celo2, param_groups, register
"""
from .optimizer.celo2 import Celo2
from .optimizer.rules import param_groups, register

__all__ = ["Celo2", "param_groups", "register"]
