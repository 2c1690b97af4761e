"""`Celo2`: the learned optimizer as a `torch.optim.Optimizer`, the same class however parameters are sharded."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from ..weights import load_weights
from ..weights.mlp import MLP
from .enroll import enroll
from .groups import IGNORED, Assignment, check_keys, check_options, named_in_config, named_tensors, refuse_other_length, report
from .matrices.param_groups import tag_of
from .matrices.views import MatrixView, whole
from .names import canonical_names
from .sharding.layouts import (
    Layout,
    LayoutError,
    Original,
    called_to_initialize,
    check_gradient,
    flattened_by_fsdp1,
    local,
    locate,
    refuse_unknown,
)
from .sharding.plan import Plan, factored_sizes, make_plan
from .sharding.replicas import check_replicas
from .step.accumulators import init_state
from .step.adamw import adamw_step
from .step.finite import nonfinite
from .step.learned import LearnedStep, reduce
from .step.sizes import check_state, check_step
from .step.state_dtypes import STATE_DTYPES, WORD, dtype_of, set_state_dtype

logger = logging.getLogger(__name__)

NONFINITE = ("error", "skip", "ignore")
MULTIPLIER = 20.0  # of AdamW's rate, the paper's
FAST_ADAMW = 0.02  # the paper's highest rate of AdamW's tensors, 20 x 1e-3; above it runs end worse (docs/stability.md)
PLANS = 16  # kept for each group: where other tensors lack a gradient in each step (routed experts), they would pile up


class Celo2(torch.optim.Optimizer):
    """Celo2 (arXiv 2602.19142): a step whose direction a small MLP computes from normalised features of each element.

    The same class serves one process, DDP, DeepSpeed ZeRO 0–3 (also offloaded) and FSDP2, and takes the same step
    in all of them up to float32 round-off. States are float32 whatever the parameters' dtype, unless `state_dtype` says
    otherwise.

    Args:
        params: tensors, `named_parameters()`, or param groups (dicts). A group may set any argument below that is
            marked (group), and `rule`: `"celo2"` or `"adamw"`. Without a rule, what `param_groups` or `register`
            recorded on a parameter counts; else tensors of 2 or more dims get `"celo2"` and 1-D ones `"adamw"`
            (with `orthogonalize=False` every tensor gets `"celo2"`). A group of mixed tensors is split in up to
            three (matrices, vectors under the learned rule, AdamW), in this order; `user_groups` says how.
        lr: learning rate (group). The learned step has root mean square 1 per matrix.
        weights: theta. `"default"`, a path, a hub repo id, or a dict of arrays; see `load_weights`.
        weight_decay: of the hidden matrices (group), decoupled: `p ← p − lr · (step + weight_decay · p)`. Which they are
            is what `param_groups` or `register` recorded; without that, all tensors of 2 or more dims under the learned rule.
        adamw_weight_decay: the same for all other tensors (group): AdamW's, and under Celo2-base embeddings, heads and
            vectors. None: as `weight_decay`, which is also what a group means that sets `rule="adamw"` and `weight_decay`.
        orthogonalize: Newton–Schulz on the direction of matrices (group); False is Celo2-base.
        adamw_lr_multiplier: AdamW tensors are stepped at this multiple of lr (group); None is the rule's own, 20. Where
            the rate is above 0.02, a warning says so once (docs/stability.md).
        newton_schulz: coefficients of the orthogonalisation (group): `"celo2"`, the paper's, or `"polar_express"`
            (arXiv 2505.16932), which comes closer to the polar factor and is another optimizer.
        newton_schulz_dtype: of the orthogonalisation's products (group): `"fp32"`, `"bf16"`, or `"auto"`: bf16 on GPUs
            with bfloat16 matrix units, else fp32. bf16's error is small beside that of five iterations, but it is not
            round-off: sharded and unsharded steps then agree to 1e-2, not 1e-5 (docs/newton_schulz.md).
        adamw_betas, adamw_eps: of the AdamW rule (group).
        nonfinite: what a NaN, an Inf or a value above 1.8e19 (whose square overflows) in a gradient does: `"error"` raises
            FloatingPointError naming the tensors before anything is changed, `"skip"` leaves the step out (all ranks
            alike) with a warning, `"ignore"` doesn't look.
            DeepSpeed leaves such steps out by itself (fp16, and bf16 unless `check_grad_overflow` is false), before it
            calls the optimizer; where it doesn't, it steps one param group after the other, and "before anything"
            means the group at hand.
        check_replicas_every: compare checksums of all replicated values over the ranks after every so many steps, and
            raise DriftError where they differ; 0: never.
        state_dtype: of the momenta and second moments of matrices under the learned rule: `"fp32"` (16 bytes a
            parameter), `"bf16"` (8, as AdamW's) or `"fp8"` (4: four small floats of 8 bits on average in one word,
            scaled by the factored second moments; kernels/packed.py). The last two are written with stochastic
            rounding that is the same however the parameters are sharded.
        bucket_size: elements of whole matrices in a bucket. Three buckets are under way at a time, of which a rank has its
            own part (4 bytes an element) and what it received as an owner, some 1/world of each.

    Raises:
        ValueError: an argument out of range, an unknown rule, weights of a wrong shape, an option of another optimizer
            in a group. At `step` and `load_state_dict`: a parameter, gradient or state of another shape.
        LayoutError: here or at `step`, for parameters sharded in a way that Celo2 can't place exactly.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weights: Any = "default",
        weight_decay: float = 0.0,
        adamw_weight_decay: float | None = 0.0,
        orthogonalize: bool = True,
        adamw_lr_multiplier: float | None = None,
        *,
        newton_schulz: str = "celo2",
        newton_schulz_dtype: str = "auto",
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        nonfinite: str = "error",
        check_replicas_every: int = 0,
        state_dtype: str = "fp32",
        bucket_size: int = 1 << 25,
    ) -> None:
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {NONFINITE}, got {nonfinite!r}")
        if bucket_size < 1:
            raise ValueError(f"bucket_size must be at least 1 element, got {bucket_size}")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be one of {tuple(STATE_DTYPES)}, got {state_dtype!r}")
        self.state_dtype = state_dtype
        if weights == "default" and not orthogonalize:
            weights = "default-base"
        # Real weights on the CPU, also while a model without data is made (meta device, FakeTensorMode).
        with torch.device("cpu"), _disable_current_modes():
            self.mlp: MLP = load_weights(weights)
        self.nonfinite, self.bucket_size = nonfinite, bucket_size
        self.check_replicas_every = int(check_replicas_every)
        self.skipped_steps = 0
        self._steps: dict[int, int] = {}  # of each group: DeepSpeed steps them one by one
        self._originals: dict[int, list[Original]] = {}
        self._plans: OrderedDict[tuple, tuple[list[Tensor], list[Plan]]] = OrderedDict()
        self._mlps: dict[torch.device, MLP] = {}
        self._user_groups: list[list[int]] = []  # numbers of the groups that each of the user's became
        self._accepted_keys: set[str] = set()  # of groups
        self._sorted: list[Assignment] = []
        self._made = self._stepped = self._warned = self._told_idle = self._told_untagged = False
        if isinstance(params, (set, frozenset)):
            raise TypeError("parameters need an order that is the same in every run: pass a list, not a set")
        super().__init__(
            params,
            dict(
                lr=lr,
                weight_decay=weight_decay,
                adamw_weight_decay=adamw_weight_decay,
                orthogonalize=orthogonalize,
                adamw_lr_multiplier=MULTIPLIER if adamw_lr_multiplier is None else adamw_lr_multiplier,
                newton_schulz=newton_schulz,
                newton_schulz_dtype=newton_schulz_dtype,
                adamw_betas=tuple(adamw_betas),
                adamw_eps=adamw_eps,
            ),
        )
        self._made = True
        self._told_untagged = report(self._sorted, any(x.tagged for x in self._sorted), printed=named_in_config())
        enroll(type(self))

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; torch's own keeps nothing but groups and states."""
        kept = (
            "mlp",
            "nonfinite",
            "state_dtype",
            "check_replicas_every",
            "bucket_size",
            "skipped_steps",
            "_steps",
            "_originals",
            "_user_groups",
            "_accepted_keys",
            "_sorted",
            "_made",
            "_stepped",
            "_warned",
            "_told_idle",
            "_told_untagged",
        )
        return {**super().__getstate__(), **{key: getattr(self, key) for key in kept}, "_plans": OrderedDict(), "_mlps": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of pickles of earlier versions, which kept less."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it; no option of a group here
        missing = {
            "_user_groups": [[number] for number in range(len(self.__dict__["param_groups"]))],
            "_accepted_keys": set(),
            "_sorted": [],
            "_made": True,
            "_told_untagged": False,
        }
        for key, value in missing.items():
            self.__dict__.setdefault(key, value)

    # ---- parameter groups -------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups that are stepped, each of one rule (torch's attribute)."""
        groups = self.__dict__["param_groups"]
        if len(self._user_groups) != len(groups):
            refuse_other_length(self._user_groups, groups)
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    @property
    def user_groups(self) -> list[list[dict[str, Any]]]:
        """For each group that the user gave, in order, the param groups that it was split into by rule."""
        groups = self.__dict__["param_groups"]
        return [[groups[number] for number in numbers] for numbers in self._user_groups]

    def originals_of(self, group: Mapping[str, Any]) -> list[Original]:
        """The tensors that one of `param_groups` was made of, whatever a wrapper has put in their place since."""
        return self._originals[group["group"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters (also later, in training), split by rule as the class says."""
        given = {key: value for key, value in param_group.items() if key != "params"}
        check_keys(given)
        if given.get("adamw_lr_multiplier", 0.0) is None:
            del given["adamw_lr_multiplier"]
        options = {**self.defaults, **given}
        if given.get("rule") == "adamw" and "weight_decay" in given and "adamw_weight_decay" not in given:
            options["adamw_weight_decay"] = None  # the group means its own
        check_options(options)
        named, by_user = named_tensors(param_group["params"], offset=sum(len(known) for known in self._originals.values()))
        forms = canonical_names(name for name, _ in named)
        later = len(self._sorted)
        known = {id(param) for group in self.__dict__["param_groups"] for param in group["params"]}
        if twice := next((name for name, param in named if id(param) in known), None):
            raise ValueError(f"{twice!r} is in another param group already: give each parameter once")
        split: dict[tuple[str, bool], list[tuple[str, Original, Tensor]]] = {}
        for name, param in named:
            tag = tag_of(param)
            known_as = tag.name if tag and tag.name else forms[name]
            refuse_unknown(known_as, param)
            shape = tuple(getattr(param, "ds_shape", param.shape))
            rule = (
                options.get("rule")
                or (tag.rule if tag and options["orthogonalize"] else None)
                or ("celo2" if len(shape) >= 2 or not options["orthogonalize"] else "adamw")
            )
            hidden = tag.kind == "hidden" if tag else len(shape) >= 2
            original = Original(param, known_as, tag.view if tag else MatrixView(), hidden)
            if rule == "celo2":
                original.view.blocks(original.shape)  # a view that doesn't fit is refused here
            split.setdefault((rule, rule == "celo2" and len(shape) < 2), []).append((name, original, param))
            self._sorted.append(Assignment(original.name, shape, rule, tag is not None, "rule" in given))
        self._user_groups.append([])
        for rule, vectors in [
            (rule, vectors)
            for rule, vectors in (("celo2", False), ("celo2", True), ("adamw", False))
            if (rule, vectors) in split
        ] or [(options.get("rule") or "adamw", False)]:
            members = split.get((rule, vectors), [])
            self._add_group(
                {**options, "rule": rule} | ({"param_names": [name for name, _, _ in members]} if by_user else {}), members
            )
        if self._made and not self._told_untagged:
            self._told_untagged = report(self._sorted[later:], any(x.tagged for x in self._sorted))

    def _add_group(self, options: dict[str, Any], members: list[tuple[str, Original, Tensor]]) -> None:
        groups = self.__dict__["param_groups"]
        number = len(groups)  # what finds the originals again, whatever a wrapper does to the group
        names = options.pop("param_names", None)
        if groups and "param_names" in groups[0]:  # torch wants names in all groups, or in none
            names = names or [name for name, _, _ in members]
        elif groups:
            names = None
        tensors = [param for _, _, param in members]
        super().add_param_group({**options, "group": number, "params": list(zip(names, tensors)) if names else tensors})
        self._user_groups[-1].append(number)
        self._originals[number] = [original for _, original, _ in members]
        if members:
            self._warn_of_fast_adamw(groups[number])

    def _warn_of_fast_adamw(self, group: dict[str, Any]) -> None:
        """Say once, on the first rank, that AdamW's tensors move faster than is known to be good."""
        rate = float(group["lr"] * group["adamw_lr_multiplier"]) if group["rule"] == "adamw" and not self._warned else 0.0
        if rate <= FAST_ADAMW * 1.01:  # so that the multiplier advised below, in three digits, is quiet
            return
        self._warned = True
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.warning(
                "embeddings, head and 1-D tensors get AdamW at lr x adamw_lr_multiplier = %.3g x %.3g = %.3g; above %g "
                "runs end at a higher loss and may spike: set adamw_lr_multiplier to %.3g or less (docs/stability.md)",
                group["lr"],
                group["adamw_lr_multiplier"],
                rate,
                FAST_ADAMW,
                FAST_ADAMW / group["lr"],
            )

    # ---- the step ---------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # as torch's own optimizers: a graph would have to be broken at every collective
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what `closure` (if any) returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._stepped and called_to_initialize():
            return loss  # states are made at the first real step
        self._stepped = True
        ready = []
        for group in self.param_groups:
            if not group.keys() <= self._accepted_keys:
                check_keys(group)
                self._accepted_keys |= group.keys()
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if params:
                for number, param in enumerate(params):
                    check_gradient(f"tensor {number} of param group {group['group']}", param)
                ready.append((group, params, self.plans_of(group, params)))
        if not ready and not self._told_idle:
            self._told_idle = True
            if flattened_by_fsdp1():
                raise LayoutError(
                    "no tensor of this optimizer has a gradient, and FSDP1 (FullyShardedDataParallel) is in use, "
                    "which replaces a model's parameters by flat ones: use FSDP2 "
                    "(torch.distributed.fsdp.fully_shard), and make the optimizer after it"
                )
            logger.warning(
                "no tensor of this optimizer has a gradient: the step changes nothing. Groups that were made before "
                "fully_shard hold other tensors than the model does: make them after it"
            )
        if self.nonfinite != "ignore" and self._found_nonfinite(ready):
            return loss
        for group, params, plans in ready:
            for param in params:
                self._init_state(group, param, plans)
            check_step(plans, group["rule"], self.state)
        for group, params, plans in ready:
            if group["rule"] == "adamw":
                self._warn_of_fast_adamw(group)  # a schedule may have raised the rate since
                adamw_step(group, params, self.state)
            else:
                for plan in plans:
                    mlp = self._mlp_on(local(plan.layout.slices[0].storage).device)
                    LearnedStep(plan, self.state, mlp, group).run()
            number = group["group"]
            self._steps[number] = self._steps.get(number, 0) + 1
            if self.check_replicas_every and self._steps[number] % self.check_replicas_every == 0:
                for plan in plans:
                    check_replicas(plan.layout, self.state)
        return loss

    def _found_nonfinite(self, ready: list) -> bool:
        """Whether some rank's gradient has a NaN, Inf or overflow; the same answer on every rank."""
        names = []
        for _, _, plans in ready:
            for plan in plans:
                flags = nonfinite([shard.of(local(shard.storage.grad).reshape(-1)) for shard in plan.layout.slices]).to(
                    torch.int32
                )
                reduce(flags, plan.layout, dist.ReduceOp.MAX)
                names += [shard.name for shard, flag in zip(plan.layout.slices, flags.tolist()) if flag]
        if not names:
            return False
        what = f"NaN, Inf or overflow in the gradient of {', '.join(names[:5])}" + (
            f" and {len(names) - 5} more tensors" if len(names) > 5 else ""
        )
        if self.nonfinite == "error":
            raise FloatingPointError(
                f"{what}; this step was not taken. Lower the learning rate, clip gradients, or use "
                'nonfinite="skip" to leave such steps out'
            )
        self.skipped_steps += 1
        logger.warning("%s: step skipped (%d so far)", what, self.skipped_steps)
        return True

    # ---- states -----------------------------------------------------------------------------------------------

    def _init_state(self, group: dict[str, Any], param: Tensor, plans: list[Plan]) -> None:
        state, dtype = self.state[param], STATE_DTYPES[self.state_dtype]
        if state:
            if "v_row" in state and dtype_of(state) != dtype:  # restored from another form
                plan, name = next(
                    (plan, shard.name) for plan in plans for shard in plan.layout.slices if shard.storage is param
                )
                check_state(name, state, param, group["rule"], plan.factored[id(param)])
                set_state_dtype(state, dtype, param, plans, _zeros_like)
            return
        if group["rule"] == "adamw":
            state.update(
                step=torch.zeros((), dtype=torch.float32, device=local(param).device),
                exp_avg=_zeros_like(param),
                exp_avg_sq=_zeros_like(param),
            )
        else:
            state.update(init_state(param, [p for plan in plans for p in plan.parts_in(param)], _zeros_like, dtype))

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, and theta: a run goes on with the weights it began with."""
        return {**super().state_dict(), "theta": {name: x.clone() for name, x in self.mlp._asdict().items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore states bit for bit (torch's own would cast float32 states to a bf16 parameter's dtype).

        States that were saved in another `state_dtype` are converted; hooks run as torch's do. Raises ValueError, before
        anything is changed, where groups differ from those that were saved, or a state is not of its tensor's shape.
        """
        # torch's method runs the hooks and puts the groups in place. It gets no states, which it would cast: the last hook
        # before it takes them, the first one after it puts them back.
        taken: dict[str, Any] = {}

        def take(_: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
            taken.update(states=self._check_saved(saved), theta=load_weights(saved["theta"]) if "theta" in saved else None)
            # A group of an earlier version has one decay for all of its tensors, and perhaps options that were ignored.
            groups = [
                {"adamw_weight_decay": None, **{key: x for key, x in group.items() if key not in IGNORED}, "group": number}
                for number, group in enumerate(saved["param_groups"])
            ]
            return {"state": {}, "param_groups": groups}

        def put(_: Any) -> None:
            for param, entry in taken["states"]:
                self._restore(param, entry)
            if taken["theta"] is not None:
                self._restore_theta(taken["theta"])
            self._stepped = True

        hooks = self.register_load_state_dict_pre_hook(take), self.register_load_state_dict_post_hook(put, prepend=True)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            for hook in hooks:
                hook.remove()

    def _check_saved(self, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        """(parameter, its state) of a state that fits. Raises ValueError for one that doesn't."""
        saved, groups = state_dict["param_groups"], self.__dict__["param_groups"]
        if len(saved) != len(groups) or any(len(a["params"]) != len(b["params"]) for a, b in zip(saved, groups)):
            raise ValueError(
                f"the state has {len(saved)} param groups of {[len(g['params']) for g in saved]} tensors, "
                f"the optimizer {len(groups)} of {[len(g['params']) for g in groups]}; "
                "construct it as when the state was saved"
            )
        states = dict(state_dict["state"])
        found = []
        for theirs, ours in zip(saved, groups):
            if theirs.get("rule") != ours["rule"]:
                raise ValueError(
                    f"param group {ours['group']} of the state has rule {theirs.get('rule')!r}, of the optimizer "
                    f"{ours['rule']!r}: it is another optimizer's state, or its groups were made otherwise"
                )
            if ignored := sorted(theirs.keys() & set(IGNORED)):
                logger.warning(
                    "the state's param group %d has %s, on which Celo2 does not act: dropped", ours["group"], ignored
                )
            check_options({**self.defaults, **theirs})
            originals = self._originals[ours["group"]]
            reread = [original.name for original in originals if original.view.repeats > 1]
            if reread and ours["rule"] == "celo2" and "adamw_weight_decay" not in theirs:
                raise ValueError(
                    f"the state is of an earlier version, which read {reread[0]!r} as other matrices ({len(reread)} "
                    "such): write it by save_state with that version, and load it by load_state"
                )
            for place, (number, param) in enumerate(zip(theirs["params"], ours["params"])):
                entry = states.pop(number, None)
                if not entry:
                    continue
                mine = originals[place] if len(originals) == len(ours["params"]) else None
                known = mine is not None and whole(tuple(param.shape)) == mine.shape  # else a flat partition of several
                entry = {key: _moved(value, param) for key, value in entry.items()}
                check_state(
                    mine.name if known else f"tensor {place} of param group {ours['group']}",
                    entry,
                    param,
                    ours["rule"],
                    factored_sizes(mine.shape, mine.view) if known else None,
                )
                found.append((param, entry))
        if states:
            raise ValueError(
                f"the state has entries {sorted(map(str, states))[:4]} that none of its param groups lists: it is damaged"
            )
        return found

    def _restore(self, param: Tensor, entry: dict[str, Any]) -> None:
        self.state[param] = entry
        dtype = STATE_DTYPES[self.state_dtype]
        if "v_row" in entry and WORD not in (dtype, dtype_of(entry)):  # others at the next step, which has a plan
            set_state_dtype(entry, dtype, param, [], _zeros_like)
        if "step" in entry and "v_row" in entry:  # read in every step: it must not lie on a GPU
            entry["step"] = entry["step"].cpu()

    def _restore_theta(self, theta: MLP) -> None:
        if any(not torch.equal(a, b) for a, b in zip(theta, self.mlp)):
            logger.warning(
                "the restored state was made with other weights (theta) than the optimizer was given; "
                "going on with the restored ones"
            )
        self.mlp, self._mlps = theta, {}

    # ---- plans ------------------------------------------------------------------------------------------------

    def plans_of(self, group: dict[str, Any], params: list[Tensor]) -> list[Plan]:
        """The plans by which `params`, tensors of one of `param_groups`, are stepped."""
        key = (group["group"], group["orthogonalize"], *map(id, params))
        if key in self._plans:
            self._plans.move_to_end(key)
        else:
            layouts = locate(self._originals[group["group"]], group["params"], params)
            # Keep the tensors alive so that their ids cannot be reused.
            self._plans[key] = params, [self._make_plan(group, layout) for layout in layouts]
            while len(self._plans) > PLANS * len(self.param_groups):
                self._plans.popitem(last=False)
        return self._plans[key][1]

    def _make_plan(self, group: dict[str, Any], layout: Layout) -> Plan:
        if group["rule"] == "adamw":
            return Plan(layout, [], [], [])
        return make_plan(layout, group["orthogonalize"], self.bucket_size)

    def _mlp_on(self, device: torch.device) -> MLP:
        if device not in self._mlps:
            self._mlps[device] = MLP(*(x.to(device) for x in self.mlp))
        return self._mlps[device]


def _zeros_like(param: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(param, DTensor):
        return torch.zeros_like(param, dtype=dtype)
    return torch.zeros(param.shape, dtype=dtype, device=param.device)


def _moved(value: Any, param: Tensor) -> Any:
    """A state's own copy (the optimizer that it was taken from may go on) where the parameter is."""
    if isinstance(value, DTensor):
        return value.clone(memory_format=torch.contiguous_format)
    return (
        value.to(local(param).device, copy=True, memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
    )
