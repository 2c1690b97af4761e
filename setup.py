"""Packages: `celo2_pretrain/` as it lies, and `kernels/` at the root imported as celo2_pretrain.kernels."""
from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["celo2_pretrain", "celo2_pretrain.*"]), "celo2_pretrain.kernels"],
    package_dir={"celo2_pretrain": "celo2_pretrain", "celo2_pretrain.kernels": "kernels"},
    package_data={"celo2_pretrain.weights": ["*.safetensors", "*.md"], "celo2_pretrain.kernels": ["*.cpp"]},
)
