"""Weights load from every published format, and anything else is refused with a line that says why."""

import os
import pickle
from pathlib import Path

import msgpack
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from celo2_pretrain.optimizer import reference
from celo2_pretrain.weights import construct, load_weights, save_weights
from celo2_pretrain.weights.layouts import GROUPS, SHAPES
from celo2_pretrain.weights.mlp import MLP


@pytest.fixture
def mlp() -> MLP:
    generator = torch.Generator().manual_seed(0)
    return MLP(*(torch.randn(shape, generator=generator) for shape in SHAPES.values()))


def assert_equal(loaded: MLP, expected: MLP) -> None:
    assert isinstance(loaded, MLP)
    for name, got, want in zip(SHAPES, loaded, expected):
        assert got.dtype == torch.float32 and got.is_contiguous() and got.device.type == "cpu"
        assert torch.equal(got, want), name


def fails(weights, *words: str, error=ValueError) -> None:
    with pytest.raises(error) as info:
        load_weights(weights)
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# --- the formats as their authors write them ----------------------------------------


def flax_bytes(tree) -> bytes:
    """What flax.serialization.to_bytes writes: arrays as extension 1 of (shape, dtype name, bytes)."""

    def default(array):
        array = np.asarray(array)
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes("C"))))

    return msgpack.packb(tree, default=default, strict_types=True)


def theta(mlp: MLP) -> dict:
    """The authors' meta-parameters: w0 split by feature group."""
    parts = {f"w0__{i}": part.numpy() for i, part in enumerate(mlp.w0.split(GROUPS))}
    return {"ff_mod_stack": {"~": {**parts, **{k: v.numpy() for k, v in mlp._asdict().items() if k != "w0"}}}}


def pylo(mlp: MLP) -> dict:
    """`nn.Linear` layers, (out, in)."""
    arrays = {
        "first_layer.weight": mlp.w0.T,
        "first_layer.bias": mlp.b0,
        "hidden.weight": mlp.w1.T,
        "hidden.bias": mlp.b1,
        "output.weight": mlp.w2.T,
        "output.bias": mlp.b2,
    }
    return {name: array.contiguous() for name, array in arrays.items()}


def pylo_grouped(mlp: MLP) -> dict:
    arrays = pylo(mlp)
    parts = arrays.pop("first_layer.weight").split(GROUPS, dim=1)
    arrays["first_layer_bias"] = arrays.pop("first_layer.bias")
    return {**arrays, **{f"first_layer_weights.{i}": part.contiguous() for i, part in enumerate(parts)}}


def pylo_parameter_lists(mlp: MLP) -> dict:
    parts = {f"w0.{i}": part.contiguous() for i, part in enumerate(mlp.w0.split(GROUPS))}
    return {**parts, "b0": mlp.b0, "dense_w.0": mlp.w1, "dense_b.0": mlp.b1, "dense_w.1": mlp.w2, "dense_b.1": mlp.b2}


def test_saved_weights_load_bit_for_bit(mlp, tmp_path):
    save_weights(mlp, tmp_path / "new" / "celo2.safetensors", {"steps": 3})
    assert_equal(load_weights(tmp_path / "new" / "celo2.safetensors"), mlp)
    assert_equal(load_weights(str(tmp_path / "new")), mlp)  # a folder, by the file's published name
    assert os.listdir(tmp_path / "new") == ["celo2.safetensors"]
    with safetensors.safe_open(tmp_path / "new" / "celo2.safetensors", "pt") as file:
        assert file.metadata() == {"celo2": '{"steps": 3}'}


@pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.numpy(), lambda t: t.double(), lambda t: t.tolist()])
def test_dicts_of_tensors_arrays_and_lists_load(mlp, convert):
    assert_equal(load_weights({name: convert(t) for name, t in mlp._asdict().items()}), mlp)


def test_an_mlp_loads_as_a_copy(mlp):
    loaded = load_weights(mlp)
    assert_equal(loaded, mlp)
    loaded.w0.zero_()
    assert mlp.w0.any()


