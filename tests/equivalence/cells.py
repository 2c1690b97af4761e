"""Which cells the matrix has, and which of them have no meaning, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product

STAGES = ("zero0", "zero1", "zero2", "zero3", "fsdp2")
PRECISIONS = ("fp32", "bf16", "bf16+fp32acc", "fp16")


@dataclass(frozen=True)
class Cell:
    """One way of training in parallel.

    `extra` names a DeepSpeed option outside the matrix proper that changes the flat layout or how Celo2 is made:
    "round_robin" and "alignment" (`zero_optimization.round_robin_gradients`, `.parameter_alignment`), "buckets"
    (Celo2's own bucket_size so small that every bucket holds one tensor), "config" (the optimizer from the JSON config),
    "bf16_products" (newton_schulz_dtype="bf16", against the same products on whole tensors), "fp8" (packed accumulators,
    in plain torch, against the same rounding on whole tensors).
    """

    stage: str
    precision: str
    accumulation: int = 1
    reduce_scatter: bool = True
    offload: bool = False
    zero_init: bool = False
    extra: str = ""

    @property
    def name(self) -> str:
        """Words joined by commas, as `--filter` takes them: "zero2,bf16,acc4,rs,offload"."""
        words = [self.stage, self.precision, f"acc{self.accumulation}", "rs" if self.reduce_scatter else "allreduce"]
        words += ["offload"] * self.offload + ["init"] * self.zero_init + [self.extra] * bool(self.extra)
        return ",".join(words)

    @property
    def may_be_stale(self) -> bool:
        """Whether DeepSpeed 0.19 hands a parameter without gradient the one of the step before, instead of zeros."""
        return self.stage == "zero3" or self.offload

    @property
    def gradients_from_plain(self) -> bool:
        """Whether the reference is fed the gradients of the plain single process, and momenta aren't compared.

        With round_robin_gradients DeepSpeed 0.19 flattens in another order than its `safe_get_full_*` read.
        """
        return self.extra == "round_robin"

    @property
    def flipped(self) -> bool:
        """Whether orthogonalised and plain param groups change roles: a checkerboard over the cells."""
        return (
            STAGES.index(self.stage)
            + PRECISIONS.index(self.precision)
            + (self.accumulation > 1)
            + self.reduce_scatter
            + self.offload
            + self.zero_init
        ) % 2 == 1

    def invalid(self) -> str:
        """Why the cell has no meaning, in one line; empty where it has one."""
        zero = int(self.stage[-1]) if self.stage.startswith("zero") else None
        if self.zero_init and zero != 3:
            return "zero.Init partitions parameters, which is ZeRO-3"
        if zero == 0:
            if self.precision == "bf16+fp32acc":
                return "DeepSpeed refuses fp32 accumulation of bf16 gradients without ZeRO (unsupported mix of dtypes)"
            if self.precision == "fp16":
                return "DeepSpeed 0.19 divides these gradients by a loss scale that it never multiplied the loss by"
            if self.reduce_scatter:
                return "without ZeRO gradients are always all-reduced"
            if self.offload:
                return "optimizer offload is a part of ZeRO 1-3"
        if zero is None:
            if not self.reduce_scatter:
                return "FSDP2 always reduce-scatters"
            if self.offload:
                return "FSDP2 offloads parameters with the optimizer, which on CPU changes nothing"
        if self.extra == "round_robin" and self.precision != "fp32":
            return "with round_robin_gradients safe_get_full_* read wrong elements; only fp32 has another source"
        if self.extra in ("round_robin", "alignment") and zero not in (1, 2):
            return "an option of ZeRO 1 and 2"
        return ""


def product_cells() -> list[Cell]:
    """The whole product, invalid cells included, in a fixed order."""
    return [Cell(*values) for values in product(STAGES, PRECISIONS, (1, 4), (True, False), (False, True), (False, True))]


def extra_cells() -> list[Cell]:
    """Options outside the product that change the flat layout, or the way the optimizer is made."""
    cells = [
        Cell(stage, precision, 1, True, offload, False, extra)
        for stage in ("zero1", "zero2")
        for precision in ("fp32", "bf16")
        for offload in (False, True)
        for extra in ("round_robin", "alignment")
    ]
    cells += [Cell(stage, "fp32", 1, stage != "zero0", False, False, "buckets") for stage in STAGES]
    cells += [Cell(stage, "bf16", 1, stage != "zero0", False, stage == "zero3", "config") for stage in STAGES[:4]]
    cells += [Cell(stage, "fp32", 1, stage != "zero0", False, False, "bf16_products") for stage in STAGES]
    cells += [Cell(stage, "fp32", 1, stage != "zero0", False, False, "fp8") for stage in STAGES]
    cells += [Cell(stage, "bf16", 4, True, True, stage == "zero3", "fp8") for stage in ("zero2", "zero3")]
    return cells


def valid_cells() -> list[Cell]:
    return [cell for cell in product_cells() + extra_cells() if not cell.invalid()]


def half_of_the_cells() -> list[Cell]:
    """A part of the matrix for a further number of ranks: half of the product, with every pair of settings.

    A cell is taken where the number of its options that are on (accumulation, all-reduce, offload, zero.Init) is
    odd or even by turns of stage and precision; ZeRO 0, FSDP2 and the extra cells are taken whole.
    """

    def taken(cell: Cell) -> bool:
        if cell.extra or cell.stage in ("zero0", "fsdp2"):
            return True
        on = (cell.accumulation > 1) + (not cell.reduce_scatter) + cell.offload + cell.zero_init
        return (on + STAGES.index(cell.stage) + PRECISIONS.index(cell.precision)) % 2 == 0

    return [cell for cell in valid_cells() if taken(cell)]


def pairs(cells: list[Cell]) -> set[tuple[str, str]]:
    """Any two settings that occur together in one of the cells."""
    return {pair for cell in cells for pair in product(cell.name.split(","), repeat=2)}


def pairwise_cells() -> list[Cell]:
    """The smallest part that a greedy search finds in which every pair of settings of the matrix occurs."""
    missing, chosen = pairs(valid_cells()), []
    while missing:
        chosen.append(max(valid_cells(), key=lambda cell: len(pairs([cell]) & missing)))
        missing -= pairs(chosen[-1:])
    return chosen


def few_cells() -> list[Cell]:
    """A cell or two of each stage and precision, with every setting: for what can't run more (see docs/equivalence.md).

    Of each stage and precision those with the fewest and the most options on, each second one of them by turns.
    """
    chosen = []
    plain = [cell for cell in valid_cells() if not cell.extra]
    for number, (stage, precision) in enumerate(product(STAGES, PRECISIONS)):
        cells = [cell for cell in plain if (cell.stage, cell.precision) == (stage, precision)]
        chosen += cells[:1] if number % 2 else cells[-1:]
    return chosen + [cell for cell in extra_cells() if cell.extra == "buckets" and cell.stage in ("zero2", "fsdp2")]


def matching(cells: list[Cell], words: str) -> list[Cell]:
    """The cells whose name has all of the comma-separated `words`. Raises ValueError for a word that no cell has."""
    wanted = [word for word in words.split(",") if word]
    known = {word for cell in product_cells() + extra_cells() for word in cell.name.split(",")}
    unknown = [word for word in wanted if word not in known]
    if unknown:
        raise ValueError(f"no cell has {unknown[0]!r} in its name; the words are {', '.join(sorted(known))}")
    return [cell for cell in cells if all(word in cell.name.split(",") for word in wanted)]


def from_name(name: str) -> Cell:
    """The cell of that exact name."""
    for cell in product_cells() + extra_cells():
        if cell.name == name:
            return cell
    raise ValueError(f"no cell is named {name!r}; fields are {[f.name for f in fields(Cell)]}")
