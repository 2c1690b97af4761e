"""Packages that the core does without: the extras of pyproject.toml bring them."""

# As they are imported. deepspeed and setuptools are the extra deepspeed's, which train includes.
PACKAGES = {
    "deepspeed",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "sentencepiece",
    "huggingface_hub",
    "msgpack",
    "matplotlib",
    "PIL",
    "yaml",
    "tqdm",
    "psutil",
    "pydantic",
    "zstandard",
    "triton",
}


def install_line(error: ModuleNotFoundError, extra: str) -> str | None:
    """The missing package and how to install it, or None for a module that no extra brings."""
    package = (error.name or "").partition(".")[0]
    return f'{package}, which is not installed: pip install "celo2-pretrain[{extra}]"' if package in PACKAGES else None