@pytest.mark.parametrize("suffix", [".state", ".msgpack"])
def test_the_authors_flax_checkpoint_loads(mlp, tmp_path, suffix):
    path = tmp_path / f"theta{suffix}"
    path.write_bytes(flax_bytes(theta(mlp)))
    assert_equal(load_weights(path), mlp)


@pytest.mark.parametrize("layout", [pylo, pylo_grouped, pylo_parameter_lists])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_pylo_checkpoints_load(mlp, tmp_path, layout, suffix):
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pt" else safetensors.torch.save_file)(layout(mlp), path)
    assert_equal(load_weights(path), mlp)


def test_pylo_layers_compute_what_the_loaded_mlp_computes(mlp, tmp_path):
    """Guards the transposes, which the square hidden layer would hide: a real nn.Sequential against the reference."""
    net = torch.nn.ModuleDict(
        {"first_layer": torch.nn.Linear(30, 8), "hidden": torch.nn.Linear(8, 8), "output": torch.nn.Linear(8, 3)}
    )
    torch.save(net.state_dict(), tmp_path / "celo2_weights.pt")
    x = torch.randn(30, 5, 4)
    with torch.no_grad():
        h = net["first_layer"](x.movedim(0, -1)).relu()
        expected = net["output"](net["hidden"](h).relu())[..., 0]
    torch.testing.assert_close(reference.direction(x, load_weights(tmp_path / "celo2_weights.pt")), expected)


def test_the_published_weights_load_from_their_parts(golden):
    """The reference trajectories carry the published weights: they load from the authors' file layout unchanged."""
    published = MLP(*(torch.from_numpy(golden[f"celo2_official/theta/{name}"]) for name in SHAPES))
    assert_equal(load_weights(theta(published)["ff_mod_stack"]["~"]), published)


# --- bundled weights ----------------------------------------


def test_construct_reproduces_its_files_bit_for_bit(tmp_path):
    written = construct.write(tmp_path)
    assert [path.name for path in written] == ["constructed.safetensors", "constructed_base.safetensors"]
    for path in written:
        assert path.read_bytes() == (Path(construct.__file__).parent / path.name).read_bytes()


@pytest.mark.parametrize("features", [15, 30])  # 1-D tensors have the first 15
@pytest.mark.parametrize(
    "name, formula", [("constructed", lambda x: x[3] + 0.2 * x[0]), ("constructed-base", lambda x: x[7] + 0.2 * x[14])]
)
def test_constructed_weights_compute_their_formula(name, formula, features):
    x = torch.randn(features, 7, 5)
    torch.testing.assert_close(reference.direction(x, load_weights(name)), formula(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0, 1.7, -0.5])
def test_what_is_above_one_counts_by_the_slope(slope):
    features = torch.randn(30, 7, 5, generator=torch.Generator().manual_seed(0))
    mlp = construct.construct({3: 0.9, 7: -1.1, 28: 0.4}, slope)
    x = 0.9 * features[3] - 1.1 * features[7] + 0.4 * features[28]
    assert 0.1 < (x.abs() > 1).float().mean() < 0.9
    torch.testing.assert_close(
        reference.direction(features, mlp), x.clamp(-1, 1) + slope * (x - x.clamp(-1, 1)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "name, orthogonalize", [("default", True), ("default-base", False), ("constructed", True), ("constructed-base", False)]
)
@pytest.mark.parametrize("shape", [(6, 4), (9,)])
def test_bundled_weights_step_against_the_gradient(name, orthogonalize, shape):
    p, g = torch.randn(shape), torch.randn(shape)
    step, _ = reference.step(p, g, reference.init_state(p), load_weights(name), orthogonalize)
    assert torch.allclose(step.square().mean().sqrt(), torch.tensor(1.0), atol=1e-3)
    assert (step * g).sum() > 0


# --- the hub ----------------------------------------------------------------------------------------------------------


def hub(monkeypatch, answer):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)


