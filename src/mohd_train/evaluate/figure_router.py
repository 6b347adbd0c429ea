"""Fig. 11 for a run of a sweep: its last checkpoint, the validation data it was trained beside."""

from __future__ import annotations

from pathlib import Path

from mohd_train.analysis.routing import COMPONENTS, router_selection
from mohd_train.analysis.routing_figures import draw_router_selection
from mohd_train.checkpoint import exists
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import latest_checkpoint
from mohd_train.sweep.folder import SweepFolder

PAPER_LAYER = 5


def draw_router(sweep: Path, run: str, output: Path, layer: int | None, component: str | None) -> list[Path]:
    """Draws the router's view of one layer.

    Args:
        run: a run of the sweep.
        layer: from 0; None: the paper's 5, or the last of a shallower model.
        component: ``attention`` or ``ffn``; None: each that is routed.

    Raises:
        UserError: no such run, no checkpoint of it yet, a dense model.
    """
    folder = SweepFolder(sweep)
    if run not in folder.runs:
        raise UserError(f"{sweep} has no run {run!r}; it has {', '.join(folder.runs)}")
    checkpoint = latest_checkpoint(sweep / run)
    if not exists(checkpoint):
        raise UserError(f"{run} has no checkpoint yet; see scripts/sweep.py status {sweep}")
    plan = ModelPlan.from_dict(folder.runs[run]["plan"])
    layer = min(PAPER_LAYER, plan.num_hidden_layers - 1) if layer is None else layer
    chosen = [component] if component else [part for part in COMPONENTS if getattr(plan, part) is not None]
    if not chosen:
        raise UserError(f"{run} is dense: it has no router")
    data = folder.source.place(sweep)
    selections = [router_selection(checkpoint, data, layer=layer, component=part) for part in chosen]
    return draw_router_selection(selections, run, output)
