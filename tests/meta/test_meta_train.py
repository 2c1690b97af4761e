"""Meta-training: the rule is the specification's, the outer gradients are right, and a resumed run is the same run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy
import pytest
import torch

from celo2_pretrain.cli import main
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.meta import config, estimators, evolution, inner, rule, train
from celo2_pretrain.meta.problems import images, tasks
from celo2_pretrain.optimizer import reference
from celo2_pretrain.weights import construct, load_weights
from celo2_pretrain.weights.files import save_weights

from support.paths import ROOT
from support.processes import environment

EVOLVE = [
    "families=quadratic",
    "problems=3",
    "estimator=evolution",
    "init=constructed",
    "sigma=0.15",
    "truncation=12",
    "length_min=12",
    "length_max=12",
    "population=6",
    "lr_min=1e-2",
    "lr_max=5e-2",
    "save_every=3",
]
SMALL = ["families=quadratic", "problems=3", "truncation=4", "length_min=4", "length_max=20", "save_every=3"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("orthogonalize", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (1, 1), (1, 9), (11,)])
def test_a_meta_trained_step_is_the_specifications(shape, orthogonalize):
    generator = torch.Generator().manual_seed(0)
    mlp = rule.unflatten(rule.random_theta(generator))
    p = torch.randn(shape, generator=generator)
    ours = theirs = reference.init_state(p)
    for _ in range(3):
        g = torch.randn(shape, generator=generator)
        step, ours = rule.step(p, g, ours, mlp, rule.Variant(orthogonalize))
        expected, theirs = reference.step(p, g, theirs, mlp, orthogonalize)
        torch.testing.assert_close(step, expected, rtol=2e-5, atol=2e-5)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize(
    "name", ["quadratic", "transformer", "text", "mlp/digits", "conv/photos", "residual/orientation", "mlp/digits_on_photos"]
)
def test_a_task_is_learned_by_the_bundled_rule(name):
    if "/" in name:
        pytest.importorskip("sklearn", reason="the bundled images need scikit-learn")
        pytest.importorskip("skimage", reason="the bundled images need scikit-image")
    task, generator, n = tasks.make(name), torch.Generator().manual_seed(0), 2
    harness = inner.Harness(adamw=True, schedule="cosine", clip=1.0)
    fixed = inner.Fixed(torch.full((n,), 4e-3), torch.full((n,), 60.0), torch.ones(n))
    problems = inner.start(task, harness, fixed, generator)
    advance = inner.make_advance(task, harness, shared_theta=True)
    theta, losses = rule.flatten(load_weights("default")), []
    with torch.no_grad():
        for _ in range(60):
            problems, loss = advance(theta, problems, task.draw(generator, n))
            losses.append(loss)
    losses = torch.stack(losses)
    assert losses[0].max() < task.cap
    assert (losses[-10:].mean(0) < losses[:5].mean(0) * 0.98).all(), losses[::10]


def test_problems_side_by_side_are_the_problems_one_by_one():
    task, n = tasks.make("quadratic"), 3
    generator = torch.Generator().manual_seed(1)
    thetas = torch.stack([rule.random_theta(generator) for _ in range(n)])
    fixed = inner.Fixed(torch.tensor([1e-3, 1e-2, 3e-2]), torch.tensor([10.0, 20.0, 30.0]), torch.tensor([1.0, 10.0, 0.1]))
    harness = inner.Harness(schedule="cosine", weight_decay=0.1, clip=0.5)
    together = inner.start(task, harness, fixed, generator)
    advance = inner.make_advance(task, harness, shared_theta=False)
    alone = [torch.utils._pytree.tree_map(lambda x: x[k : k + 1], together) for k in range(n)]
    for _ in range(5):
        batch = task.draw(generator, n)
        together, losses = advance(thetas, together, batch)
        for k in range(n):
            alone[k], loss = advance(thetas[k : k + 1], alone[k], tuple(x[k : k + 1] for x in batch))
            torch.testing.assert_close(loss, losses[k : k + 1])
    for k in range(n):
        torch.testing.assert_close(alone[k].params["w"], together.params["w"][k : k + 1], rtol=1e-4, atol=1e-6)


# A dynamical system whose loss is quadratic in theta: the antithetic difference is exact, only the noise is random.
TRUNCATIONS, STEPS, DIM = 3, 2, 5


def _system():
    generator = torch.Generator().manual_seed(2)
    return (
        0.9 * torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0],
        torch.randn(DIM, DIM, generator=generator),
        torch.randn(DIM, generator=generator),
    )


def _unroll(state):
    transition, drive, _ = _system()

    def unroll(theta):
        total = 0
        for _ in range(STEPS):
            state[0] = state[0] @ transition.T + theta @ drive.T
            total = total + 0.5 * state[0].square().sum(-1)
        return total / STEPS

    return unroll


def _exact(theta):
    theta = theta.clone().requires_grad_()
    state = [torch.zeros(DIM)]
    unroll = _unroll(state)
    return torch.autograd.grad(sum(unroll(theta) for _ in range(TRUNCATIONS)), theta)[0]


def _pes(theta, pairs, seed):
    """Each pair's own estimate of the gradient of the sum over the unroll: (pairs, DIM)."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(pairs, DIM)
    for k in range(pairs):
        state, noise = [torch.zeros(2, DIM)], torch.zeros(1, DIM)
        unroll = _unroll(state)
        for _ in range(TRUNCATIONS):
            estimate, noise = estimators.pes(theta, noise, 0.01, unroll, generator)
            out[k] += estimate.gradient
    return out