def hub_error(name):
    from huggingface_hub import errors

    kind = getattr(errors, name)
    return kind.__new__(kind, "no")  # not __init__, which wants an HTTP response for some kinds


def test_a_hub_repo_gives_the_known_file_it_holds_at_the_revision(mlp, tmp_path, monkeypatch):
    (tmp_path / "theta.state").write_bytes(flax_bytes(theta(mlp)))
    asked = []

    def download(repo, file, revision=None, local_files_only=False):
        asked.append((repo, file, revision))
        if file != "theta.state":
            raise hub_error("EntryNotFoundError")
        return str(tmp_path / file)

    hub(monkeypatch, download)
    assert_equal(load_weights("someone/celo2@v1.0"), mlp)
    assert asked[-1] == ("someone/celo2", "theta.state", "v1.0")


def test_a_cached_hub_repo_loads_offline(mlp, tmp_path, monkeypatch):
    (tmp_path / "theta.state").write_bytes(flax_bytes(theta(mlp)))

    def download(repo, file, revision=None, local_files_only=False):
        if not local_files_only or file != "theta.state":
            raise hub_error("LocalEntryNotFoundError")
        return str(tmp_path / file)

    hub(monkeypatch, download)
    assert_equal(load_weights("someone/celo2"), mlp)


@pytest.mark.parametrize(
    "error, words",
    [
        ("LocalEntryNotFoundError", "can't be reached"),
        ("EntryNotFoundError", "holds none of"),
        ("RepositoryNotFoundError", "no such repo"),
        ("RevisionNotFoundError", "no such repo or revision"),
    ],
)
def test_hub_failures_name_the_repo_and_the_reason(monkeypatch, error, words):
    def download(*_, **__):
        raise hub_error(error)

    hub(monkeypatch, download)
    fails("someone/celo2", "someone/celo2", words, error=FileNotFoundError)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_missing_and_extra_keys_are_named(mlp):
    arrays = mlp._asdict()
    del arrays["b1"]
    fails({**arrays, "lstm": torch.zeros(2)}, "lacks b1", "unexpected lstm", "expected", "w0, w1, w2")


