"""Packages: `celo2_pretrain/` as it lies; kernels/ and configs/ of the root are its subpackages, too."""

from setuptools import find_packages, setup

ROOT_FOLDERS = {
    "celo2_pretrain.kernels": "kernels",
    "celo2_pretrain.configs": "configs",
    "celo2_pretrain.configs.meta": "configs/meta",
}

setup(
    packages=[*find_packages(include=["celo2_pretrain", "celo2_pretrain.*"]), *ROOT_FOLDERS],
    package_dir={"celo2_pretrain": "celo2_pretrain", **ROOT_FOLDERS},
    package_data={
        "celo2_pretrain.weights": ["*.safetensors", "*.md"],
        "celo2_pretrain.kernels": ["*.cpp"],
        "celo2_pretrain.configs": ["*.yaml"],
        "celo2_pretrain.configs.meta": ["*.yaml"],
    },
)