def test_pes_is_unbiased_and_its_variance_falls_as_one_over_n():
    theta = _system()[2]
    exact, each = _exact(theta), _pes(theta, 4000, seed=0)
    error = (each.mean(0) - exact) / (each.std(0) / len(each) ** 0.5)
    assert error.abs().max() < 4, error
    assert (each.std(0) / len(each) ** 0.5).max() < 0.2 * exact.abs().max()  # or unbiased would say nothing
    variances = [each.view(-1, n, DIM).mean(1).var(0).mean() for n in (1, 10, 100)]
    assert variances[0] / variances[1] == pytest.approx(10, rel=0.35)
    assert variances[0] / variances[2] == pytest.approx(100, rel=0.6)


def test_pes_of_many_pairs_is_the_mean_of_the_pairs():
    theta, n = _system()[2], 8
    state, noise = [torch.zeros(2 * n, DIM)], torch.zeros(n, DIM)
    generator, unroll, total = torch.Generator().manual_seed(3), _unroll(state), 0
    for _ in range(TRUNCATIONS):
        estimate, noise = estimators.pes(theta, noise, 0.01, unroll, generator)
        total = total + estimate.gradient
    generator, fresh = torch.Generator().manual_seed(3), []
    for _ in range(TRUNCATIONS):
        fresh.append(torch.randn(n, DIM, generator=generator) * 0.01)
    expected = 0
    for k in range(n):
        state = [torch.zeros(2, DIM)]
        unroll = _unroll(state)
        for t in range(TRUNCATIONS):
            plus, minus = unroll(torch.stack([theta + fresh[t][k], theta - fresh[t][k]]))
            expected = expected + sum(fresh[: t + 1])[k] * (plus - minus) / (2 * 0.01**2) / n
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-3)


