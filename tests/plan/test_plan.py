"""What `celo2-pretrain plan` predicts is what a running engine holds, and what it prints can be relied on."""

import json
import re

import pytest
import torch

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.cli import main
from celo2_pretrain.common.devices import DEVICES, device
from celo2_pretrain.config import Model, load_config
from celo2_pretrain.model.build import build_model
from celo2_pretrain.model.flops import flops_per_token
from celo2_pretrain.model.loss import training_loss
from celo2_pretrain.plan.activations import LiveBytes, activations
from celo2_pretrain.plan.estimate import estimate, subject
from celo2_pretrain.plan.memory import step_buffers
from celo2_pretrain.plan.report import rank_rows
from celo2_pretrain.plan.shards import groups, newton_schulz_flops

from support.paths import ROOT, SUPPORT
from support.processes import on_ranks

CONFIGS = ROOT / "configs"
TINY = [
    "model.layers=2",
    "model.width=64",
    "model.heads=4",
    "model.context=32",
    "model.vocab_size=256",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
]
ENGINES = {  # what each engine is, beside TINY
    **{
        f"ZeRO-{stage} {precision}": [f"train.zero_stage={stage}", f"train.precision={precision}"]
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    },
    "accumulation": ["train.zero_stage=2", "train.precision=bf16", "train.global_batch_size=8"],
    "fp32 accumulation, ZeRO-1": ["train.zero_stage=1", "train.precision=bf16", "deepspeed.data_types.grad_accum_dtype=fp32"],
    "fp32 accumulation, ZeRO-2": ["train.zero_stage=2", "train.precision=bf16", "deepspeed.data_types.grad_accum_dtype=fp32"],
    "AdamW": ["train.zero_stage=2", "train.precision=bf16", "optimizer.name=adamw"],
    "Celo2-base": ["train.zero_stage=2", "train.precision=bf16", "optimizer.name=celo2_base"],
    "bf16 states": ["train.zero_stage=2", "train.precision=bf16", "optimizer.state_dtype=bf16"],
    "fp8 states": ["train.zero_stage=3", "train.precision=bf16", "optimizer.state_dtype=fp8"],
    "llama": ["train.zero_stage=2", "train.precision=bf16", "model.family=llama", "model.kv_heads=2", "model.tied=false"],
}


def plan_of(overrides: list[str], ranks: int, gpu: str = "h100"):
    planned = subject(load_config(None, overrides))
    return planned, estimate(planned, device(gpu, ranks), ranks)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_gradients_and_states_are_those_of_a_running_engine(ranks, tmp_path):
    cases = {name: [*TINY, "deepspeed.zero_optimization.reduce_bucket_size=1000000", *more] for name, more in ENGINES.items()}
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"out": str(tmp_path), "cases": cases}))
    on_ranks(ranks, SUPPORT / "plan_worker.py", str(job))
    measured = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    for name, overrides in cases.items():
        _, plan = plan_of(overrides, ranks)
        most = {
            (moment, part): max(found[name][moment].get(part, 0) for found in measured)
            for moment in ("backward", "step")
            for part in ("weights", "gradients", "master", "states", "buckets")
        }
        gathered = plan.memory.gathered
        for what, planned, real in [
            ("weights", plan.memory.weights + gathered, most["backward", "weights"]),
            ("weights in the step", plan.memory.weights, most["step", "weights"]),
            ("master", plan.memory.master, most["step", "master"]),
            ("states", plan.memory.states, most["step", "states"]),
            ("gradients in the step", plan.memory.step_gradients, most["step", "gradients"]),
            # ZeRO-1's are reduced before the backward pass returns to the census.
            *([] if "ZeRO-1" in name else [("gradients", plan.memory.gradients, most["backward", "gradients"])]),
        ]:
            assert planned == pytest.approx(real, rel=0.1), f"{name}, {ranks} ranks: {what}"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "family, attention, dtype",
    [
        ("gpt2", "sdpa", torch.float32),
        ("gpt2", "eager", torch.bfloat16),
        ("llama", "sdpa", torch.bfloat16),
        ("llama", "eager", torch.float32),
    ],
)
def test_saved_activations_are_what_autograd_saves(family, attention, dtype, checkpointing):
    layers, context, sequences = 5, 64, 8  # large beside the fixed memory that some CPUs' products in bfloat16 take
    model = (
        build_model(
            Model(
                family=family,
                layers=layers,
                width=64,
                heads=4,
                context=context,
                vocab_size=300,
                attention=attention,
                activation_checkpointing=checkpointing,
            ),
            300,
            0,
        )
        .to(dtype)
        .train()
    )
    windows = torch.randint(0, 300, (sequences, context + 1))
    kept = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), windows]}
    sizes, alive = {}, []

    def save(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in kept:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x.detach())  # or its address could be taken again
        return x

    # A checkpointed block hands no tensor to these hooks but keeps what it is called with.
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    hooks = [block.register_forward_pre_hook(lambda module, args: (save(args[0]), None)[1]) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        loss, _ = training_loss(model, windows)
    for hook in hooks:
        hook.remove()
    precision = "fp32" if dtype == torch.float32 else "bf16"
    planned = activations(model, sequences, context, precision, checkpointing)
    assert planned.saved == pytest.approx(sum(sizes.values()), rel=0.1)
    # The most at a time is measured by torch's own profiler, operators' inner allocations included. Parameters' gradients
    # are another part of the plan.
    alive.clear()
    del loss
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        training_loss(model, windows)[0].backward()
    assert planned.peak == pytest.approx(profiled_peak(profile), rel=0.1)


def profiled_peak(profile) -> int:
    """Most bytes allocated at a time, from the profiler's record of every allocation and release."""
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_activations_are_a_straight_line_in_depth_and_micro_batch():
    overrides = ["model.layers=7", "model.width=64", "model.heads=4", "model.context=32", "model.vocab_size=256"]
    seven = subject(load_config(None, [*overrides, "train.micro_batch_size=2"]))
    assert seven.acts_of(6).saved == pytest.approx(
        subject(load_config(None, [*overrides, "train.micro_batch_size=6", "train.global_batch_size=36"])).acts.saved, rel=0.01
    )


def test_step_buffers_are_what_the_step_allocates():
    model = build_model(Model(layers=4, width=128, heads=4, context=32, vocab_size=256), 256, 0)
    optimizer = Celo2(param_groups(model), bucket_size=1 << 17)
    (learned,) = [g for g in groups(optimizer, 1, 0) if g.rule == "celo2"]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    with LiveBytes() as live:
        live.ignore([x for p in model.parameters() for x in (p, p.grad, *optimizer.state[p].values())])
        optimizer.step()
    assert live.peak < step_buffers(learned.plan(0)) < 3 * live.peak


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flops_are_those_that_torch_counts(family):
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model(
        Model(family=family, layers=3, width=64, heads=4, context=64, vocab_size=256, attention="eager"), 256, 0
    )
    with FlopCounterMode(display=False) as counter:
        training_loss(model, torch.zeros(2, 65, dtype=torch.int64))[0].backward()
    assert flops_per_token(model, 64) == pytest.approx(counter.get_total_flops() / 128, rel=0.01)


@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (128, 512), (2, 512, 128)])
def test_newton_schulz_flops_are_those_that_torch_counts(shape):
    from torch.utils.flop_counter import FlopCounterMode

    from celo2_pretrain.kernels.newton_schulz import COEFFICIENTS, newton_schulz

    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.randn(shape), COEFFICIENTS["celo2"])
    assert newton_schulz_flops(shape) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_every_element_is_held_once_and_owners_are_balanced():
    planned = subject(load_config(str(CONFIGS / "gpt2_124m.yaml"), ["train.micro_batch_size=2"]))
    for stage in (1, 2, 3):
        rows = rank_rows(estimate(planned, device("h100", 8), 8, stage))
        assert sum(row["elements"] for row in rows) == planned.parameters
        work = [row["newton_schulz_flops"] for row in rows]
        assert max(work) < 1.5 * sum(work) / 8


