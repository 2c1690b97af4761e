"""`Celo2` keeps the promises of a torch optimizer."""

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.optimizer.matrices.param_groups import TAG, Tag
from celo2_pretrain.optimizer.matrices.views import MatrixView
from celo2_pretrain.optimizer.step.exchange import Exchange


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.LayerNorm(11), nn.Linear(11, 3)).to(dtype)


def backward(net: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).to(next(net.parameters()).dtype)
    loss = net(x).square().mean()
    loss.backward()
    return loss


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for k in steps:
        optimizer.zero_grad()
        backward(net, k)
        optimizer.step()


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("orthogonalize", [True, False])
def test_it_trains(orthogonalize):
    net = model()
    optimizer = Celo2(net.parameters(), lr=1e-3, adamw_lr_multiplier=5.0, orthogonalize=orthogonalize)
    before = backward(net, 0).item()
    train(net, optimizer, range(60))
    assert backward(net, 0).item() < 0.3 * before


def test_default_rules_by_dimension():
    net = model()
    assert [(g["rule"], len(g["params"])) for g in Celo2(net.parameters()).param_groups] == [("celo2", 2), ("adamw", 4)]
    base = Celo2(net.named_parameters(), orthogonalize=False)
    assert [(g["rule"], len(g["params"])) for g in base.param_groups] == [("celo2", 2), ("celo2", 4)]
    explicit = Celo2([{"params": net.parameters(), "rule": "adamw", "lr": 0.5}])
    assert [(g["rule"], len(g["params"]), g["lr"]) for g in explicit.param_groups] == [("adamw", 6, 0.5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adamw_rule_is_torch_adamw(dtype):
    ours, theirs = model(dtype=dtype), model()
    theirs.load_state_dict({k: v.float() for k, v in ours.state_dict().items()})
    a = Celo2([{"params": ours.parameters(), "rule": "adamw", "weight_decay": 0.1}], lr=1e-3, adamw_lr_multiplier=4.0)
    b = torch.optim.AdamW(theirs.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for k in range(5):
        backward(ours, k)
        for p, q in zip(ours.parameters(), theirs.parameters()):
            q.grad = p.grad.float()
            q.data.copy_(p.data.float())
        a.step(), b.step()
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(
                p.detach(), q.detach().to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-7
            )
        a.zero_grad()


def test_bf16_parameters_have_float32_states_that_survive_saving():
    net = model(dtype=torch.bfloat16)
    optimizer = Celo2(net.parameters(), lr=1e-2)
    train(net, optimizer, range(3))
    assert all(x.dtype == torch.float32 for s in optimizer.state.values() for x in s.values())
    other = copy.deepcopy(net)
    restored = Celo2(other.parameters(), lr=1.0)
    restored.load_state_dict(optimizer.state_dict())
    train(net, optimizer, range(3, 6))
    train(other, restored, range(3, 6))
    assert same(weights(net), weights(other))


@pytest.mark.parametrize("orthogonalize", [True, False])
def test_bf16_states_have_half_the_size_and_go_on_bit_for_bit(orthogonalize):
    net = model()
    optimizer = Celo2(net.parameters(), lr=1e-2, orthogonalize=orthogonalize, state_dtype="bf16")
    train(net, optimizer, range(3))
    state = optimizer.state[net[0].weight]
    assert {state[key].dtype for key in ("momentum_0", "momentum_1", "momentum_2", "rms")} == {torch.bfloat16}
    other = copy.deepcopy(net)
    restored = Celo2(other.parameters(), lr=1e-2, orthogonalize=orthogonalize, state_dtype="bf16")
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(3, 6))
    train(other, restored, range(3, 6))
    assert same(weights(net), weights(other))
    exact = model()
    train(exact, Celo2(exact.parameters(), lr=1e-2, orthogonalize=orthogonalize), range(6))
    assert not same(weights(net), weights(exact))
    assert (weights(net)[0] - weights(exact)[0]).abs().max() < 0.02


@pytest.mark.parametrize("orthogonalize", [True, False])
def test_a_saved_state_goes_on_bit_for_bit(orthogonalize):
    net = model()
    optimizer = Celo2(net.parameters(), lr=1e-2, orthogonalize=orthogonalize, weight_decay=0.1)
    train(net, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = model(seed=1)
    other.load_state_dict(saved["model"])
    restored = Celo2(other.parameters(), lr=9.0, orthogonalize=orthogonalize)
    restored.load_state_dict(saved["optimizer"])
    train(net, optimizer, range(4, 8))
    train(other, restored, range(4, 8))
    assert same(weights(net), weights(other))


def test_a_state_of_another_model_is_refused():
    optimizer = Celo2(model().parameters())
    with pytest.raises(ValueError, match="construct it as when the state was saved"):
        Celo2(nn.Linear(3, 3).parameters()).load_state_dict(optimizer.state_dict())


def test_a_restored_run_keeps_its_theta(caplog):
    net = model()
    random = {k: torch.randn_like(v) for k, v in Celo2(net.parameters()).mlp._asdict().items()}
    saved = Celo2(net.parameters(), weights=random).state_dict()
    restored = Celo2(net.parameters())
    with caplog.at_level(logging.WARNING):
        restored.load_state_dict(saved)
    assert all(torch.equal(random[k], v) for k, v in restored.mlp._asdict().items())
    assert "other weights (theta)" in caplog.text


def test_schedulers_and_closures():
    net = model()
    optimizer = Celo2(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)

    def closure():
        optimizer.zero_grad()
        return backward(net, 0)

    start = weights(net)
    assert optimizer.step(closure).requires_grad
    first = (weights(net)[0] - start[0]).square().mean().sqrt().item()
    scheduler.step()
    middle = weights(net)
    optimizer.step(closure)
    second = (weights(net)[0] - middle[0]).square().mean().sqrt().item()
    assert first == pytest.approx(1e-2, rel=1e-4) and second == pytest.approx(5e-3, rel=1e-4)  # a step has RMS 1


def test_parameters_without_gradient_stay_and_do_not_disturb():
    net, twin = model(), model()
    optimizer, reference = Celo2(net.parameters(), lr=1e-2), Celo2([twin[0].weight], lr=1e-2)
    for k in range(3):
        optimizer.zero_grad(), twin.zero_grad()
        backward(net, k)
        twin[0].weight.grad = net[0].weight.grad.clone()
        for p in net.parameters():
            if p is not net[0].weight:
                p.grad = None
        optimizer.step(), reference.step()
    assert torch.equal(net[0].weight, twin[0].weight)
    assert same(weights(net)[1:], weights(model())[1:])


def test_parameters_added_later_and_frozen_ones():
    net = model()
    net[0].requires_grad_(False)
    optimizer = Celo2(net[2].parameters(), lr=1e-2)
    train(net, optimizer, range(2))
    optimizer.add_param_group({"params": list(net[3].named_parameters()), "lr": 1e-3})
    before = weights(net)
    train(net, optimizer, range(2, 4))
    after = weights(net)
    assert same(before[:2], after[:2]) and not any(torch.equal(a, b) for a, b in zip(before[2:], after[2:]))
    assert [g["rule"] for g in optimizer.param_groups] == ["adamw", "celo2", "adamw"]


def test_a_parameter_that_lies_transposed_in_memory():
    base = torch.randn(7, 5)
    p, q = nn.Parameter(base.clone()), nn.Parameter(base.t().contiguous().t())
    assert not q.is_contiguous()
    a, b = Celo2([p], lr=1e-2), Celo2([q], lr=1e-2)
    for k in range(3):
        p.grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(k))
        q.grad = p.grad.clone()
        a.step(), b.step()
    assert torch.equal(p, q)


def test_the_gradient_is_left_as_it_was():
    p = nn.Parameter(torch.randn(4, 3))
    p.grad = grad = torch.randn(4, 3) * 1e4
    kept = grad.clone()
    Celo2([p]).step()
    assert p.grad is grad and torch.equal(grad, kept)


@pytest.mark.parametrize("bucket_size", [1, 50, 1 << 25])
def test_the_bucket_size_changes_nothing(bucket_size):
    net, twin = model(), model()
    train(net, Celo2(net.parameters(), bucket_size=bucket_size), range(3))
    train(twin, Celo2(twin.parameters()), range(3))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(net), weights(twin)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad, caplog):
    for nonfinite in ("error", "skip"):
        net = model()
        optimizer = Celo2(net.named_parameters(), lr=1e-2, nonfinite=nonfinite)
        train(net, optimizer, range(2))
        before, state = weights(net), copy.deepcopy(optimizer.state_dict()["state"])
        backward(net, 9)
        net[3].weight.grad[1, 2] = bad
        if nonfinite == "error":
            with pytest.raises(FloatingPointError, match="3.weight"):
                optimizer.step()
        else:
            with caplog.at_level(logging.WARNING):
                optimizer.step()
            assert "3.weight" in caplog.text and optimizer.skipped_steps == 1
        assert same(before, weights(net))
        after = optimizer.state_dict()["state"]
        assert all(torch.equal(state[i][k], after[i][k]) for i in state for k in state[i])


@pytest.mark.parametrize(
    "arguments,word",
    [
        (dict(lr=-1.0), "lr must be"),
        (dict(lr=float("nan")), "lr must be"),
        (dict(weight_decay=-0.1), "weight_decay"),
        (dict(adamw_betas=(0.9, 1.0)), "adamw_betas"),
        (dict(state_dtype="fp4"), "state_dtype"),
        (dict(nonfinite="hope"), "nonfinite"),
        (dict(bucket_size=0), "bucket_size"),
        (dict(weights="no/such/file.safetensors"), "no/such/file"),
    ],
)
def test_bad_arguments_are_refused_with_their_value(arguments, word):
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        Celo2(model().parameters(), **arguments)


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="'sgd'"):
        Celo2([{"params": model().parameters(), "rule": "sgd"}])
    with pytest.raises(TypeError, match="str"):
        Celo2(["weight"])
    with pytest.raises(TypeError, match="list, not a set"):
        Celo2(set(model().parameters()))
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Celo2(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_an_optimizer_can_be_copied():
    net = model()
    optimizer = Celo2(net.parameters(), lr=1e-2)
    train(net, optimizer, range(2))
    pair = copy.deepcopy((net, optimizer))
    train(net, optimizer, range(2, 4))
    train(*pair, range(2, 4))
    assert same(weights(net), weights(pair[0]))


def test_a_pickle_of_an_earlier_version_goes_on():
    net = model()
    optimizer = Celo2(net.parameters(), lr=1e-2)
    train(net, optimizer, range(2))
    state = optimizer.__getstate__()
    for key in ("_user_groups", "_accepted_keys", "_sorted", "_made", "_told_untagged"):
        del state[key]
    restored = Celo2.__new__(Celo2)
    restored.__setstate__(state)
    train(net, restored, range(2, 4))
    assert [len(groups) for groups in restored.user_groups] == [1, 1]


def test_a_pickle_that_names_modules_of_earlier_versions_is_read():
    net = model()
    optimizer = Celo2(param_groups(net), lr=1e-2)
    train(net, optimizer, range(2))
    text = pickle.dumps((net, optimizer), protocol=0)  # names modules in plain text
    for now, before in (
        (b"matrices.param_groups", b"rules"),
        (b"matrices.views", b"views"),
        (b"sharding.layouts", b"layouts"),
    ):
        assert now in text
        text = text.replace(b"celo2_pretrain.optimizer." + now, b"celo2_pretrain.optimizer." + before)
    pair = pickle.loads(text)
    train(net, optimizer, range(2, 4))
    train(*pair, range(2, 4))
    assert same(weights(net), weights(pair[0]))


def test_matrices_spread_over_the_cores_take_the_same_step():
    """With several threads each core orthogonalises matrices of its own; the caller's thread count is left as it was."""

    def weights(threads: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        matrices = [nn.Parameter(torch.randn(5 + k, 9)) for k in range(7)]
        optimizer = Celo2(matrices, lr=1e-2)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                for p in matrices:
                    p.grad = torch.randn_like(p)
                optimizer.step()
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        return matrices

    for one, three in zip(weights(1), weights(3)):
        torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-6)


def test_a_fast_adamw_is_told_once_with_what_to_set(caplog):
    def warnings():
        return [record.message for record in caplog.records if "adamw_lr_multiplier" in record.message]

    net = model()
    for lr, options in ((1e-3, {}), (3e-3, {"adamw_lr_multiplier": 6.67}), (3e-3, {"orthogonalize": False})):
        train(net, Celo2(net.parameters(), lr=lr, **options), range(1))  # 20 x 1e-3 is the paper's; Celo2-base has no AdamW
    assert not warnings()
    train(net, Celo2(net.parameters(), lr=3e-3), range(2))
    (message,) = warnings()
    assert "0.003 x 20 = 0.06" in message and "set adamw_lr_multiplier to 6.67 or less" in message
    caplog.clear()
    optimizer = Celo2(net.parameters(), lr=1e-4)
    train(net, optimizer, range(1))
    assert not warnings()
    for group in optimizer.param_groups:
        group["lr"] = 2e-3  # as a schedule does
    train(net, optimizer, range(2))
    assert len(warnings()) == 1


def test_a_step_without_any_gradient_is_told_once(caplog):
    p = nn.Parameter(torch.randn(3, 3))
    optimizer = Celo2([p])
    with caplog.at_level(logging.WARNING):
        optimizer.step()
        optimizer.step()
    assert caplog.text.count("no tensor of this optimizer has a gradient") == 1
    caplog.clear()
    p.grad = torch.randn(3, 3)
    optimizer.step()
    assert "gradient" not in caplog.text


def test_matrices_in_batches_are_orthogonalised_as_one_by_one(monkeypatch):
    """What a GPU does, on the CPU: shapes that share a batch lie both ways round, and some are stacked."""

    def steps() -> list[torch.Tensor]:
        generator, params = torch.Generator().manual_seed(0), []
        for k, shape in enumerate([(7, 13), (13, 7), (13, 13), (3, 5, 9), (7, 13), (9, 5), (1, 4), (2, 3, 9, 5)]):
            params.append(nn.Parameter(torch.randn(shape, generator=generator)))
            setattr(
                params[-1], TAG, Tag(f"p{k}", "hidden", "celo2", MatrixView(transpose=k == 4, batch=max(0, len(shape) - 2)))
            )
        optimizer = Celo2([{"params": params, "rule": "celo2"}], lr=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return [p.detach() for p in params]

    expected = steps()
    monkeypatch.setattr(Exchange, "_batched", True)
    for ours, twin in zip(steps(), expected, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5)


def test_a_step_inside_torch_compile_is_the_plain_step():
    p, q = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(7))
    twins = [nn.Parameter(x.detach().clone()) for x in (p, q)]
    ours, theirs = Celo2([p, q], lr=0.1), Celo2(twins, lr=0.1)
    step = torch.compile(lambda: ours.step(), backend="eager")
    for _ in range(2):
        for x, twin in zip((p, q), twins):
            x.grad = torch.randn_like(x)
            twin.grad = x.grad.clone()
        step()
        theirs.step()
    assert same([p, q], twins)


def test_hooks_around_loading_run_as_torchs_do():
    net = model()
    optimizer = Celo2(net.parameters())
    train(net, optimizer, range(1))
    saved = optimizer.state_dict()
    seen, other = [], Celo2(net.parameters())

    def rename(opt, state):  # a hook may give another state dict
        seen.append(("before", len(state["state"]), len(opt.state), "theta" in state))
        return {**state, "param_groups": [{**group, "lr": 0.25} for group in state["param_groups"]]}

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(lambda opt: seen.append(("after", len(opt.state), opt.param_groups[0]["lr"])))
    other.load_state_dict(saved)
    assert seen == [("before", 6, 0, True), ("after", 6, 0.25)]
    assert all(torch.equal(other.state[p]["rms"], optimizer.state[p]["rms"]) for p in net.parameters() if p.ndim == 2)
    other.load_state_dict(saved)
    assert len(seen) == 4  # once a load
    assert saved["param_groups"][0]["lr"] != 0.25


def test_an_optimizer_can_be_made_before_there_is_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for where in (torch.device("meta"), FakeTensorMode()):
        with where:
            net = nn.Sequential(nn.Linear(6, 11), nn.LayerNorm(11))
            inside = Celo2(net.parameters())
        assert [g["rule"] for g in Celo2(net.parameters()).param_groups] == [g["rule"] for g in inside.param_groups]
        assert type(inside.mlp.w0) is torch.Tensor and inside.mlp.w0.device.type == "cpu"
