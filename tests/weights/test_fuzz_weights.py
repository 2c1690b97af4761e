"""Whatever lies in a file of weights: it gives finite weights of the right shapes, or is refused in a line."""

import io
import struct

import msgpack
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from celo2_pretrain.weights import load_weights
from celo2_pretrain.weights.layouts import GROUPS, SHAPES

from support.fuzz import cases, snapshot, spoiled_trees, spoilers, works_or_refuses

ARRAYS = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in SHAPES.items()}


def flax(arrays: dict[str, torch.Tensor]) -> bytes:
    def pack(array):
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes("C"))))

    parts = {f"w0__{k}": part.numpy() for k, part in enumerate(arrays["w0"].split(GROUPS))}
    leaves = parts | {name: array.numpy() for name, array in arrays.items() if name != "w0"}
    return msgpack.packb({"ff_mod_stack": {"~": leaves}}, default=pack, strict_types=True)


def torch_file(arrays: dict[str, torch.Tensor], zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(arrays, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FILES = {
    "a.safetensors": safetensors.torch.save(ARRAYS),
    "a.state": flax(ARRAYS),
    "zip.pt": torch_file(ARRAYS),
    "old.pt": torch_file(ARRAYS, zipped=False),
}


def check(path) -> None:
    def call():
        mlp = load_weights(path)
        assert all(
            tuple(tensor.shape) == SHAPES[name] and tensor.dtype == torch.float32 and tensor.isfinite().all()
            for name, tensor in mlp._asdict().items()
        )

    works_or_refuses(call, ValueError, FileNotFoundError)


@pytest.fixture
def folder(tmp_path):
    """A folder in a folder: nothing but the file itself changes."""
    inner = tmp_path / "inner"
    inner.mkdir()
    yield inner
    assert list(snapshot(tmp_path, leave_out=("inner",))) == []


@pytest.mark.parametrize("name", FILES)
def test_whole_files_load(folder, name):
    (folder / name).write_bytes(FILES[name])
    assert all(torch.equal(a, b) for a, b in zip(load_weights(folder / name), ARRAYS.values()))


@pytest.mark.parametrize("name", FILES)
def test_a_spoiled_file_is_used_or_refused(folder, name):
    @cases(600)
    @given(st.lists(spoilers(), min_size=1, max_size=3))
    def spoiled(spoils):
        data = FILES[name]
        for change in spoils:
            data = change(data)
        (folder / name).write_bytes(data)
        check(folder / name)

    spoiled()
    assert [path.name for path in folder.iterdir()] == [name]


def test_any_safetensors_header_is_used_or_refused(folder):
    """Well-formed files whose header lies: lengths, shapes, dtypes, offsets, names."""
    import json

    size = struct.unpack("<Q", FILES["a.safetensors"][:8])[0]
    header, rest = json.loads(FILES["a.safetensors"][8 : 8 + size]), FILES["a.safetensors"][8 + size :]

    @cases(800)
    @given(spoiled_trees(header), st.one_of(st.none(), st.integers(0, 2**64 - 1)))
    def lying(tree, length):
        text = json.dumps(tree).encode()
        (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + rest)
        check(folder / "a.safetensors")

    lying()


def odd_arrays():
    shapes = st.lists(st.integers(0, 9), max_size=4) | st.sampled_from([(30, 8), (8,), (8, 8), (8, 3), (3,), (8, 30)])
    dtypes = st.sampled_from(["float32", "float64", "float16", "int32", "bool", "complex64", "uint8"])
    fills = st.sampled_from([0.0, 1.0, float("nan"), float("inf"), 1e300, -0.0])

    def make(shape, dtype, fill):
        with np.errstate(all="ignore"):
            return np.full(shape, fill).astype(dtype)

    return st.builds(make, shapes, dtypes, fills)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".msgpack", "dict"])
def test_other_arrays_are_used_or_refused(folder, suffix):
    """Right files of wrong things."""
    names = st.sampled_from([*SHAPES, "w0__0", "first_layer.weight", "w0.0", "x\ny", ""])

    @cases(300)
    @given(st.dictionaries(names, odd_arrays(), max_size=4), st.booleans())
    def other(arrays, added):
        tree = (ARRAYS if added else {}) | {name: torch.from_numpy(array) for name, array in arrays.items()}
        path = folder / f"a{suffix}"
        if suffix == "dict":
            return check(tree)
        if suffix == ".pt":
            torch.save(tree, path)
        elif suffix == ".safetensors":
            safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tree.items()}, path)
        else:
            path.write_bytes(
                msgpack.packb(
                    {
                        name: msgpack.ExtType(
                            1, msgpack.packb((tensor.shape, tensor.numpy().dtype.name, tensor.numpy().tobytes()))
                        )
                        for name, tensor in tree.items()
                    }
                )
            )
        check(path)

    other()
