"""What a client needs, measured in one run on one machine: memory, computing, bytes and time.

Rules: every figure comes from processes started for it, one measurement after the other. What is measured
already is kept (`--again` measures anew), so the command can be stopped and started at any time.

    python benchmarks/resources.py --model tiny --out resources
    python benchmarks/resources.py --model vit-tiny --out resources
    python benchmarks/resources.py --report --out resources      # docs/resources.md and its pictures

Next: `benchmarks/scale.py`, what is trained; `benchmarks/lamina_rows.py`, the rows.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from breakdown import bare, measure_breakdown  # noqa: E402
from flower_row import environment, measure_flower  # noqa: E402
from lamina_rows import ROWS, Row, measure_row  # noqa: E402
from report import write_report  # noqa: E402
from results import Result, Results  # noqa: E402
from scale import SCALES, SEED, Scale, prepared  # noqa: E402
from tables import FLOWER, SEEDED  # noqa: E402

PARTS = {
    "tiny": ("rows", "seeds", "curves"),
    "vit-tiny": ("rows", "breakdown", "budgets"),
}
BROKEN_DOWN = {
    "layer-wise, stage 1": ("layerwise", 0),
    "layer-wise, stage 2": ("layerwise", 1),
    "end-to-end": ("end_to_end", 0),
}
"""Name -> schedule and stage, from 0: the first, which also trains what lies before the blocks; one that
stands for all others; and all of the model.
"""
BUDGETS_MB = (250, 300, 400)


def main() -> None:
    """Measure what is asked for, or write the report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and what was started ends with us
    options = parsed()
    if options.report:
        write_report(options.out, options.docs)
        return
    scale = chosen(options)
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    results = Results(out / f"{scale.model}.json", scale.settings(), again=options.again)
    data = prepared(scale, options.data, out)
    for part in options.part or PARTS[scale.model]:
        if part == "rows":
            rows(results, scale, data, out, options.rows or [*ROWS, FLOWER], options.flower_rounds)
        elif part == "seeds":
            seeds(results, scale, data, out, options.seeds)
        elif part == "curves":
            curves(results, scale, data, out)
        elif part == "breakdown":
            for name, (schedule, stage) in BROKEN_DOWN.items():
                results.need(part, name, partial(measure_breakdown, scale, schedule, stage, data, out))
        else:
            budgets(results, scale, data, out, options.budget or BUDGETS_MB)
    if results.missing:
        sys.exit(f"{results.missing} of the figures could not be measured, see above")


def rows(
    results: Results, scale: Scale, data: Path, out: Path, names: list[str], flower_rounds: int = 0
) -> None:
    """The table, and what its processes take before they do anything. flower_rounds: the most to run."""
    for name in names:
        if name == FLOWER:
            python = str(environment(out) / "python")
            results.need("bare", name, partial(bare, "flower", python))
            results.need("rows", name, partial(measure_flower, scale, data, out, flower_rounds))
            continue
        row = ROWS[name]
        results.need("bare", row.engine, partial(bare, row.engine))
        run = f"{scale.model}-{name}"
        results.need("rows", name, partial(measure_row, row, scale, data, out, run))


def seeds(results: Results, scale: Scale, data: Path, out: Path, count: int) -> None:
    """Whether compressed updates train as well: exact and int8, from `count` seeds, the first the rows'."""
    rows(results, scale, data, out, list(SEEDED))
    for seed in range(SEED + 1, SEED + count):
        for name in SEEDED:
            run = f"{scale.model}-{name}-seed-{seed}"
            measure = partial(measure_row, ROWS[name], scale, data, out, run, seed=seed)
            results.need("seeds", f"{name} {seed}", measure)


def curves(results: Results, scale: Scale, data: Path, out: Path) -> None:
    """A run with features kept as float32, beside the rows with float16 and with no cache at all."""
    rows(results, scale, data, out, ["cached", "recompute"])
    extra = ("--feature-dtype", "float32")
    measure = partial(measure_row, ROWS["cached"], scale, data, out, f"{scale.model}-float32", extra)
    results.need("curves", "float32", measure)


def budgets(results: Results, scale: Scale, data: Path, out: Path, amounts: tuple[int, ...]) -> None:
    """Runs that are given a client's memory, and what their clients then take.

    A budget decides how many stages there are, so the rows' FLOPs and rounds are not these runs'.
    """
    for amount in amounts:
        row = Row(f"layer-wise within {amount} MB", "layerwise", ("--memory-budget", f"{amount}MB"))
        run = f"{scale.model}-budget-{amount}"

        def measure(row: Row = row, run: str = run) -> Result:
            found = measure_row(row, scale, data, out, run)
            del found["flops"]
            return found

        results.need("budgets", str(amount), measure)


def chosen(options: argparse.Namespace) -> Scale:
    """The model's scale, with what the command line changes."""
    given = {"clients": options.clients, "examples": options.examples, "held_out": options.held_out}
    given |= {"rounds": options.rounds, "local_epochs": options.local_epochs}
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(SCALES[options.model], options=tuple(options.option), **changes)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=list(SCALES), default="tiny")
    parser.add_argument("--out", type=Path, default=Path("lamina-work/resources"), help="figures and runs")
    parser.add_argument("--data", type=Path, help="emoji, prepared for 4 clients [default: downloaded]")
    parser.add_argument("--part", action="append", choices=sorted({p for ps in PARTS.values() for p in ps}))
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, FLOWER], help="[default: all]")
    parser.add_argument(
        "--flower-rounds", type=int, default=4, help="how many of its rounds Flower runs  [default: 4]"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the part `seeds`")
    parser.add_argument("--budget", type=int, action="append", metavar="MB", help="of the part `budgets`")
    parser.add_argument("--again", action="store_true", help="measure also what is measured already")
    parser.add_argument("--report", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page goes")
    parser.add_argument("--clients", type=int, help="all below: other than the model's scale has it")
    parser.add_argument("--examples", type=int, help="of each client")
    parser.add_argument("--held-out", type=int, help="of each client's drawing style")
    parser.add_argument("--rounds", type=int, help="of a layer-wise stage")
    parser.add_argument("--local-epochs", type=int)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="of the model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
