"""What a kernel costs on a GPU, found by compiling it ahead of time: registers, spills, bytes for each element.

Works on any machine: Triton brings the assemblers of NVIDIA's and AMD's targets with it. Bytes are counted in Triton's
GPU code (after all its optimisations) from the loads and stores and the loops around them. A load or store of a whole
tile is *streamed* (each byte once from or to memory); the others (vectors, weights, tables, partial sums) are *shared*
by neighbouring programs or repeated in a loop, and mostly served by the caches.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import (
    accumulate,
    adamw,
    apply,
    direction,
    factored,
    flat,
    fold,
    norms,
    one_dim,
    repack,
    rescale,
    symmetric_product,
    tiles,
)
from .tiles import OPTIONS, Size

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
STATES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp8": tl.int32}  # of accumulators
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
TABLES = {"tiles": "*i32", "boxes": "*i64", "pointers": "*i64"}
CHUNKS = {"chunks": "*i32", "slices": "*i64"}
VECTORS = {"matrices": "*i64", "vectors": "*i64"}
ONE_DIM = {"table": "*i64"}


@dataclass
class Kernel:
    """A kernel with the arguments that it is compiled for."""

    name: str
    function: Any
    signature: dict[str, str]  # of what isn't a constant
    constants: dict[str, Any]
    elements: int = 0  # of one program; 0: not a pass over elements
    rounds: int = 1  # of a loop whose number of rounds the code doesn't say, at most
    bound: int = 0  # streamed bytes for an element, at the least
    options: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()  # arguments that Triton is told to be multiples of 16


@dataclass
class Resources:
    """`registers` of a thread, `spilled` bytes of a thread, and bytes for each element of a tile."""

    registers: int
    spilled: int
    streamed: float
    shared: float


def kernels(dtype: str, aligned: bool, amd: bool = False, states: str = "fp32") -> list[Kernel]:
    """The kernels of a step, as launched for parameters and gradients of `dtype`, accumulators of `states`."""
    size, wide = Size(), WIDTHS[dtype]
    four = 4 if states == "fp8" else 4 * WIDTHS[states]  # bytes of the accumulators of an element
    short = {"BLOCK": one_dim.BLOCK}
    place = {"ALIGNED": aligned, "ROWS": size.rows, "COLS": size.cols}
    g = {**place, "G": DTYPES[dtype], "S": STATES[states]}
    gp = {**g, "P": DTYPES[dtype]}
    tile = size.rows * size.cols
    sums = {"order": "*i32", "targets": "*i64", "pointers": "*i64", "scratch": "*fp32"}
    return [
        Kernel(
            "accumulate",
            accumulate.accumulate_kernel,
            {**TABLES, "row_sums": "*fp32", "col_sums": "*fp32"},
            {**g, "STEP": accumulate.STEP},
            tile,
            size.rows // accumulate.STEP,
            wide + (0 if states == "fp8" else 2 * four),
        ),
        Kernel(
            "repack",
            repack.repack_kernel,
            dict(TABLES),
            {**place, "G": DTYPES[dtype], "STEP": repack.STEP},
            tile,
            size.rows // repack.STEP,
            wide + 8,
        ),
        Kernel(
            "norms",
            norms.norms_kernel,
            {**TABLES, "squares": "*fp32"},
            {**gp, "STEP": norms.STEP},
            tile,
            size.rows // norms.STEP,
            four + 2 * wide,
        ),
        Kernel(
            "direction",
            direction.direction_kernel,
            {**TABLES, "theta": "*fp32"},
            {**gp, "STEP": direction.STEP},
            tile,
            size.rows // direction.STEP,
            4 + four + 2 * wide,
        ),
        Kernel(
            "output_squares",
            rescale.output_squares_kernel,
            {**TABLES, "squares": "*fp32"},
            {**place, "STEP": rescale.STEP},
            tile,
            size.rows // rescale.STEP,
            4,
        ),
        Kernel(
            "rescale",
            rescale.rescale_kernel,
            {**TABLES, "totals": "*i64"},
            {**place, "STEP": rescale.STEP},
            tile,
            size.rows // rescale.STEP,
            8,
        ),
        Kernel(
            "apply",
            apply.apply_kernel,
            {**CHUNKS, **_floats("lr", "weight_decay")},
            {"P": DTYPES[dtype], "ALIGNED": aligned, "BLOCK": flat.BLOCK},
            flat.BLOCK,
            1,
            4 + 2 * wide,
        ),
        Kernel(
            "adamw",
            adamw.adamw_kernel,
            {**CHUNKS, "corrections": "*fp32", **_floats("lr", "beta1", "beta2", "rest1", "rest2", "eps", "weight_decay")},
            {"P": DTYPES[dtype], "G": DTYPES[dtype], "ALIGNED": aligned, "BLOCK": flat.BLOCK},
            flat.BLOCK,
            1,
            16 + 3 * wide,
        ),
        _product(dtype, aligned, amd),
        Kernel(
            "add_sums (vectors)",
            tiles.add_sums_kernel,
            sums,
            {"PITCH": size.cols, "CHUNK": 8, "COUNT": 0, "TARGET": 1, "TARGETS": 2},
        ),
        Kernel(
            "add_sums (matrices)",
            tiles.add_sums_kernel,
            sums,
            {"PITCH": 32, "CHUNK": 64, "COUNT": 18, "TARGET": 0, "TARGETS": 2},
        ),
        Kernel("update_factored", factored.update_factored_kernel, VECTORS, {"BLOCK": factored.BLOCK}),
        Kernel("factors", factored.factors_kernel, VECTORS, {"BLOCK": factored.BLOCK}),
        Kernel("scales", factored.scales_kernel, VECTORS, {"BLOCK": factored.BLOCK}),
        Kernel("accumulate_1d", one_dim.accumulate_1d_kernel, ONE_DIM, {"G": DTYPES[dtype], **short}),
        Kernel("norms_1d", one_dim.norms_1d_kernel, ONE_DIM, {"G": DTYPES[dtype], "P": DTYPES[dtype], **short}),
        Kernel(
            "direction_1d",
            one_dim.direction_1d_kernel,
            {**ONE_DIM, "theta": "*fp32"},
            {"G": DTYPES[dtype], "P": DTYPES[dtype], **short},
        ),
        Kernel("output_squares_1d", one_dim.output_squares_1d_kernel, ONE_DIM, short),
        Kernel("rescale_1d", one_dim.rescale_1d_kernel, ONE_DIM, short),
        Kernel("fold", fold.fold_kernel, {**VECTORS, "theta": "*fp32"}, {"BLOCK": factored.BLOCK}),
    ]


def _floats(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "fp32")


def _product(dtype: str, aligned: bool, amd: bool) -> Kernel:
    kind = getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype])
    block, depth, warps = symmetric_product.sizes(kind, aligned)
    signature = {"x": f"*{dtype}", "out": f"*{dtype}", "n": "i32", "k": "i32", **_floats("scale", "add")}
    return Kernel(
        "symmetric_product",
        symmetric_product.symmetric_product_kernel,
        signature,
        {"ADD": True, "PRECISION": "ieee" if amd else "tf32x3", "BLOCK": block, "DEPTH": depth},
        options={"num_warps": warps},
        aligned=("x", "out", "n", "k") if aligned else ("x", "out"),
    )


def compiled(kernel: Kernel, target: str) -> Any:
    """Triton's compiled kernel, for a target of TARGETS."""
    # Triton wants the arguments in the function's order.
    signature = {name: kernel.signature.get(name, "constexpr") for name in kernel.function.arg_names}
    attributes = {(kernel.function.arg_names.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned}
    return triton.compile(
        ASTSource(kernel.function, signature, kernel.constants, attributes),
        target=TARGETS[target],
        options={**OPTIONS, **kernel.options},
    )


def measure(kernel: Kernel, target: str) -> Resources:
    """Compile a kernel for a target of TARGETS, and read its resources from the result."""
    asm = compiled(kernel, target).asm
    registers, spilled = (_amd if target.startswith("gfx") else _nvidia)(asm)
    if not kernel.elements:
        return Resources(registers, spilled, 0.0, 0.0)
    streamed, shared = traffic(asm["ttgir"], kernel.rounds, 2 if "ROWS" in kernel.constants else 1)
    return Resources(registers, spilled, streamed / kernel.elements, shared / kernel.elements)


def _nvidia(asm: dict[str, Any]) -> tuple[int, int]:
    """From the machine code: registers, and the bytes of local memory that a thread would spill to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        said = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd(asm: dict[str, Any]) -> tuple[int, int]:
    """From the assembly's metadata: vector registers, and the bytes of spilled ones (scalar ones go to vector ones)."""
    found = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", asm["amdgcn"])}
    return found["vgpr_count"], 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])


