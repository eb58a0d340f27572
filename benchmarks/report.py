"""From the benchmark's figures to `docs/resources.md`, its pictures, and all figures as JSON beside it.

Rules: nothing is typed in. A figure that was not measured is a dash, a part that was not measured is left
out. Ratios are how many times less a client needs than with end-to-end training and than with Flower.

Next: `benchmarks/plots.py`, the pictures.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lamina_rows import ROWS
from scale import SCALES

FLOWER = "flower"
REFERENCES = ("end-to-end", FLOWER)
ORDER = (*ROWS, FLOWER)
NONE = "–"
MOMENTS = "AdamW's moments take memory when the first step writes them."

Result = dict[str, Any]
Column = tuple[str, Callable[[Result], float | None], str]

COLUMNS: tuple[Column, ...] = (
    ("peak memory, MB", lambda row: row["peak_mb"], "{:,.0f}"),
    ("above the runtime, MB", lambda row: row["above_mb"], "{:,.0f}"),
    ("TFLOP", lambda row: row["flops"]["total"] / 1e12, "{:,.3g}"),
    ("MB up", lambda row: row["bytes_up"] / 1e6, "{:,.1f}"),
    ("MB down", lambda row: row["bytes_down"] / 1e6, "{:,.1f}"),
    ("CPU, s", lambda row: row["cpu_s"], "{:,.0f}"),
    ("run, s", lambda row: row["wall_s"], "{:,.0f}"),
    ("a round, s", lambda row: row["mean_round_s"], "{:,.1f}"),
)

HEAD = """# What a client needs

Memory, computing, traffic and time of a client, for the three schedules of the paper, for what Lamina adds
to them, and for Flower with PyTorch. All rows of a model train the same number of rounds on the same
examples, with the same batches and optimizer. All figures are in [resources.json](resources.json).

Measured by `{command}` on {machine}.
"""

NOTES = """
## How it is measured
- A Lamina row is a plain `lamina run`: a broker, an aggregator and client processes on one machine, over
  the loopback. Each client has its share of the cores as threads. Bytes are counted at the MQTT socket and
  are the mean of the clients, as processor seconds are. Memory is the high-water mark of a client's process
  (`VmHWM`), the largest of all clients; *above the runtime* leaves out what a process takes that has only
  imported what a client needs, measured in the same run.
- The Flower row is a SuperLink, a SuperNode for each client, and Flower's FedAvg, with Flower's defaults,
  without TLS, as Lamina's broker is. The model is Lamina's own torch module, fed by Lamina's readers, from
  the initial parameters, in the order and with the learning rates of the row *end-to-end*. Its memory is
  that of the ClientApp's process alone. Flower starts that process anew for each round: its seconds and
  processor seconds pay for importing torch each time. Bytes are counted by a relay before the SuperNode,
  HTTP's headers included.
- Layer-wise and progressive rows begin anew with the learning rate in every stage, end-to-end ones once.
- FLOPs are counted by torch over the graphs that train (matrix products and convolutions, forward and
  backward), times examples, epochs and rounds; the prefix with every step, or once a stage with the cache.
- A round lasts from its offer until the last client is done. The aggregator's evaluation is left out, and
  so is the start of the programs.

## What it does not show
- One machine with few cores for all processes: seconds are noisy, and a loopback is no network.
- At the scale of the paper's model (`vit-tiny`) there are few examples and few rounds: memory, and FLOPs
  and bytes of a round, are what they are at any length, but its recall is near chance and says nothing. Its
  images were drawn at 64 pixels and scaled up.