def test_back_propagation_gives_the_exact_gradient_of_a_truncation():
    theta = _system()[2]
    state = [torch.ones(4, DIM)]
    estimate = estimators.analytic(theta, _unroll(state))
    direct = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(_unroll([torch.ones(4, DIM)])(direct).mean(), direct)
    torch.testing.assert_close(estimate.gradient, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_particle_counts_for_nothing_and_is_named(bad):
    theta = torch.zeros(DIM)
    unroll = lambda thetas: thetas.sum(-1).index_fill(0, torch.tensor([4]), bad)
    estimate, _ = estimators.pes(theta, torch.zeros(3, DIM), 0.01, unroll, torch.Generator().manual_seed(0))
    assert estimate.broken.tolist() == [False, True, False]
    assert estimate.gradient.isfinite().all() and estimate.loss.isfinite()
    estimate = estimators.analytic(theta, lambda theta: torch.stack([theta.sum(), theta.sum() * bad]))
    assert estimate.broken.any() and estimate.gradient.isfinite().all()


def test_a_broken_problem_starts_afresh():
    training = train.MetaTraining(config.load_config(None, SMALL))
    family = training.families[0]
    family.inner.params["w"][1] = float("nan")
    family.inner.fixed.length[:] = 1000
    record = training.advance()
    assert record["broken"] == 1
    assert family.inner.params["w"].isfinite().all()
    assert family.inner.step.tolist() == [4, 0, 4] * 2  # the other particle of the pair begins with it
    assert (family.noise[1] == 0).all() and (family.noise[0] != 0).any()


@pytest.mark.parametrize("estimator", ["pes", "analytic"])
def test_a_resumed_meta_training_is_the_uninterrupted_one(tmp_path, estimator):
    options = [*SMALL, f"estimator={estimator}", "average=0.9", "init=constructed", "live_units=0.1"]
    whole = train.run(config.load_config(None, [*options, "outer_steps=8", f"out={tmp_path / 'whole'}"]))
    train.run(config.load_config(None, [*options, "outer_steps=5", f"out={tmp_path / 'parts'}"]))
    with open(tmp_path / "parts" / train.METRICS, "a") as log:
        log.write('{"step": 6, "loss"')  # it was killed while writing
    assert main(["meta-train", "--resume", str(tmp_path / "parts"), "outer_steps=8"]) in (0, None)
    parts = tmp_path / "parts" / whole.name
    assert parts.read_bytes() is not None
    for a, b in zip(load_weights(whole), load_weights(parts)):
        assert torch.equal(a, b)
    read = lambda name: [json.loads(line) for line in (tmp_path / name / train.METRICS).read_text().splitlines()]
    for a, b in zip(read("whole"), read("parts"), strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    assert [record["step"] for record in read("parts")] == list(range(1, 9))
    assert (tmp_path / "parts/meta_loss.png").read_bytes().startswith(b"\x89PNG")


def test_live_units_change_nothing_at_first_and_can_learn():
    plain, live = (
        train.initial_theta(config.load_config(None, ["init=constructed", f"live_units={noise}"])) for noise in (0, 0.1)
    )
    x = torch.randn(30, 6, 5)
    torch.testing.assert_close(reference.direction(x, rule.unflatten(plain)), reference.direction(x, rule.unflatten(live)))
    for theta, moving in ((plain, 2), (live, 8)):
        theta = theta.clone().requires_grad_()
        reference.direction(x, rule.unflatten(theta)).square().sum().backward()
        assert int((rule.unflatten(theta.grad).w2[:, 0] != 0).sum()) == moving


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["outer_lr"], "not of the form key=value"),
        (["outer_rate=1"], "unknown key 'outer_rate'; did you mean"),
        (["estimator=es"], "must be one of pes, analytic, evolution"),
        (["length_min=300", "length_max=200"], "exchange them"),
        (["truncation=5000"], "above length_max"),
        (["families="], "families is empty"),
        (["sigma=0"], "sigma=0"),
        (["outer_lr=[1,"], "not valid YAML"),
        (["seed=" + "9" * 5000], "too large"),
    ],
)
def test_a_wrong_configuration_is_told_at_the_door(arguments, message):
    with pytest.raises(UserError, match=message):
        config.load_config(None, arguments)


