"""Kernels, one per file, each beside its plain-torch twin; imported as celo2_pretrain.kernels."""

# Run from the repo root, `import kernels` finds this folder where transformers looks for Hugging Face's package of that
# name. Without a version transformers 5.0 fails to import; this one is too old to be taken for theirs.
__version__ = "0"

if __name__ == "kernels":  # not celo2_pretrain.kernels: give way to Hugging Face's package if it is installed
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _theirs = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() != _root])
    if _theirs is not None and _theirs.loader is not None:
        sys.modules["kernels"] = importlib.util.module_from_spec(_theirs)
        _theirs.loader.exec_module(sys.modules["kernels"])