- Shorter runs pay relatively more for graphs, which a client fetches once, and for its start.
"""


def write_report(out: Path, docs: Path) -> None:
    """Read the JSON files of all models in `out`, write the page. Raises SystemExit without any."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))}
    models = {name: found[name] for name in SCALES if "parts" in found.get(name, {})}
    if not models:
        raise SystemExit(f"no figures in {out}: run this without --report first")
    docs.mkdir(parents=True, exist_ok=True)
    machine = next(iter(models.values()))["machine"]
    page = [HEAD.format(command=machine["command"], machine=described(machine))]
    for model, values in models.items():
        page += section(model, values["settings"], current(values), docs)
    page.append(NOTES.strip())
    (docs / "resources.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    (docs / "resources.json").write_text(json.dumps(models, indent=1) + "\n", encoding="utf-8")
    print(docs / "resources.md")


def section(model: str, settings: Result, parts: dict[str, dict[str, Result]], docs: Path) -> list[str]:
    """The lines of one model; its pictures are drawn beside the page."""
    from plots import draw_breakdown, draw_curves, draw_rounds, draw_rows

    def picture(draw: Callable[..., None], results: dict[str, Result], name: str, what: str) -> str:
        draw(results, docs / f"{name}.png", model)
        return f"![{what}]({name}.png)\n"

    rows = with_runtime(parts)
    lines = [f"## `{model}`", trained(settings, rows), ""]
    if rows:
        lines += [table(rows), "", ratios(rows), "", *beside(rows)]
        lines.append(picture(draw_rows, rows, f"resources-{model}", "Memory, FLOPs, bytes, processor time"))
    if {"cached", "recompute"} <= rows.keys():
        lines += [growth(rows), ""]
        lines.append(picture(draw_rounds, rows, f"resources-{model}-rounds", "Seconds of a round by stage"))
    if parts.get("seeds"):
        lines += [seeds(parts["seeds"]), ""]
    if len(curves := parts.get("curves", {})) > 1:
        lines += [differences(curves), ""]
        lines.append(picture(draw_curves, curves, f"resources-{model}-loss", "Training loss by round"))
    if steps := parts.get("breakdown"):
        lines += ["Where the memory goes: a process for each step, engine `onnx`. " + MOMENTS, ""]
        lines.append(picture(draw_breakdown, steps, f"resources-{model}-breakdown", "Memory step by step"))
    if parts.get("budgets"):
        lines += [budgets(parts["budgets"]), ""]
    return lines


def current(values: Result) -> dict[str, dict[str, Result]]:
    """Part -> name -> result, those of the newest settings."""
    return {
        part: {name: one for name, one in results.items() if one["settings"] == values["settings"]}
        for part, results in values["parts"].items()
    }


def with_runtime(parts: dict[str, dict[str, Result]]) -> dict[str, Result]:
    """The rows in order, each with its runtime's `bare_mb` and what is `above_mb` of it."""
    rows = {}
    for name in ORDER:
        if row := parts.get("rows", {}).get(name):
            bare = parts.get("bare", {}).get(row.get("engine", FLOWER), {}).get("peak_mb")
            rows[name] = row | {
                "bare_mb": bare,
                "above_mb": None if bare is None else row["peak_mb"] - bare,
            }
    return rows


def table(rows: dict[str, Result]) -> str:
    """Each row's figures."""
    head = ["", *(name for name, _, _ in COLUMNS), "recall@10"]
    lines = []
    for row in rows.values():
        figures = [shown(pattern, value(row)) for _, value, pattern in COLUMNS]
        lines.append([row["title"], *figures, percent(row["recall"])])
    chance = next(iter(rows.values()))["chance"]
    return markdown(head, lines) + f"\n\nrecall@10 of the hold-out; chance is {percent(chance)}."


def ratios(rows: dict[str, Result]) -> str:
    """How many times less than the references."""
    known = [name for name in REFERENCES if name in rows]
    if not known:
        return ""
    head = ["times less than " + " / ".join(known), *(name for name, _, _ in COLUMNS)]
    lines = []
    for row in rows.values():
        cells = []
        for _, value, _ in COLUMNS:
            mine = value(row)
            theirs = [value(rows[name]) for name in known]
            cells.append(" / ".join(f"{one / mine:.2f}" if mine and one else NONE for one in theirs))
        lines.append([row["title"], *cells])
    return markdown(head, lines)


def growth(rows: dict[str, Result]) -> str:
    """How much longer a round of the last stage takes than one of the first: medians of the later rounds."""
    words = []
    for name in ("recompute", "cached"):
        medians = [statistics.median(stage[1:] or stage) for stage in rows[name]["round_s"]]
        words.append(f"{medians[-1] / medians[0]:.2f} times as long ({rows[name]['title']})")
    return f"A round of the last stage takes, next to one of the first, {' and '.join(words)}."


def beside(rows: dict[str, Result]) -> list[str]:
    """What the Flower client needs beside its row."""
    if FLOWER not in rows:
        return []
    row = rows[FLOWER]
    return [
        f"The SuperNode and SuperExec of a Flower client take {row['beside_mb']:,.0f} MB more than its row says "
        f"(the sum of their peaks). Of its {row['cpu_s']:,.0f} processor seconds, {row['train_cpu_s']:,.0f} are "
        f"spent within the training function, of its {row['wall_s']:,.0f} s {row['train_s']:,.0f}. "
        f"flwr {row['packages']['flwr']}, torch {row['packages']['torch']}.",
        "",
    ]


def seeds(results: dict[str, Result]) -> str:
    """Recall of exact and compressed updates over the seeds."""
    lines = []
    for kind in sorted({name.split()[0] for name in results}):
        recalls = [one["recall"] for name, one in results.items() if name.split()[0] == kind]
        spread = statistics.stdev(recalls) if len(recalls) > 1 else 0.0
        lines.append(
            [kind, ", ".join(map(percent, recalls)), percent(statistics.mean(recalls)), percent(spread)]
        )
    head = ["recall@10 by seed", "each", "mean", "standard deviation"]
    return markdown(head, lines)


def differences(curves: dict[str, Result]) -> str:
    """How far training losses are from those with float32 features."""
    exact = curves["float32 cache"]["losses"] if "float32 cache" in curves else None
    if exact is None:
        return ""
    lines = []
    for name, one in curves.items():
        largest = max(abs(a - b) for a, b in zip(one["losses"], exact, strict=True))
        lines.append([name, f"{one['losses'][-1]:.4f}", f"{largest:.1e}", percent(one["recall"])])
    head = ["features", "last training loss", "largest difference of a round from float32", "recall@10"]
    return markdown(head, lines)


def budgets(results: dict[str, Result]) -> str:
    """What clients took that were given so much."""
    head = ["`--memory-budget`, MB", "peak memory, MB", "by stage, MB", "a round, s"]
    lines = []
    for name, one in sorted(results.items(), key=lambda item: int(item[0])):
        peaks = [f"{peak:.0f}" for peak in one["peak_mb_by_stage"]]
        lines.append([name, f"{one['peak_mb']:.0f}", ", ".join(peaks), f"{one['mean_round_s']:.1f}"])
    return markdown(head, lines)


def trained(settings: Result, rows: dict[str, Result]) -> str:
    """What was trained, on what, how long."""
    examples = settings["examples"] or "all the"
    rounds = max((row["rounds"] for row in rows.values()), default=0)
    options = f", {', '.join(settings['options'])}" if settings["options"] else ""
    dates = sorted({row["date"] for row in rows.values()})
    return (
        f"{settings['clients']} clients, {examples} emoji of a drawing style each; {rounds} rounds of "
        f"{settings['local_epochs']} local epochs, batches of {settings['batch_size']}{options}. "
        f"{' to '.join(dict.fromkeys([*dates[:1], *dates[-1:]]))}."
    )


def described(machine: Result) -> str:
    """One sentence."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gb']} GB, "
        f"{machine['kernel']}, Python {machine['python']}, {packages}"
    )


def shown(pattern: str, value: float | None) -> str:
    """A figure, or a dash."""
    return NONE if value is None else pattern.format(value)


def percent(value: float | None) -> str:
    """A share."""
    return NONE if value is None else f"{100 * value:.1f}%"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