def test_larger_stages_need_less_memory_and_the_largest_micro_batch_just_fits():
    planned = subject(load_config(str(CONFIGS / "gpt3_350m.yaml")))
    plans = [estimate(planned, device("a100-40", 8), 8, stage) for stage in (0, 2)]
    assert plans[0].memory.total > plans[1].memory.total
    largest, context = plans[1].largest_micro_batch, plans[1].device.memory
    for micro, fits in ((largest, True), (largest + 1, False)):
        more = planned.acts_of(micro).peak - planned.acts.peak
        assert (plans[1].memory.total + 1.05 * more <= context) == fits


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("gpt*.yaml")), ids=lambda path: path.stem)
def test_configs_state_the_memory_that_the_plan_finds(path):
    said = re.search(r"Planned: (\d+) GiB on each of (\d+) x (\S+) \(", path.read_text())
    assert said, f"{path.name} doesn't say its memory"
    planned = estimate(subject(load_config(str(path))), device(said[3].lower(), int(said[2])), int(said[2]))
    assert planned.memory.total / 2**30 == pytest.approx(int(said[1]), abs=0.6) and planned.fits


def test_dry_run_of_1_3b_takes_less_than_a_minute_and_fits_100_columns(capsys):
    assert main(["plan", "--config", str(CONFIGS / "gpt3_xl_1.3b.yaml"), "--gpus", "64", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert float(re.search(r"planned in ([\d.]+) s", out)[1]) < 600
    assert "1,315.8 M parameters" in out and "the busiest owner" in out
    assert max(map(len, out.splitlines())) <= 100


def test_json_says_the_same_and_several_cases_are_compared(capsys):
    tiny = ["plan", *TINY, "--gpus", "2"]
    assert main([*tiny, "--json", "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    memory = found["memory_bytes"]
    assert memory["total"] >= memory["backward"] >= memory["weights"] > 0 and len(found["ranks"]) == 2
    assert main([*tiny, "--zero", "1,2", "--gpu", "h100,l4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("h100", "l4")) for line in lines) == 4 and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu", "h1000"], "--gpu h1000: unknown; the known ones are h100"),
        (["--gpus", "eight"], "--gpus eight: must be whole numbers"),
        (["--gpus", "0"], "--gpus 0"),
        (["--zero", "4"], "--zero 4"),
        (["--mfu", "40"], "--mfu 40: must lie above 0"),
        (["--network-gbits", "0"], "--network-gbits"),
        (["model.heads=7"], "not a multiple of model.heads=7"),
        (["--gpus", "3"], "no multiple of train.micro_batch_size=8 × 3 ranks"),
        (["--gpus", "4", "deepspeed.zero_optimization.offload_optimizer.device=cpu"], "offload_optimizer"),
        (["model.from=nowhere/at-all"], "model.from=nowhere/at-all"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("celo2-pretrain: error: ") and message in error


def test_every_device_says_where_its_numbers_are_from():
    assert all(d.source and d.memory > 0 and d.bf16 > d.fp32 > 0 and d.link >= d.network for d in DEVICES.values())
    assert device("cpu", 2).memory == pytest.approx(device("cpu", 1).memory / 2)
