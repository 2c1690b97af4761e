"""A config is right or it is refused in a line that names the key, the value and what to do."""

from dataclasses import asdict

import pytest
import yaml

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import KEYS, Config, accumulation_steps, dump_config, list_keys, load_config
from celo2_pretrain.deepspeed_config import deepspeed_config

from support.paths import ROOT

CONFIGS = sorted(ROOT.glob("configs/*.yaml"))


@pytest.mark.parametrize(
    "argument, message",
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        ("lr=1", "unknown key 'lr'; did you mean 'optimizer.lr'"),
        ("train.lr=1", "unknown key 'train.lr'; did you mean 'optimizer.lr'"),
        ("modle.layers=3", "did you mean 'model.layers'"),
        ("qqq=1", "--list-keys"),
        ("model=3", "model is a section"),
        ("optimizer.name=adamW", "optimizer.name='adamW': must be one of celo2, celo2_base, adamw"),
        ("optimizer.lr=fast", "optimizer.lr='fast': must be a number"),
        ("optimizer.lr=0", "optimizer.lr=0"),
        ("optimizer.lr=-1e-3", "optimizer.lr=-0.001: must be at least 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan: must be"),
        ("optimizer.lr=.inf", "optimizer.lr=inf: must be"),
        ("train.max_steps=1.5", "train.max_steps=1.5: must be a whole number"),
        ("train.max_steps=0", "train.max_steps=0: must be at least 1"),
        ("train.max_steps=true", "train.max_steps=True: must be a whole number"),
        ("train.zero_stage=4", "train.zero_stage=4: must be one of 0, 1, 2, 3"),
        ("model.tied=1", "model.tied=1: must be true or false"),
        ("schedule.warmup=5", "schedule.warmup=5.0: must be between 0 and 1"),
        ("model.layers=1e15", "model.layers=1000000000000000: must be between 1 and 10,000"),
        ("model.heads=7", "model.width=768 is not a multiple of model.heads=7"),
        ("model.kv_heads=4", "model.kv_heads=4: for llama only"),
        ("train.global_batch_size=30", "train.global_batch_size=30 is not a multiple of train.micro_batch_size=8"),
        ("just-text", "not of the form key=value"),
    ],
)
def test_wrong_keys_and_values_are_refused_in_one_line(argument, message):
    with pytest.raises(UserError) as error:
        load_config(None, [argument])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {layers: [", "is not valid YAML"),
        ("- a\n- b", "must be a mapping of sections, not list"),
        ("train:\n  steps: 3", "config.yaml: unknown key 'train.steps'"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        load_config(str(tmp_path / "none.yaml"))


def test_arguments_override_the_file_and_numbers_may_be_written_any_way(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("optimizer: {lr: 2e-3, weight_decay: 1}\ndeepspeed: {zero_optimization: {a: 1, b: 2}}\n")
    config = load_config(
        str(path),
        [
            "optimizer.weight_decay=1e-1",
            "train.max_steps=1e3",
            "eval.prompt=def f(x): y",
            "deepspeed.zero_optimization.b=3",
            "model.vocab_size=null",
            "deepspeed.c=1.5e3",
            "deepspeed.d=1..5e3",
        ],
    )
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.train.max_steps) == (2e-3, 0.1, 1000)
    assert config.eval.prompt == "def f(x): y" and config.model.vocab_size is None
    assert config.deepspeed == {"zero_optimization": {"a": 1, "b": 3}, "c": 1500.0, "d": "1..5e3"}


def test_resolved_config_reads_back_the_same(tmp_path):
    config = load_config(None, ["model.family=llama", "optimizer.lr=3e-4", "deepspeed.bf16.enabled=false"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_that_come_along_are_valid(path):
    config = load_config(str(path))
    assert set(yaml.safe_load(path.read_text())) <= set(asdict(Config()))
    deepspeed_config(config, world_size=1)


def test_every_key_is_documented():
    assert all(name in list_keys() and key.doc for name, key in KEYS.items())


def test_global_batch_is_kept_by_accumulation_or_refused():
    config = load_config(None, ["train.micro_batch_size=4", "train.global_batch_size=32"])
    assert [accumulation_steps(config, ranks) for ranks in (1, 2, 8)] == [8, 4, 1]
    with pytest.raises(UserError, match="train.micro_batch_size=4 × 3 ranks: try train.global_batch_size=36"):
        accumulation_steps(config, 3)


def test_deepspeed_section_is_merged_but_may_not_contradict():
    config = load_config(None, ["deepspeed.zero_optimization.reduce_scatter=false", "train.zero_stage=1"])
    made = deepspeed_config(config, 2)
    assert made["zero_optimization"] == {"stage": 1, "reduce_scatter": False} and made["zero_allow_untested_optimizer"]
    with pytest.raises(UserError, match="deepspeed.gradient_clipping is set from train.grad_clip"):
        deepspeed_config(load_config(None, ["deepspeed.gradient_clipping=2"]), 2)


@pytest.mark.parametrize(
    "raw, instead",
    [
        (["train.zero_stage=0", "deepspeed.fp16.enabled=true"], "deepspeed.fp16.enabled is set from train.precision"),
        (
            ["train.precision=fp16", "deepspeed.zero_optimization.stage=0"],
            "zero_optimization.stage is set from train.zero_stage",
        ),
        (["train.precision=bf16", "deepspeed.bf16.enabled=false"], "deepspeed.bf16.enabled is set from train.precision"),
        (["deepspeed.bfloat16.enabled=true"], "deepspeed.bfloat16 is set from train.precision"),
        (["deepspeed.bf16=true"], "deepspeed.bf16=True: must be a mapping, and bf16.enabled is set from train.precision"),
        (["deepspeed.zero_optimization=null"], "deepspeed.zero_optimization=None: must be a mapping"),
    ],
)
def test_stage_and_precision_are_not_set_behind_the_checkpoints_back(raw, instead):
    with pytest.raises(UserError, match=instead):
        deepspeed_config(load_config(None, raw), 1)
    others = ["train.precision=fp16", "deepspeed.fp16.initial_scale_power=8", "deepspeed.bf16.check_grad_overflow=false"]
    made = deepspeed_config(load_config(None, others), 1)
    assert made["fp16"] == {"enabled": True, "initial_scale_power": 8}
    assert made["bf16"] == {"enabled": False, "check_grad_overflow": False}


@pytest.mark.parametrize(
    "raw, message",
    [
        (
            "deepspeed.zero_optimization.overlap_com=true",
            "deepspeed.zero_optimization: DeepSpeed can't read it: overlap_com=True: Extra inputs are not permitted; its keys",
        ),
        ("deepspeed.zero_optimization.offload_optimizer.device=gpu", "offload_optimizer.device='gpu': Input should be 'none'"),
        ("deepspeed.fp16.loss_scale_window=x", "deepspeed.fp16: DeepSpeed can't read it: loss_scale_window='x'"),
        ("deepspeed.flops_profiler=true", "deepspeed.flops_profiler: DeepSpeed can't read it"),
        ("deepspeed.amp.enabled=true", "deepspeed.amp: DeepSpeed can't read it: NVIDIA Apex"),
        (
            "deepspeed.gradient_allreduce_op=sum",
            "gradient_allreduce_op: DeepSpeed can't read it: gradient_allreduce_op='sum' is not",
        ),
    ],
)
def test_what_deepspeed_cannot_read_is_refused_before_it_is_built(raw, message):
    good = ["deepspeed.zero_optimization.reduce_scatter=false", "deepspeed.wall_clock_breakdown=false"]
    for ranks in (1, 4):
        deepspeed_config(load_config(None, [*good, "train.zero_stage=3"]), ranks)
        with pytest.raises(UserError) as error:
            deepspeed_config(load_config(None, [*good, "train.zero_stage=3", raw]), ranks)
        assert message in str(error.value) and len(str(error.value).splitlines()) == 1, error.value


def test_fp16_without_zero_is_refused_as_deepspeed_gets_it_wrong():
    config = load_config(None, ["train.precision=fp16", "train.zero_stage=0"])
    with pytest.raises(UserError, match="train.zero_stage=1"):
        deepspeed_config(config, 1)
    assert deepspeed_config(load_config(None, ["train.precision=fp16", "train.zero_stage=1"]), 1)["fp16"]["enabled"]


def test_a_config_of_the_project_is_found_from_any_folder_unless_one_of_that_name_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/tiny_cpu.yaml", []).model.layers == 4
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny_cpu.yaml").write_text("model: {layers: 3}")
    assert load_config("configs/tiny_cpu.yaml", []).model.layers == 3
    with pytest.raises(UserError, match="does not exist"):
        load_config("tiny_cpu.yaml", [])