@pytest.mark.multiprocess
def test_a_rule_of_another_width_is_trained_and_deployed(tmp_path):
    """As docs/meta_training.md says: edit DIMS, meta-train, and step with the plain-torch passes."""
    root = ROOT
    shutil.copytree(
        root / "celo2_pretrain", tmp_path / "celo2_pretrain", ignore=shutil.ignore_patterns("__pycache__", "kernels")
    )
    shutil.copytree(root / "kernels", tmp_path / "celo2_pretrain/kernels", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "celo2_pretrain/weights/mlp.py"
    source = path.read_text()
    assert source.count("DIMS = (FEATURES_ND, 8, 8, 3)") == 1
    path.write_text(source.replace("DIMS = (FEATURES_ND, 8, 8, 3)", "DIMS = (FEATURES_ND, 12, 10, 3)"))
    (tmp_path / "deploy.py").write_text(
        "import torch\n"
        "from celo2_pretrain import Celo2, cli\n"
        "from celo2_pretrain.optimizer import reference\n"
        f"options = {SMALL!r} + ['outer_steps=1', 'out=m']\n"
        "assert cli.main(['meta-train', *options]) in (0, None)\n"
        "p = torch.nn.Parameter(torch.randn(7, 5))\n"
        "before, p.grad = p.detach().clone(), torch.randn(7, 5)\n"
        "optimizer = Celo2([p], lr=1e-2, weights='m/theta_000001.safetensors')\n"
        "optimizer.step()\n"
        "step, _ = reference.step(before, p.grad, reference.init_state(before), optimizer.mlp)\n"
        "torch.testing.assert_close(p.detach(), before - 1e-2 * step, rtol=1e-5, atol=1e-6)\n"
        "print([tuple(w.shape) for w in optimizer.mlp])\n"
    )

    def deploy(backend: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "deploy.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=1500,
            env=environment(PYTHONPATH=str(tmp_path), CELO2_BACKEND=backend),
        )

    done = deploy("auto")
    assert done.returncode == 0, done.stderr
    assert "[(30, 12), (12,), (12, 10), (10,), (10, 3), (3,)]" in done.stdout
    shutil.rmtree(tmp_path / "m")
    assert "the rule has (30, 12, 10): set CELO2_BACKEND=reference" in deploy("compile").stderr


def test_the_defaults_are_the_papers_recipe():
    paper = config.load_config(None, [])
    assert (paper.estimator, paper.truncation, paper.sigma, paper.length_min, paper.length_max) == ("pes", 50, 0.01, 100, 2000)
    assert (len(paper.family_names), paper.problems, {name.partition("/")[0] for name in paper.family_names}) == (
        4,
        8,
        {"mlp"},
    )
    assert (paper.lr_min, paper.lr_max, paper.schedule, paper.scale_min, paper.scale_max) == (
        1e-3,
        1e-3,
        "constant",
        1e-3,
        1e3,
    )
    assert (paper.outer_lr, paper.outer_clip, paper.init, paper.orthogonalize) == (5e-5, 1.0, "random", True)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_augmentation_is_another_scale_of_the_parameters_for_the_same_problem(scale):
    task, n, losses = tasks.make("quadratic"), 2, []
    for s in (1.0, scale):
        generator = torch.Generator().manual_seed(4)
        fixed = inner.Fixed(torch.full((n,), 1e-3), torch.full((n,), 50.0), torch.full((n,), s))
        problems = inner.start(task, inner.Harness(), fixed, generator)
        theta = rule.random_theta(torch.Generator().manual_seed(5))
        _, loss = inner.make_advance(task, inner.Harness(), shared_theta=True)(theta, problems, task.draw(generator, n))
        losses.append((problems.params["w"], loss))
    (plain, loss), (scaled, same) = losses
    torch.testing.assert_close(scaled * scale, plain)
    torch.testing.assert_close(same, loss)


@pytest.mark.parametrize("name, size, image, label", [("mnist", 28, "image", "label"), ("cifar10", 32, "img", "label")])
def test_the_papers_images_come_through_datasets(name, size, image, label, monkeypatch):
    datasets, pillow = pytest.importorskip("datasets"), pytest.importorskip("PIL.Image")
    mode = "RGB" if name == "cifar10" else "L"
    pictures = [pillow.new(mode, (size, size), (shade,) * 3 if mode == "RGB" else shade) for shade in (0, 255, 255)]
    rows = datasets.Dataset.from_dict(
        {image: pictures, label: [3, 9, 0]},
        features=datasets.Features({image: datasets.Image(), label: datasets.Value("int64")}),
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: asked.append((arguments, options)) or rows)
    images.load.cache_clear()
    try:
        loaded = images.load(name)
    finally:
        images.load.cache_clear()
    assert asked == [((images.HUB[name][0], None), {"split": "train"})]
    assert loaded.x.shape == (3, 64) and loaded.y.tolist() == [3, 9, 0]
    assert loaded.x.mean().abs() < 1e-5 and loaded.x.std() == pytest.approx(1, abs=1e-5)
    assert loaded.x[0].max() < 0 < loaded.x[1].min()  # dark and bright are still that


def test_without_a_network_the_papers_images_are_told_in_a_line(monkeypatch, capsys, tmp_path):
    datasets = pytest.importorskip("datasets")

    def offline(*arguments, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    images.load.cache_clear()
    assert main(["meta-train", "families=mlp/svhn", f"out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'svhn' is ufldl-stanford/svhn on the Hugging Face hub" in error
    assert "offline, use digits" in error


def test_an_unknown_family_lists_those_there_are():
    with pytest.raises(UserError, match="no task family 'mpl/digits'; there are mlp/SET"):
        tasks.make("mpl/digits")
    with pytest.raises(UserError, match="no image set 'digit'; there are digits"):
        tasks.make("mlp/digit")


def test_missing_packages_and_devices_are_told_in_one_line(monkeypatch, capsys, tmp_path):
    images.load.cache_clear()
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    assert main(["meta-train", "families=mlp/digits", f"out={tmp_path / 'a'}"]) == 2
    assert "scikit-learn, which isn't installed: pip install 'celo2-pretrain[meta]'" in capsys.readouterr().err
    assert main(["meta-train", "families=quadratic", "init=nowhere.safetensors", f"out={tmp_path / 'b'}"]) == 2
    assert "nowhere.safetensors" in capsys.readouterr().err
    assert main(["meta-train", "families=quadratic", "device=gpu", f"out={tmp_path / 'c'}"]) == 2
    assert "device=gpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # nothing is left behind that a second try would trip over


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    options = [*SMALL, "outer_steps=1", f"out={tmp_path}"]
    train.run(config.load_config(None, options))
    with pytest.raises(UserError, match="--resume goes on with it"):
        train.run(config.load_config(None, options))
    assert main(["meta-train", "--resume", str(tmp_path), "outer_lr=1"]) == 2


def test_the_best_theta_is_selected_on_a_language_model(tmp_path):
    pytest.importorskip("sklearn", reason="select shares the evaluation's tasks")
    train.run(config.load_config(None, [*SMALL, "outer_steps=3", "init=random", f"out={tmp_path}"]))
    assert main(["meta-select", str(tmp_path), "--also", "default", "--steps", "12", "--seeds", "3", "--jobs", "1"]) in (
        0,
        None,
    )
    scores = (tmp_path / "selection.csv").read_text().splitlines()
    assert len(scores) == 1 + 2 * 2 * 3  # header; two thetas, two rates, three seeds
    assert main(["meta-select", str(tmp_path / "nowhere")]) == 2
    assert main(["meta-select", str(tmp_path), "--lrs", "1e-3,0"]) == 2
    for option in ("--every", "--steps", "--seeds", "--jobs"):
        assert main(["meta-select", str(tmp_path), option, "0"]) == 2


def test_an_unroll_of_one_truncation_is_one_truncation_long():
    training = train.MetaTraining(
        config.load_config(None, ["families=quadratic", "truncation=100", "length_min=100", "length_max=100", "problems=8"])
    )
    assert (training.families[0].inner.fixed.length == 100).all()


def test_every_candidate_trains_the_same_problems():
    """Twice the same theta, twice the same losses; and those of a population are those of each candidate alone."""
    setup = config.load_config(None, EVOLVE)
    thetas = torch.stack(
        [rule.flatten(load_weights(name)) for name in ("constructed", "constructed-base", "constructed")]
        + [rule.random_theta(torch.Generator().manual_seed(k)) for k in range(3)]
    )
    whole = evolution.Family("quadratic", setup, 5).evaluate(thetas)
    torch.testing.assert_close(whole[0], whole[2], rtol=1e-6, atol=0)
    assert not torch.allclose(whole[0], whole[1], rtol=1e-4)
    for k, theta in enumerate(thetas):
        alone = evolution.Family("quadratic", setup, 5).evaluate(theta.repeat(6, 1))
        torch.testing.assert_close(alone, whole[k].repeat(6, 1), rtol=1e-4, atol=1e-6)
    family = evolution.Family("quadratic", setup, 5)
    assert not torch.equal(family.evaluate(thetas), family.evaluate(thetas))  # fresh problems in each generation


def test_each_problem_has_one_vote():
    inf, nan = float("inf"), float("nan")
    losses = torch.tensor([[1.0, 1e9, 3.0], [2.0, 2e9, 3.0], [3.0, 3e9, nan], [inf, 4e9, inf]])
    assert evolution.mean_rank(losses).tolist() == [0.5 / 3, (1 + 1 + 0.5) / 3, (2 + 2 + 2.5) / 3, (3 + 3 + 2.5) / 3]


def test_evolution_finds_what_its_problems_ask_for(tmp_path):
    """From the slowest momentum, which ends twelve steps badly, 40 generations on noisy quadratics lead away."""
    pytest.importorskip("cma")
    slow = tmp_path / "slow.safetensors"
    save_weights(construct.construct({5: 1.0}), slow, {})
    with pytest.raises(UserError, match="without a momentum that remembers more than the 12 steps"):
        evolution.Evolution(config.load_config(None, [*EVOLVE, f"init={slow}"]))
    search = evolution.Evolution(config.load_config(None, [*EVOLVE, f"init={slow}", "long_momenta=true"]))
    begin, x = search.mlp(), torch.randn(30, 4, 5)
    torch.testing.assert_close(reference.direction(x, begin), 0.5 * x[5])
    for _ in range(40):
        record = search.advance()
    assert record["step"] == 40 and record["inner_steps"] == 40 * 6 * 3 * 12 and record["broken"] == 0
    judge = evolution.Family("quadratic", config.load_config(None, [*EVOLVE, "problems=32"]), 77)
    losses = judge.evaluate(torch.stack([rule.flatten(mlp) for mlp in 3 * [begin, search.mlp()]]))
    differ = (losses[1] / losses[0] - 1).abs() > 0.01  # the others' noise hides what a rule does
    assert differ.float().mean() > 0.3 and (losses[1] < losses[0])[differ].float().mean() > 0.9


def test_evolution_looks_at_momenta_that_its_trainings_are_long_enough_for():
    assert evolution.searched(2000) == construct.ODD
    assert set(construct.ODD) - set(evolution.searched(999)) == {5, 9, 29}  # 0.999, in the order of reference.features
    assert set(construct.ODD) - set(evolution.searched(99)) == {4, 5, 8, 9, 28, 29}
    assert set(construct.ODD) - set(evolution.searched(9)) == {3, 4, 5, 7, 8, 9, 27, 28, 29}


def test_evolution_goes_on_from_what_it_has_made(tmp_path):
    pytest.importorskip("cma")
    made = train.run(config.load_config(None, [*EVOLVE, "outer_steps=2", f"out={tmp_path}"]))
    search = evolution.Evolution(config.load_config(None, [*EVOLVE, f"init={made}"]))
    for a, b in zip(search.mlp(), load_weights(made)):
        assert torch.equal(a, b)


def test_a_resumed_evolution_is_the_uninterrupted_one(tmp_path):
    pytest.importorskip("cma")
    whole = train.run(config.load_config(None, [*EVOLVE, "outer_steps=7", f"out={tmp_path / 'whole'}"]))
    train.run(config.load_config(None, [*EVOLVE, "outer_steps=3", f"out={tmp_path / 'parts'}"]))
    torch.randn(5), numpy.random.rand(5)  # what others draw changes nothing
    assert main(["meta-train", "--resume", str(tmp_path / "parts"), "outer_steps=7"]) in (0, None)
    for a, b in zip(load_weights(whole), load_weights(tmp_path / "parts" / whole.name)):
        assert torch.equal(a, b)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / train.METRICS).read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["init=default"], "begins with a constructed rule .constructed, constructed-base, or what an evolution has made"),
        (["init=random"], "init=random: evolution begins with a constructed rule"),
        (["init=nowhere.safetensors"], "init=nowhere.safetensors: no weights file"),
        (["length_max=40"], "length_min=12, length_max=40, truncation=12: evolution judges whole trainings"),
        (["population=3"], "population=3"),
    ],
)
def test_evolution_is_refused_where_it_has_no_meaning(arguments, message):
    with pytest.raises(UserError, match=message):
        evolution.Evolution(config.load_config(None, [*EVOLVE, *arguments]))
