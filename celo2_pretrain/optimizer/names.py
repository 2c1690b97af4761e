"""Names of parameters that don't depend on what wraps the model: torch.compile, DDP, FSDP, activation checkpointing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

# Path components that a wrapper puts around the module it wraps, at any depth.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
ROOT_WRAPPER = "module"  # DDP, DataParallel, DeepSpeedEngine: only the first component, since models have such submodules


def canonical(name: str) -> str:
    """`name` without the components that wrappers add: "_orig_mod.module.h.0.weight" is "h.0.weight"."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == ROOT_WRAPPER:
        parts.pop(0)
    return ".".join(parts) or name


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Each name's canonical form; the name itself where two names of a model have the same form."""
    forms = {name: canonical(name) for name in names}
    count = Counter(forms.values())
    return {name: form if count[form] == 1 else name for name, form in forms.items()}


def match(saved: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Which saved name is which wanted one, whatever wrapped either model: `{saved: wanted}`.

    Names are left out that have no partner, and those of which several have one canonical form, unless both sides have
    exactly the same ones.
    """
    forms: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, names in enumerate((saved, wanted)):
        for name in names:
            forms[canonical(name)][side].append(name)
    pairs = {}
    for ours, theirs in forms.values():
        if set(ours) == set(theirs):
            pairs |= {name: name for name in ours}
        elif len(ours) == len(theirs) == 1:
            pairs[ours[0]] = theirs[0]
    return pairs
