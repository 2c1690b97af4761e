"""Celo2 takes over a running AdamW run, from any DeepSpeed checkpoint, and AdamW takes it back."""

import shutil
from pathlib import Path

import pytest
import torch
from test_state import ROUND_OFF, difference, launch
from torch.nn.functional import cross_entropy

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.optimizer.state.adamw_checkpoint import _scheduled_peak
from celo2_pretrain.optimizer.state.files import StateReader
from celo2_pretrain.optimizer.state.save_load import StateError, load_state, save_state
from celo2_pretrain.optimizer.state.takeover import describe, from_adamw, to_adamw
from celo2_pretrain.optimizer.step.accumulators import element_keys

from support.state_worker import batch, build, celo2

BETAS = (0.9, 0.999)  # torch's default, which the worker's AdamW runs with
STAGES = ((0, "fp32"), (0, "bf16"), (1, "bf16-fp32acc"), (2, "fp32"), (3, "fp32"), (3, "bf16"))


def same_states(a, b, rtol, but=()):
    one, other = StateReader(a), StateReader(b)
    assert one.tensors == other.tensors
    for name, entry in one.tensors.items():
        pairs = [
            (key, one.whole(name, key), other.whole(name, key))
            for key in element_keys(entry["rule"], entry["vector"])
            if key not in but
        ]
        pairs += [(key, one.shared(f"{name}|{key}"), other.shared(f"{name}|{key}")) for key in ("v_row", "v_col", "step")]
        for key, x, y in pairs:
            assert (x is None) == (y is None), (name, key)
            if x is not None:
                assert (x - y).abs().max() <= rtol * x.abs().max(), (name, key)


def named_adamw(model, **options):
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return torch.optim.AdamW(named, weight_decay=0.1, **options)


def feed(model, optimizer, gradients):
    """Steps with given gradients: a list of {name: gradient}."""
    for gradient in gradients:
        for name, param in model.named_parameters():
            param.grad = gradient[name].clone() if param.requires_grad else None
        optimizer.step()


def gradients(steps, constant=False, seed=0):
    torch.manual_seed(seed)
    model = build()
    made = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(1 if constant else steps)]
    return made * steps if constant else made


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.999)])
def test_accumulators_are_what_celo2_would_have_made_of_a_constant_gradient(tmp_path, betas):
    """Where AdamW's and Celo2's averages are of the same thing, the seeded state is Celo2's own, whatever the betas."""
    given = gradients(7, constant=True)
    a, b = build(), build()
    old, own = named_adamw(a, betas=betas), celo2(b)
    feed(a, old, given)
    feed(b, own, given)
    save_state(old, tmp_path / "adamw")
    save_state(own, tmp_path / "own")
    from_adamw(tmp_path / "adamw", tmp_path / "seeded", celo2(build()))
    # Tensors that stay under AdamW keep its own moments, so only equal betas make them equal.
    same_states(
        tmp_path / "own",
        tmp_path / "seeded",
        1e-4,  # decays are float32 in the step
        but=("param", *(("exp_avg", "exp_avg_sq") if betas != (0.9, 0.95) else ())),
    )


def test_a_celo2_run_from_scratch_gives_adamw_the_moments_it_would_have_had(tmp_path):
    given = gradients(5)
    a, b = build(), build()
    old, own = named_adamw(a, betas=(0.9, 0.95)), celo2(b)
    feed(a, old, given)
    feed(b, own, given)
    save_state(old, tmp_path / "adamw")
    save_state(own, tmp_path / "own")
    to_adamw(tmp_path / "own", tmp_path / "back", betas=(0.9, 0.95))
    same_states(tmp_path / "adamw", tmp_path / "back", 1e-5, but=("param",))
    back = named_adamw(build(3), betas=(0.9, 0.95), lr=0.123)
    load_state(back, tmp_path / "back")
    assert back.param_groups[0]["lr"] == 0.123  # a converted state brings no options of the other optimizer


def test_the_other_tensors_keep_adamws_state_exactly(tmp_path):
    a = build()
    old = named_adamw(a)
    feed(a, old, gradients(4))
    save_state(old, tmp_path / "adamw")
    from_adamw(tmp_path / "adamw", tmp_path / "celo2", celo2(build()))
    before, after = StateReader(tmp_path / "adamw"), StateReader(tmp_path / "celo2")
    kept = [name for name, entry in after.tensors.items() if entry["rule"] == "adamw"]
    assert "embed.weight" in kept and "up.bias" in kept
    for name in kept:
        for key in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(before.whole(name, key), after.whole(name, key))
        assert after.shared(f"{name}|step") == 4


