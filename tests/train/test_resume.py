"""A resumed run has the configuration it was begun with, but for what the command line overrides."""

import shutil
from pathlib import Path

import pytest
import yaml

from celo2_pretrain.cli import main
from celo2_pretrain.common.settings import as_tree
from celo2_pretrain.config import READER, load_config
from celo2_pretrain.train import loop
from celo2_pretrain.train.checkpoints import select

from support.paths import ROOT

CONFIG = ROOT / "configs/gpt2_124m.yaml"


@pytest.fixture
def resumed(tmp_path, monkeypatch):
    """Calls `train`, with a folder runs/x of a run of gpt2_124m; gives (its configuration, all that was asked of the loop)."""
    monkeypatch.chdir(tmp_path)
    Path("runs/x").mkdir(parents=True)
    begun = load_config(str(CONFIG), ["run_dir=runs/x", "schedule.warmup=0.125"])
    Path("runs/x/config.yaml").write_text(yaml.safe_dump(as_tree(begun)))
    asked = []
    monkeypatch.setattr(select, "find", lambda path: Path(path))  # there are no checkpoints
    monkeypatch.setattr(
        loop, "train", lambda config, resume, overwrite, take_over: asked.append((READER.values(config), resume))
    )

    def call(*arguments: str) -> tuple[dict, str | None]:
        assert main(["train", *arguments]) == 0
        return asked.pop()

    return READER.values(begun), call


@pytest.mark.parametrize("how, resume", [([], "runs/x"), (["auto"], "auto")])
def test_a_run_folder_given_by_its_key_brings_its_own_configuration(resumed, how, resume):
    begun, call = resumed
    assert begun["optimizer.lr"] == 5e-4 and begun["train.precision"] == "bf16" and begun["schedule.warmup"] == 0.125
    assert call("--resume", *how, "run_dir=runs/x") == (begun, resume)
    assert call("--resume", *how, "run_dir=runs/x", "train.max_steps=7") == (begun | {"train.max_steps": 7}, resume)
    config, _ = call("--resume", *how, "run_dir=runs/x", "--config", str(CONFIG))
    assert config["schedule.warmup"] != 0.125  # a file that is given takes the place of the run's


@pytest.mark.parametrize("how", [[], ["auto"]])
def test_the_default_run_folder_does_too_also_when_it_was_moved_there(resumed, how):
    begun, call = resumed
    default = load_config(None).run_dir
    shutil.move("runs/x", default)
    assert call("--resume", *how)[0] == begun | {"run_dir": default}


@pytest.mark.parametrize("how", [[], ["auto"]])
def test_overrides_are_checked_with_the_runs_own_configuration_only(resumed, how):
    begun, call = resumed  # its global batch of 512 is a multiple of 64, the default one of 32 isn't
    assert call("--resume", *how, "run_dir=runs/x", "train.micro_batch_size=64")[0] == begun | {"train.micro_batch_size": 64}


def test_a_run_folder_without_a_configuration_is_refused(resumed, capsys):
    Path("runs/x/config.yaml").unlink()
    assert main(["train", "--resume", "run_dir=runs/x"]) == 2
    assert "'runs/x' is not a run: no config.yaml there" in capsys.readouterr().err
