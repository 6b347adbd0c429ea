"""An estimate as text."""

from __future__ import annotations

from mohd_train.estimate.launch import MEMORY_BESIDE, Estimate

GIB = 1 << 30


def size(value: int) -> str:
    """Bytes in GiB, below a tenth of one in MiB."""
    return f"{value / GIB:,.2f} GiB" if value >= GIB / 10 else f"{value / 2**20:,.1f} MiB"


def amount(value: int) -> str:
    """A number of tokens or parameters, ``1,234,567`` as ``1.23M``."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:,.2f}{letter}"
    return f"{value:,}"


def _memory(found: Estimate) -> list[str]:
    verdict = "fits" if found.fits else "DOES NOT FIT"
    lines = [f"memory of one GPU, microbatch {max(found.microbatch, 1)} (at its peak: {found.stage})"]
    lines += [f"  {part:<26}{size(value):>14}" for part, value in found.parts.items() if value]
    lines.append(f"  {'needed':<26}{size(found.needed):>14}   with {MEMORY_BESIDE}")
    lines.append(f"  {'available':<26}{size(found.memory):>14}   {verdict}")
    largest = f"the largest microbatch that fits is {found.largest_microbatch}" + (
        ", all of a GPU's batch" if found.largest_microbatch == found.device_batch else ""
    )
    none = "not one sample fits: shard over more GPUs, or set fsdp_config.activation_checkpointing=true"
    return [*lines, f"  {largest if found.largest_microbatch else none} (validation included)"]


def _data(found: Estimate) -> list[str]:
    lines = ["data", f"  {'domain':<18}{'tokens needed':>16}{'available':>16}{'epochs':>9}"]
    for name, needed in found.tokens_needed.items():
        available = found.tokens_available[name]
        epochs = "–" if available is None else f"{needed / available:.2f}"
        lines.append(
            f"  {name:<18}{amount(needed):>16}{'–' if available is None else amount(available):>16}{epochs:>9}"
        )
    return lines


def render(found: Estimate) -> str:
    """The whole report."""
    short = found.free_disk is not None and found.free_disk < found.disk
    free = "" if found.free_disk is None else f", {size(found.free_disk)} free{': NOT ENOUGH' if short else ''}"
    lines = [
        f"{found.run_name} on {found.gpus} × {found.gpu}",
        f"  {amount(found.parameters)} parameters, {amount(found.activated)} activated",
        f"  {found.steps:,} steps of {amount(found.tokens_per_step)} tokens: {amount(found.steps * found.tokens_per_step)}, "
        f"{found.flops_per_step:.3g} FLOPs a step",
        "",
        *_memory(found),
        "",
        f"time at {found.mfu:.1%} MFU",
        f"  {found.step_seconds:.2f} s a step, {found.tokens_per_second:,.0f} tokens/s, {found.days:,.1f} days",
        f"  MFU: {found.mfu_source}",
        "",
        "checkpoints",
        f"  {size(found.checkpoint)} each, {found.checkpoints:,} written; {size(found.disk)} of disk needed{free}",
        "",
        *_data(found),
    ]
    if found.notes:
        lines += ["", *(f"note: {note}" for note in found.notes)]
    return "\n".join(lines)
