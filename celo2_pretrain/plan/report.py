"""A plan as text of at most 100 columns, and as JSON."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, replace

from celo2_pretrain.common.devices import GIB
from celo2_pretrain.common.settings import as_tree
from celo2_pretrain.plan import memory, step_time
from celo2_pretrain.plan.estimate import Estimate, Subject
from celo2_pretrain.plan.shards import owned_flops, sent_bytes
from celo2_pretrain.plan.step_time import some_ranks


def duration(seconds: float) -> str:
    """In the unit that reads best."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 1 else f"{seconds:.3g} seconds"


def amount(count: float) -> str:
    """A large count with its unit: 26.2 B, 1.3 M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def size(count: float) -> str:
    """Bytes, decimal units as networks count them."""
    return f"{amount(count).replace('B', 'G').replace('k', 'K')}B" if count >= 1e3 else f"{count:.0f} B"


def heading(subject: Subject) -> list[str]:
    config = subject.config
    text = subject.model.config.get_text_config()
    optimizer = config.optimizer
    extra = f", {optimizer.state_dtype} states" if optimizer.name != "adamw" else ""
    first = (
        f"{subject.model.config.model_type}: {subject.parameters / 1e6:,.1f} M parameters, {text.num_hidden_layers} layers of "
        f"width {text.hidden_size}, context {config.model.context:,}"
    )
    second = (
        f"{config.train.precision}, {optimizer.name}{extra}, attention {config.model.attention}"
        f"{', activation checkpointing' if config.model.activation_checkpointing else ''}"
        f"{', compiled' if config.model.compile else ''}"
    )
    return [first, second]


def notes(subject: Subject) -> list[str]:
    return [line for note in subject.notes for line in textwrap.wrap(f"Note: {note}.", 100)]


def memory_table(plan: Estimate) -> list[str]:
    m, precision, stage = plan.memory, plan.config.train.precision, plan.config.train.zero_stage
    name = plan.config.optimizer.name
    rows = [
        (f"weights ({precision})", m.weights, m.weights),
        ("parameters gathered by ZeRO-3, at most", m.gathered, 0.0),
        ("gradients; in the step with float32 copies", m.gradients, m.step_gradients),
        ("float32 master weights", m.master, m.master),
        (f"optimizer states ({name})", m.states, m.states),
        ("gradient buckets", m.buckets, 0.0),
        (f"activations of {plan.config.train.micro_batch_size} windows", m.activations, 0.0),
        ("temporaries of the backward pass (logits)", m.temporaries, 0.0),
        ("directions, Newton-Schulz, the norms' copy", 0.0, m.step_buffers),
    ]
    unit, word = (GIB, "GiB") if m.total > 4 * GIB else (GIB / 1024, "MiB")
    lines = [f"{f'Memory of the fullest GPU, {word}':<46}{'backward pass':>15}{'optimizer step':>16}"]
    for label, backward, step in rows:
        if backward or step:
            cells = [f"{value / unit:.2f}" if value else "-" for value in (backward, step)]
            lines.append(f"  {label:<44}{cells[0]:>15}{cells[1]:>16}")
    lines.append(f"  {'sum':<44}{m.backward / unit:>15.2f}{m.step / unit:>16.2f}")
    reserve = (
        f", with {memory.FRAGMENTATION:.0%} for fragmentation and {memory.CONTEXT / GIB:g} GiB of context"
        if m.reserve_context
        else ""
    )
    lines.append(
        f"  needed: {m.total / GIB:.2f} of {plan.device.memory / GIB:.0f} GiB{reserve}: "
        f"{'fits' if plan.fits else 'DOES NOT FIT'}"
    )
    if plan.largest_micro_batch:
        lines.append(
            f"  largest micro-batch that fits: {plan.largest_micro_batch}"
            + (f"; {plan.useful_micro_batch} is the largest that divides the batch" if plan.useful_micro_batch else "")
        )
    elif not plan.fits:
        lines.append(
            "  no micro-batch fits: "
            + (
                "take more or larger GPUs, or shorter windows"
                if stage == 3
                else "try a higher train.zero_stage, or more or larger GPUs"
            )
        )
    if not plan.config.model.activation_checkpointing and not plan.fits:
        lines.append("  model.activation_checkpointing=true takes far fewer activations, for a third more time")
    return lines


def time_table(plan: Estimate, mfu: float) -> list[str]:
    t, device, precision = plan.time, plan.device, plan.config.train.precision
    peak = device.peak(precision)
    again = ", x 4/3 to recompute" if plan.config.model.activation_checkpointing else ""
    rows = [
        (
            "forward and backward passes",
            t.compute,
            f"{t.flops_per_token / 1e9:.3g} GFLOP a token, {mfu:.0%} of {peak / 1e12:.3g} TFLOP/s{again}",
        ),
        ("ZeRO's traffic, not hidden", t.gradients, f"{size(t.zero_bytes)} sent by each GPU at {t.link / 1e9:.3g} GB/s"),
    ]
    if plan.config.optimizer.name != "adamw":
        rows += [
            (
                "optimizer: passes",
                t.passes,
                f"{step_time.CELO2_BYTES} B a parameter at {step_time.PASSES_SHARE:.0%} of {device.bandwidth / 1e12:.3g} TB/s",
            ),
            (
                "optimizer: Newton-Schulz",
                t.newton_schulz,
                f"{t.newton_schulz_flops / 1e12:.3g} TFLOP, {t.newton_schulz_dtype} at "
                f"{step_time.MATMUL_SHARE[t.newton_schulz_dtype]:.0%} of "
                f"{device.peak(t.newton_schulz_dtype) / 1e12:.3g} TFLOP/s",
            ),
            ("  exchange, meanwhile", t.exchange, f"{size(t.celo2_bytes)} sent by the busiest GPU"),
        ]
    else:
        rows.append(
            (
                "optimizer",
                t.passes,
                f"{step_time.ADAMW_BYTES} B a parameter at {step_time.MEMORY_SHARE:.0%} of {device.bandwidth / 1e12:.3g} TB/s",
            )
        )
    lines = [f"{'Time of a step, seconds':<31}{'':>8}   from"]
    lines += [f"  {label:<28}{seconds:>9.4f}   {source}" for label, seconds, source in rows]
    lines.append(f"  {'step':<28}{t.step:>9.4f}   of which the optimizer {t.optimizer / t.step:.1%}")
    lines.append(
        f"  {amount(plan.tokens_per_day)} tokens a day; {plan.config.train.max_steps:,} steps = {amount(plan.tokens)} "
        f"tokens in {duration(plan.tokens / plan.tokens_per_day * 86400)}, validation not counted"
    )
    return lines


def text(subject: Subject, plan: Estimate, mfu: float) -> str:
    """One plan in full."""
    config, n = plan.config, plan.ranks
    host = 4 * subject.parameters * min(n, plan.device.per_node)
    lines = [
        *heading(subject),
        f"{n} x {plan.device.name}, ZeRO-{config.train.zero_stage}: {config.train.micro_batch_size} windows x {n} GPUs x "
        f"{plan.accumulation} accumulated = {plan.tokens_per_step:,} tokens a step",
        "",
        *memory_table(plan),
        f"  of the node's own memory while the model is built: {host / GIB:.1f} GiB",
        "",
        *time_table(plan, mfu),
        "",
        f"Peaks: {plan.device.source}.",
        f"Assumed: links at {step_time.LINK_SHARE:.0%} of their bandwidth, "
        + (f"{plan.device.network * 8 / 1e9:.4g} Gbit/s a GPU between nodes." if n > plan.device.per_node else "one node."),
        "The time is an estimate: measure some steps, and give the share of the peak by --mfu.",
    ]
    return "\n".join(lines + notes(subject))


def comparison(subject: Subject, cases: list[tuple[str, int, int, Estimate | None]]) -> str:
    """Several plans, a line each: (GPU, count, ZeRO stage, plan or None where the batch doesn't divide)."""
    lines = [
        *heading(subject),
        f"{subject.config.train.global_batch_size * subject.config.model.context:,} tokens a step, "
        f"micro-batch {subject.config.train.micro_batch_size}, {subject.config.train.max_steps:,} steps",
        "",
        f"{'GPU':<9}{'count':>6}{'ZeRO':>6}{'GiB needed':>11}{'of':>5}  {'':<5}{'max micro':>10}{'s/step':>9}"
        f"{'optimizer':>10}{'tokens/day':>11}  run",
    ]
    for name, ranks, stage, plan in cases:
        start = f"{name:<9}{ranks:>6}{stage:>6}"
        if plan is None:
            micro = subject.config.train.micro_batch_size
            lines.append(f"{start}  the batch of {subject.config.train.global_batch_size} is no multiple of {micro} x {ranks}")
            continue
        lines.append(
            f"{start}{plan.memory.total / GIB:>11.1f}{plan.device.memory / GIB:>5.0f}  {'fits' if plan.fits else 'NO':<5}"
            f"{plan.largest_micro_batch:>10}{plan.time.step:>9.3g}{plan.time.optimizer / plan.time.step:>10.1%}"
            f"{amount(plan.tokens_per_day):>11}  {duration(plan.tokens / plan.tokens_per_day * 86400)}"
        )
    return "\n".join(lines + notes(subject))


def rank_rows(plan: Estimate) -> list[dict]:
    """What each rank holds and owns: elements, matrices, Newton–Schulz work, bytes sent in a step."""
    rows = [
        {"rank": rank, "elements": 0, "matrices_owned": 0, "newton_schulz_flops": 0.0, "sent_bytes": 0.0}
        for rank in range(plan.ranks)
    ]
    sending = set(some_ranks(plan.ranks))
    for group, learned in zip(plan.groups, plan.plans):
        for row in rows:
            rank = row["rank"] if plan.config.train.zero_stage else 0  # stage 0: every rank does everything
            row["elements"] += group.numel_of(rank)
        if learned is None:
            continue
        flops = owned_flops(learned)
        for row in rows:
            rank = row["rank"] if plan.config.train.zero_stage else 0
            row["newton_schulz_flops"] += flops[rank]
            row["matrices_owned"] += sum(unit.owner == rank for units in learned.units for unit in units)
            if row["rank"] in sending:
                layout = replace(learned.layout, rank=rank)
                row["sent_bytes"] += sum(sent_bytes(replace(learned, layout=layout)).values())
    for row in rows:
        if row["rank"] not in sending:
            row["sent_bytes"] = None  # not counted: it takes long for many ranks
    return rows


def ranks_table(plan: Estimate, most: int = 16) -> list[str]:
    rows = rank_rows(plan)
    mean = sum(row["newton_schulz_flops"] for row in rows) / len(rows)
    lines = [
        f"{'Rank':>6}{'elements held':>16}{'matrices owned':>17}{'Newton-Schulz':>18}{'of the mean':>13}{'sent a step':>14}"
    ]
    shown = rows if len(rows) <= most else [rows[rank] for rank in some_ranks(len(rows))]
    for row in shown:
        share = f"{row['newton_schulz_flops'] / mean:.2f}" if mean else "-"
        sent = "-" if row["sent_bytes"] is None else size(row["sent_bytes"])
        lines.append(
            f"{row['rank']:>6}{row['elements']:>16,}{row['matrices_owned']:>17}"
            f"{row['newton_schulz_flops'] / 1e9:>11,.1f} GFLOP{share:>13}{sent:>14}"
        )
    if len(shown) < len(rows):
        lines.append(f"       … {len(rows)} ranks in all")
    most_work, idle = max(row["newton_schulz_flops"] for row in rows), sum(not row["matrices_owned"] for row in rows)
    if mean:
        lines.append(
            f"the busiest owner has {most_work / mean:.2f} times the mean's work"
            + (f"; {idle} ranks own no matrix: there are fewer matrices than ranks" if idle else "")
        )
    return lines


def as_json(subject: Subject, name: str, plan: Estimate, dry_run: bool) -> dict:
    """Everything, in bytes, seconds, tokens."""
    out = {
        "model": {"type": subject.model.config.model_type, "parameters": subject.parameters},
        "gpu": name,
        "device": asdict(plan.device),
        "gpus": plan.ranks,
        "zero_stage": plan.config.train.zero_stage,
        "gradient_accumulation_steps": plan.accumulation,
        "memory_bytes": {
            **asdict(plan.memory),
            "backward": plan.memory.backward,
            "step": plan.memory.step,
            "total": plan.memory.total,
        },
        "fits": plan.fits,
        "largest_micro_batch": plan.largest_micro_batch,
        "useful_micro_batch": plan.useful_micro_batch,
        "time_seconds": {
            key: getattr(plan.time, key)
            for key in ("compute", "gradients", "passes", "newton_schulz", "exchange", "optimizer", "step")
        },
        "flops_per_token": plan.time.flops_per_token,
        "newton_schulz_flops": plan.time.newton_schulz_flops,
        "sent_bytes": {"zero": plan.time.zero_bytes, "celo2": plan.time.celo2_bytes},
        "tokens_per_step": plan.tokens_per_step,
        "tokens_per_day": plan.tokens_per_day,
        "tokens": plan.tokens,
        "run_seconds": plan.tokens / plan.tokens_per_day * 86400,
        "notes": subject.notes,
        "config": as_tree(plan.config),
    }
    return out | ({"ranks": rank_rows(plan)} if dry_run else {})
