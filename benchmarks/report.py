"""From the benchmark's figures to `docs/resources.md`, its pictures, and all figures as JSON beside it.

Rules: no figure is typed in; a part that was not measured is left out.

Next: `benchmarks/tables.py` and `benchmarks/plots.py`, what is on the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamina_rows import ROWS
from scale import SCALES
from tables import EXACT, FLOWER, SEEDED, beside, budgets, differences, growth, ratios, seeds, table

ORDER = (*ROWS, FLOWER)
BREAKDOWN = (
    "Where the memory goes: a process for each step, engine `onnx`. It ends after four steps, on random "
    "features, without a connection, the cache's pass and the update: the table has a whole client's. "
    "AdamW's moments take memory when the first step writes them."
)
BUDGETS = (
    "Runs that were given a client's memory. A budget decides how many blocks a stage has, so these have "
    "other stages and rounds than the rows above."
)

COMMAND = "python benchmarks/resources.py --model NAME"

Result = dict[str, Any]
HEAD = """# What a client needs

Memory, computing, traffic and time of a client, for the three schedules of the paper, for what Lamina adds
to them, and for Flower with PyTorch. All rows of a model's first table train the same number of rounds on
the same examples, with the same batches and optimizer. All figures are in [resources.json](resources.json).

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
  that of the ClientApp's process alone, and what it takes before it does anything includes all that it will
  import. Bytes are counted by a relay before the SuperNode, HTTP's headers included.
- Flower starts a ClientApp's process anew for each round, and looks for new work every few seconds: its
  seconds are the server's, from round to round, and with its processor seconds they pay for that start.
  Where a round has few steps, as here, that is much of both, so no ratio to them is given.
- A round of Lamina's lasts from when a client has the offer until its update is received, the slowest
  client's. The aggregator's mean and evaluation are left out, and so is the start of the programs.
- Layer-wise and progressive rows begin anew with the learning rate in every stage, end-to-end ones once.
- FLOPs are counted by torch over the modules that train (matrix products and convolutions, forward and
  backward), times examples, epochs and rounds; the prefix with every step, or once a stage with the cache.
  They are the model's: what an engine computes twice to save memory does not count, but for micro-batches.
- Without the cache, Lamina runs the prefix block by block, 8 examples at a time, as a device with a full
  disk does. Its FLOPs are those of the paper's method; a single graph for all of it would be faster.

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
    machines = list(dict.fromkeys(described(values["machine"]) for values in models.values()))
    page = [HEAD.format(command=COMMAND, machine="; ".join(machines))]
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
    if parts.get("seeds") and rows.keys() >= set(SEEDED):
        lines += [seeds(rows, parts["seeds"]), ""]
    if parts.get("curves") and {"cached", "recompute"} <= rows.keys():
        curves = {EXACT: parts["curves"]["float32"], "float16 cache": rows["cached"]}
        curves["recomputed"] = rows["recompute"]
        lines += [differences(curves), ""]
        lines.append(picture(draw_curves, curves, f"resources-{model}-loss", "Training loss by round"))
    if steps := parts.get("breakdown"):
        lines += [BREAKDOWN, ""]
        lines.append(picture(draw_breakdown, steps, f"resources-{model}-breakdown", "Memory step by step"))
    if parts.get("budgets"):
        lines += [BUDGETS, "", budgets(parts["budgets"]), ""]
    return lines


def current(values: Result) -> dict[str, dict[str, Result]]:
    """Part -> name -> result, those of the newest settings, machine and packages."""
    return {
        part: {name: one for name, one in results.items() if _alike(one, values)}
        for part, results in values["parts"].items()
    }


def _alike(one: Result, values: Result) -> bool:
    return all(one[name] == values[name] for name in ("settings", "machine"))


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


def trained(settings: Result, rows: dict[str, Result]) -> str:
    """What was trained, on what, how long."""
    examples = settings["examples"] or "all the"
    rounds = max((row["rounds"] for row in rows.values()), default=0)
    options = f", {', '.join(settings['options'])}" if settings["options"] else ""
    dates = sorted({row["date"] for row in rows.values()})
    return (
        f"{_count(settings['clients'], 'client')}, {examples} emoji of a drawing style each; "
        f"{rounds} rounds of {_count(settings['local_epochs'], 'local epoch')}, "
        f"batches of {settings['batch_size']}{options}. "
        f"{' to '.join(dict.fromkeys([*dates[:1], *dates[-1:]]))}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def described(machine: Result) -> str:
    """One sentence."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gb']} GB, "
        f"{machine['kernel']}, Python {machine['python']}, {packages}"
    )
