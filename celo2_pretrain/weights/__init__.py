"""Weights of the learned rule: the bundled ones, and readers for every format they are published in."""

from celo2_pretrain.weights.files import save_weights
from celo2_pretrain.weights.load import BUNDLED, load_weights

__all__ = ["BUNDLED", "load_weights", "save_weights"]