def test_another_models_checkpoint_is_refused_in_one_short_line(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({f"layers.{i}.weight": torch.zeros(2) for i in range(100)}, path)
    with pytest.raises(ValueError, match="100 in all") as info:
        load_weights(path)
    assert len(str(info.value)) < 500


@pytest.mark.parametrize(
    "change, words",
    [
        ({"w0": torch.zeros(15, 8)}, ("w0", "(15, 8)", "(30, 8)")),
        ({"b2": torch.zeros(3, 1)}, ("b2", "(3, 1)", "(3,)")),
        ({"w1": torch.full((8, 8), float("nan"))}, ("w1", "64 NaN")),
        ({"b0": torch.tensor([float("inf")] + [0.0] * 7)}, ("b0", "1 NaN or infinite")),
        ({"b0": torch.zeros(8, dtype=torch.int64)}, ("b0", "int64", "float")),
        ({"b0": "eight"}, ("b0", "str")),
        ({"b0": object()}, ("b0", "object")),
        ({"b0": [[1.0], [1.0, 2.0]]}, ("b0", "list")),
    ],
)
def test_wrong_arrays_are_refused_by_key(mlp, change, words):
    fails({**mlp._asdict(), **change}, *words)


def test_a_transposed_pylo_file_is_refused(mlp, tmp_path):
    arrays = pylo(mlp)
    arrays["first_layer.weight"] = arrays["first_layer.weight"].T.contiguous()
    torch.save(arrays, tmp_path / "weights.pt")
    fails(tmp_path / "weights.pt", "first_layer.weight", "(30, 8)", "(8, 30)")


def test_wrong_flax_parts_are_refused_by_their_own_name(mlp, tmp_path):
    tree = theta(mlp)
    tree["ff_mod_stack"]["~"]["w0__3"] = np.zeros((1, 8), np.float32)
    (tmp_path / "theta.state").write_bytes(flax_bytes(tree))
    fails(tmp_path / "theta.state", "w0__3", "(1, 8)", "(3, 8)")


def test_another_learned_optimizers_theta_is_refused(mlp, tmp_path):
    (tmp_path / "theta.state").write_bytes(flax_bytes({**theta(mlp), "rnn_params": {"w": np.zeros(3, np.float32)}}))
    fails(tmp_path / "theta.state", "unexpected rnn_params/w;")


@pytest.mark.parametrize(
    "tree, words",
    [
        ([1, 2], ("list", "expected")),
        ({"w0": msgpack.ExtType(2, b"xx")}, ("extension 2",)),
        ({"w0": np.zeros(3, np.int32)}, ("int32", "float")),
        ({"w0": msgpack.ExtType(1, msgpack.packb(((3,), "object", b"x" * 24)))}, ("object", "float")),
        ({"w0": msgpack.ExtType(1, msgpack.packb(((9, 9), "float32", b"x" * 8)))}, ("no complete flax",)),
        ({"w0": msgpack.ExtType(1, msgpack.packb(7))}, ("no complete flax",)),
        ({}, ("lacks",)),
    ],
)
def test_other_msgpack_is_refused(tmp_path, tree, words):
    (tmp_path / "theta.state").write_bytes(flax_bytes(tree))
    fails(tmp_path / "theta.state", "theta.state", *words)


@pytest.mark.parametrize(
    "name, write",
    [
        ("a.safetensors", lambda mlp, path: save_weights(mlp, path, {})),
        ("a.state", lambda mlp, path: path.write_bytes(flax_bytes(theta(mlp)))),
        ("a.pt", lambda mlp, path: torch.save(pylo(mlp), path)),
    ],
)
@pytest.mark.parametrize("keep", [0, 1, 9, 0.5, 0.99])
def test_truncated_files_are_refused_by_name(mlp, tmp_path, name, write, keep):
    path = tmp_path / name
    write(mlp, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    fails(path, str(path), "empty" if keep == 0 else str(path))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    "save", [lambda obj, path: torch.save(obj, path), lambda obj, path: path.write_bytes(pickle.dumps(obj))]
)
def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"w0": Evil()}, tmp_path / "weights.pt")
    fails(tmp_path / "weights.pt", "refusing to unpickle", "weights.pt")
    assert not (tmp_path / "pwned").exists()


def test_a_torch_file_of_something_else_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "weights.pt")
    fails(tmp_path / "weights.pt", "Tensor", "state dict")


@pytest.mark.parametrize("name, words", [("theta.pickle", "refusing to unpickle"), ("weights.bin", "'.bin'")])
def test_unknown_suffixes_are_refused_with_the_known_ones(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"x")
    fails(tmp_path / name, words, ".safetensors", ".state", ".pt")


def test_absent_files_and_folders_without_weights_are_not_taken_for_hub_repos(tmp_path, monkeypatch):
    hub(monkeypatch, lambda *_, **__: pytest.fail("asked the hub"))
    for absent in ("defualt", "runs/weights.safetensors", str(tmp_path / "nothing" / "here"), "./a/b"):
        fails(absent, "no weights file", error=FileNotFoundError)
    fails(tmp_path, "holds none of", error=FileNotFoundError)


@pytest.mark.parametrize("weights", [None, 3, [1.0]])
def test_other_types_are_refused(weights):
    fails(weights, type(weights).__name__, "expected")


def test_saving_is_whole_or_not_at_all(mlp, tmp_path, monkeypatch):
    path = tmp_path / "celo2.safetensors"
    save_weights(mlp, path, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="w0 has shape"):
        save_weights(mlp._replace(w0=torch.zeros(3)), path, {})
    with pytest.raises(ValueError, match=".safetensors"):
        save_weights(mlp, tmp_path / "weights.pt", {})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_weights(mlp._replace(b0=torch.ones(8)), path, {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