def test_the_printed_rates_are_those_of_steps_of_the_same_size(tmp_path, capsys):
    """AdamW's next step with a gradient at its average is RMS update_rms × lr: what `lr` is made of."""
    a = build()
    old = named_adamw(a, lr=3e-3)
    given = gradients(30)
    feed(a, old, given)
    save_state(old, tmp_path / "adamw")
    optimizer = celo2(build())
    rates = from_adamw(tmp_path / "adamw", tmp_path / "celo2", optimizer)
    assert describe(rates) in capsys.readouterr().out
    names = {name for name, entry in StateReader(tmp_path / "celo2").tensors.items() if entry["rule"] == "celo2"}
    states = [old.state[p] for name, p in a.named_parameters() if name in names]
    step = torch.cat(
        [(s["exp_avg"] / (1 - 0.9**30) / ((s["exp_avg_sq"] / (1 - 0.999**30)).sqrt() + 1e-8)).flatten() for s in states]
    )
    assert rates["update_rms"] == pytest.approx(float(step.square().mean().sqrt()), rel=1e-5)
    assert rates["lr"] * rates["adamw_lr_multiplier"] == pytest.approx(3e-3)  # the others go on at AdamW's own rate
    assert load_state(optimizer, tmp_path / "celo2") == {"learning_rates": rates}


def test_the_printed_rates_are_beside_adamws_peak_where_its_rate_has_fallen(tmp_path, capsys):
    a = build()
    old = named_adamw(a, lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(old, lambda step: 1 - step / 10)
    for gradient in gradients(8):
        feed(a, old, [gradient])
        schedule.step()
    save_state(old, tmp_path / "adamw")
    rates = from_adamw(tmp_path / "adamw", tmp_path / "celo2", celo2(build()))
    assert rates["adamw_matrix_lr"] == 3e-3 and rates["adamw_last_lr"] == pytest.approx(6e-4)
    assert rates["lr"] == pytest.approx(3e-3 * rates["update_rms"])
    assert rates["lr"] * rates["adamw_lr_multiplier"] == pytest.approx(3e-3)
    assert "× lr 0.0006 on the matrices" in (said := capsys.readouterr().out) and "AdamW's peak rate of 0.003" in said
    given = from_adamw(tmp_path / "adamw", tmp_path / "given", celo2(build()), peak_lr=6e-3)
    assert given["lr"] == pytest.approx(2 * rates["lr"])
    assert given["adamw_lr_multiplier"] == pytest.approx(rates["adamw_lr_multiplier"])


def test_the_peak_of_deepspeeds_own_scheduler_is_in_its_configuration():
    scheduler = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 2e-3, "warmup_min_lr": 0, "total_num_steps": 10}}
    assert _scheduled_peak({"scheduler": scheduler}) == 2e-3
    assert _scheduled_peak({"scheduler": {"type": "WarmupCosineLR", "params": {}}}) == _scheduled_peak(None) == 0