_LOOP = re.compile(r"scf\.for .* = %c(\d+)_i32\S* to %c(\d+)_i32\S* step %c(\d+)_i32")
_ACCESS = (
    re.compile(r"tt\.(?:load|store) .*: (?:tensor<((?:\d+x)+))?!tt\.ptr<[a-z]+(\d+)>"),
    re.compile(r"amdg\.buffer_(?:load|store) .*tensor<((?:\d+x)+)[a-z]+(\d+)"),
)


def traffic(ttgir: str, unknown: int, dims: int) -> tuple[int, int]:
    """Bytes (streamed, shared) that one program loads and stores, from its GPU code.

    What is streamed has `dims` dimensions. Loops whose number of rounds the code doesn't say count `unknown` times.
    Raises ValueError for loads that it can't read.
    """
    streamed = shared = 0
    rounds: list[int] = []  # of each open brace: how often what is inside runs
    for line in ttgir.splitlines():
        access = next(filter(None, (form.search(line) for form in _ACCESS)), None)
        if access:
            shape = [int(n) for n in (access[1] or "").split("x") if n]
            size = prod(shape) * int(access[2]) // 8 * prod(rounds)
            streamed, shared = (streamed + size, shared) if len(shape) == dims else (streamed, shared + size)
        elif re.search(r"= tt\.load|tt\.store|buffer_(load|store)|async_", line):
            raise ValueError(f"can't tell how much this loads or stores: {line.strip()}")
        inside = 1
        if "scf.for" in line:
            loop = _LOOP.search(line)
            inside = -((int(loop[1]) - int(loop[2])) // int(loop[3])) if loop else unknown
        for brace in re.sub(r"\{[^{}]*\}", "", line):
            if brace == "{":
                rounds.append(inside)
            elif brace == "}":
                rounds.pop()
    return streamed, shared
