"""The configs that come with the project: in configs/ of the source tree, and inside the installed package."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
FOLDER = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"


def config_file(path: str) -> Path:
    """`path`; or, where there is no such file, the config that comes with the project under that name (configs/…)."""
    given = Path(path)
    bundled = FOLDER.parent / given
    return bundled if given.parts[:1] == ("configs",) and not given.exists() and bundled.is_file() else given