def test_the_loss_goes_on_falling_after_the_switch(tmp_path):
    def run(model, optimizer, first, last):
        losses = []
        for step in range(first, last):
            ids, _ = batch(step, 0, 1)
            loss = cross_entropy(model(ids), ids * 3 % 11)  # something that can be learned
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = build()
    old = named_adamw(model, lr=3e-3)
    before = run(model, old, 0, 150)
    save_state(old, tmp_path / "adamw")
    model = build(7)
    rates = from_adamw(tmp_path / "adamw", tmp_path / "celo2", celo2(model))
    new = Celo2(param_groups(model, weight_decay=0.1), lr=rates["lr"], adamw_lr_multiplier=rates["adamw_lr_multiplier"])
    load_state(new, tmp_path / "celo2")
    after = run(model, new, 150, 190)
    usual = torch.tensor(before[-40:])
    assert max(after[:10]) < float(usual.max()) * 1.1  # batches differ; no jump above what they range over
    assert sum(after[-20:]) < sum(before[-20:])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """AdamW runs of 3 steps on 2 ranks, saved by DeepSpeed and by save_state, and gone on with for 3 more steps."""
    folder = tmp_path_factory.mktemp("adamw")
    launch(
        2,
        [
            dict(
                kind="ds",
                optimizer="adamw",
                stage=stage,
                precision=precision,
                first=0,
                steps=3,
                more=3,
                ds_save=str(folder / f"{stage} {precision}"),
                save=str(folder / f"{stage} {precision} ours"),
                out=str(folder / f"{stage} {precision}.pt"),
            )
            for stage, precision in STAGES
        ],
    )
    return folder


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("stage, precision", STAGES)
def test_a_deepspeed_checkpoint_of_any_stage_is_read_as_the_live_engine(checkpoints, tmp_path, stage, precision):
    name = f"{stage} {precision}"
    optimizer = Celo2(param_groups(build()))
    from_adamw(checkpoints / name, tmp_path / "file", optimizer)
    from_adamw(checkpoints / f"{name} ours", tmp_path / "engine", optimizer)
    same_states(tmp_path / "file", tmp_path / "engine", 0)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_there_and_back_goes_on_as_if_nothing_had_been(checkpoints, tmp_path):
    """AdamW on 2 ranks → Celo2 → AdamW at another stage, which goes on as the uninterrupted run; Celo2 takes the same
    steps from the taken-over state in every world."""
    from_adamw(checkpoints / "2 fp32", tmp_path / "celo2", celo2(build()))
    to_adamw(tmp_path / "celo2", tmp_path / "back", betas=BETAS)
    common = dict(first=3, steps=3, seed=5)
    launch(
        2,
        [
            dict(
                kind="ds",
                optimizer="adamw",
                stage=stage,
                load=str(tmp_path / "back"),
                out=str(tmp_path / f"{stage}.pt"),
                **common,
            )
            for stage in (1, 3)
        ]
        + [dict(kind="ds", stage=3, load=str(tmp_path / "celo2"), out=str(tmp_path / "celo2 3.pt"), **common)],
    )
    launch(1, [dict(kind="plain", load=str(tmp_path / "celo2"), out=str(tmp_path / "celo2 plain.pt"), **common)])
    for stage in (1, 3):
        assert difference(checkpoints / "2 fp32.pt", tmp_path / f"{stage}.pt") < ROUND_OFF
    assert difference(tmp_path / "celo2 plain.pt", tmp_path / "celo2 3.pt") < ROUND_OFF


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(checkpoints, tmp_path):
    def refused(words, change, optimizer=None, name="2 fp32", **options):
        folder = shutil.copytree(checkpoints / name, tmp_path / "changed")
        change(folder / "here")
        with pytest.raises(StateError, match=words) as caught:
            from_adamw(folder, tmp_path / "out", optimizer or celo2(build()), **options)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("out*"))
        shutil.rmtree(folder)

    def with_class(folder):
        path = folder / "mp_rank_00_model_states.pt"
        torch.save({**torch.load(path), "client": Path()}, path)

    def round_robin(folder):
        for path in folder.glob("zero_pp_rank_*"):
            state = torch.load(path, weights_only=False)
            state["ds_config"]["zero_optimization"]["round_robin_gradients"] = True
            torch.save(state, path)

    other = build()
    other.new = torch.nn.Linear(3, 3)
    refused("lacks the optim_states file of rank 1", lambda f: next(f.glob("zero_pp_rank_1*")).unlink())
    refused("tensor or pipeline", lambda f: (f / "mp_rank_01_model_states.pt").touch())
    refused("no \\*_model_states.pt", lambda f: (f / "mp_rank_00_model_states.pt").unlink())
    refused("has no parameter 'new.weight'", lambda f: None, celo2(other))
    refused("has no checkpoint 'there'", lambda f: None, tag="there")
    refused("not unpickled for safety", with_class)
    refused("round_robin_gradients", round_robin)
    refused("is damaged", lambda f: next(f.glob("zero_pp_rank_1*")).write_bytes(b"PK" + bytes(100)))
    names = [name for name, param in build().named_parameters() if param.requires_grad]
    refused("pass names", lambda f: None, name="0 fp32", names=names[::-1])
    refused("12 names were passed", lambda f: None, name="0 fp32", names=[*names, "frozen.weight"])
    refused("names has 'x'", lambda f: None, name="0 fp32", names=["x", *names[1:]])
    with pytest.raises(StateError, match="no DeepSpeed checkpoint"):
        from_adamw(tmp_path, tmp_path / "out", celo2(build()))


def test_deepspeeds_fused_16_bit_checkpoint_without_zero_is_read(tmp_path):
    """FusedAdam needs a GPU; this is the form in which DeepSpeed's FP16_Optimizer saves it: one flat tensor a group."""
    model = build()
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([("flat", torch.cat([p.detach().flatten() for _, p in params]).requires_grad_())])
    optimizer.param_groups[0]["params"][0].grad = torch.randn(sum(p.numel() for _, p in params))
    optimizer.step()
    flat = optimizer.param_groups[0]["params"][0].detach()
    (tmp_path / "run" / "here").mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("here")
    torch.save(
        {
            "module": model.bfloat16().state_dict(),
            "buffer_names": [],
            "dp_world_size": 1,
            "optimizer": {"optimizer_state_dict": optimizer.state_dict(), "fp32_groups_flat": [flat]},
        },
        tmp_path / "run" / "here" / "mp_rank_00_model_states.pt",
    )
    from_adamw(tmp_path / "run", tmp_path / "celo2", celo2(build(1)))
    reader = StateReader(tmp_path / "celo2")
    assert torch.equal(torch.cat([reader.whole(name, "param").flatten() for name, _ in params]), flat)
    moments = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(reader.read("lm_head.weight", "exp_avg", 0, 77), moments[-77:])


def test_a_celo2_state_is_not_taken_for_adamws(tmp_path):
    model = build()
    optimizer = celo2(model)
    feed(model, optimizer, gradients(1))
    save_state(optimizer, tmp_path / "celo2")
    with pytest.raises(StateError, match="is a Celo2 state already"):
        from_adamw(tmp_path / "celo2", tmp_path / "out", optimizer)
    with pytest.raises(StateError, match="to_adamw convert"):
        load_state(named_adamw(build()), tmp_path / "celo2")
