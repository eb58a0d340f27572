"""A plan as a table: a line for each stage, one for each whole schedule, and its ratio to end-to-end.

Rules: units stand below the names; FLOPs are per example, bytes per client. It fits 80 columns.

Next: `export/costs.py`, what the figures mean.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from export.costs import COMPRESSIONS, ScheduleCost, Setting

WIDTH = 80
_STAGE = (
    *(("stage", ""), ("rounds", ""), ("trained", "M"), ("frozen", "M")),
    *(("step", "MFLOP"), ("segment", "MFLOP"), ("prefix", "MFLOP")),
    *(("fp32", "MB"), ("fp16", "MB"), ("int8", "MB"), ("once", "MB"), ("peak", "MB")),
)
_RUN = (
    *(("schedule", ""), ("rounds", "")),
    *(("cached", "GFLOP"), ("uncached", "GFLOP"), ("down", "MB"), ("up", "MB"), ("peak", "MB")),
)
_NOTES = (
    "trained, frozen: parameters of the model attached.",
    "step: forward and backward, per example, in each epoch of each round.",
    "segment: what the feature cache runs, per view of an example, once per stage.",
    "prefix: what each step would run besides, without the cache.",
    "fp32, fp16, int8: the update, each round, down and up, before zstd.",
    "once: what was frozen last, down, as fp32.",
    "run: FLOPs per example with and without the cache, bytes of fp32; x end_to_end.",
)
_ANCHORS = "A step has in it the forward pass that makes its anchors."
_MICRO = "Micro-batches are the bundle's; a contrastive step then runs forward twice."


def table(costs: list[ScheduleCost], setting: Setting) -> Group:
    """costs: the bundle's own schedule first, `end_to_end` among them."""
    parts: list[RenderableType] = []
    for place, cost in enumerate(costs):
        own = "" if place else ", the bundle's own"
        parts += [Text.assemble((cost.schedule, "bold"), own), _stages(cost), Text()]
    epochs = f"{setting.local_epochs} local epoch{'s' if setting.local_epochs > 1 else ''}"
    micro = any(stage.micro_batch_size for cost in costs for stage in cost.stages)
    peak = f"peak: expected of a client, {setting.engine}, batches of {setting.batch_size}, {epochs}."
    more = [*([_ANCHORS] if setting.aligned else []), *([_MICRO] if micro else [])]
    notes = (Text(note, style="dim") for note in (*_NOTES, *more, peak))
    return Group(*parts, Text("the whole run of a client", style="bold"), _totals(costs), Text(), *notes)


def _stages(cost: ScheduleCost) -> Table:
    shown = _table(_STAGE)
    for number, stage in enumerate(cost.stages, 1):
        shown.add_row(
            str(number),
            str(stage.rounds),
            _number(stage.trainable_parameters / 1e6),
            _number(stage.frozen_parameters / 1e6),
            _number(stage.train_flops / 1e6),
            _number(stage.segment_flops / 1e6),
            _number(stage.prefix_flops / 1e6),
            *(_number(stage.round_bytes[name] / 1e6) for name in COMPRESSIONS),
            _number(stage.frozen_bytes / 1e6),
            f"{stage.peak_bytes / 1e6:.0f}",
        )
    if micro := [stage.micro_batch_size for stage in cost.stages if stage.micro_batch_size]:
        shown.caption = f"micro-batches of {', '.join(map(str, dict.fromkeys(micro)))}"
        shown.caption_justify = "left"
    return shown


def _totals(costs: list[ScheduleCost]) -> Table:
    base = next(cost for cost in costs if cost.schedule == "end_to_end")
    shown = _table(_RUN)
    for cost in costs:
        pairs = (
            (cost.flops / 1e9, base.flops / 1e9),
            (cost.flops_without_cache / 1e9, base.flops_without_cache / 1e9),
            (cost.bytes_down("none") / 1e6, base.bytes_down("none") / 1e6),
            (cost.bytes_up("none") / 1e6, base.bytes_up("none") / 1e6),
            (cost.peak_bytes / 1e6, base.peak_bytes / 1e6),
        )
        cells = (f"{_number(own)} {own / other:.2f}x" for own, other in pairs)
        shown.add_row(cost.schedule, str(sum(stage.rounds for stage in cost.stages)), *cells)
    return shown


def _table(columns: tuple[tuple[str, str], ...]) -> Table:
    made = (
        Column(f"{name}\n{unit}", justify="right" if place else "left", no_wrap=True)
        for place, (name, unit) in enumerate(columns)
    )
    return Table(*made, box=None, padding=(0, 1, 0, 0))


def _number(value: float) -> str:
    """In five places or fewer, but for what is over 99999."""
    if value >= 99.95:
        return f"{value:.0f}"
    if value >= 0.01:
        return f"{value:#.3g}" if value >= 0.995 else f"{value:.3f}"
    return f"{value:.0e}" if value else "-"
