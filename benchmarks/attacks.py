"""What malicious clients do to a model, by combining rule: the final recall of a whole run for each cell.

Rules: two of ten clients attack, in every round. A cell takes a bit more than a minute on 2 cores. What is
known already is not run again (`--again` does), so the command can be stopped and started at any time.

    python benchmarks/attacks.py             # lamina-work/attacks/tiny.json
    python benchmarks/attacks.py --report    # docs/attacks.md

Next: `benchmarks/one_process.py`, how a run goes; `aggregator/combine.py`, what is compared.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from one_process import OneProcess, Tamper, as_result, dataset_of  # noqa: E402
from results import Result, Results  # noqa: E402
from scale import TABLE, Scale, copy_rows, exported, run_python  # noqa: E402

from aggregator.plan import RunPlan  # noqa: E402
from wire.manifest import read_manifest  # noqa: E402
from wire.tensors import Arrays  # noqa: E402

SCALE = Scale("tiny", clients=10, examples=400, held_out=None, rounds=5, local_epochs=1)
MALICIOUS = 2
MAX_NORM = 1.5

NONE, NAN = "none", "NaN"
ATTACKS: dict[str, Tamper] = {
    NONE: lambda delta: delta,
    "sign flip": lambda delta: scaled(delta, -1),
    "times 100": lambda delta: scaled(delta, 100),
    NAN: lambda delta: scaled(delta, np.nan),
}
RULES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavg, clipped": {"max_update_norm": MAX_NORM},
    "median": {"aggregation": "median"},
    "trimmed_mean": {"aggregation": "trimmed_mean"},
    "krum": {"aggregation": "krum"},
    "multi_krum": {"aggregation": "multi_krum"},
}
HONEST: dict[str, dict[str, Any]] = {
    "fedavg, seed 1": {"seed": 1},
    "fedavg, seed 2": {"seed": 2},
    "fedavg, server momentum": {"server_optimizer": "momentum"},
    "fedavg, server momentum 0.5": {"server_optimizer": "momentum", "server_momentum": 0.5},
    "fedavg, server adam": {"server_optimizer": "adam"},
    "fedavg, server adagrad without momentum": {"server_optimizer": "adagrad", "server_momentum": 0.0},
    "fedavg, proximal_mu 30": {"proximal_mu": 30.0},
}
"""Without an attack only: how far results lie apart anyway, and what else a run may choose."""


def main() -> None:
    """Run what is not known, or write the page."""
    options = parsed()
    settings = SCALE.settings() | {"malicious": MALICIOUS, "max_norm": MAX_NORM}
    out = options.out.resolve()
    results = Results(out / f"{SCALE.model}.json", settings, again=options.again)
    if options.report:
        (options.docs / "attacks.md").write_text(page(results), encoding="utf-8")
        return
    data = prepared(out)
    bundle = exported(SCALE, "layerwise", data, out)
    cells = [(rule, attack) for attack in ATTACKS for rule in RULES] + [(rule, NONE) for rule in HONEST]
    for rule, attack in cells:
        if rule in (options.rule or [rule]) and attack in (options.attack or [attack]):
            results.need(rule, attack, partial(measure, rule, attack, data, bundle, out))
    if results.missing:
        sys.exit(f"{results.missing} of the cells could not be measured, see above")


def measure(rule: str, attack: str, data: Path, bundle: Path, out: Path) -> Result:
    """A run of one cell."""
    chosen = {"learning_rate": SCALE.learning_rate, "batch_size": SCALE.batch_size}
    plan = RunPlan(**chosen, **(RULES | HONEST)[rule])
    attackers = malicious(data) if attack != NONE else []
    inputs = out / "inputs"
    with tempfile.TemporaryDirectory(dir=out) as folder:
        tampering = dict.fromkeys(attackers, ATTACKS[attack])
        run = OneProcess(plan, bundle, data, inputs, Path(folder), tampering)
        run.train()
        holdout = dataset_of(data / "holdout", bundle, read_manifest(bundle)[0], inputs / "holdout")
        return as_result(run, run.evaluate(holdout))


def malicious(data: Path) -> list[str]:
    """Clients that attack: second ones of a drawing style, so that each style has an honest client."""
    names = sorted(path.name for path in (data / "clients").iterdir())
    return [name for name in names if name.endswith("-2")][:MALICIOUS]


def scaled(delta: Arrays, factor: float) -> Arrays:
    """A delta times a number."""
    return {name: value * np.float32(factor) for name, value in delta.items()}


def prepared(out: Path) -> Path:
    """The emoji among ten clients, evenly spaced examples of each, and all that are held out."""
    whole, folder = out / "data" / "emoji", out / "data" / f"emoji-{SCALE.examples}"
    if folder.exists():
        return folder
    arguments = ["--clients", str(SCALE.clients), "--out", str(whole)]
    run_python("-m", "lamina", "data", "prepare", "emoji", *arguments)
    unfinished = folder.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    for client in sorted((whole / "clients").iterdir()):
        with (client / TABLE).open(encoding="utf-8", newline="") as file:
            styles = {row["group"] for row in csv.DictReader(file)}
        copy_rows(client, unfinished / "clients" / client.name, SCALE.examples, styles)
    (unfinished / "holdout").symlink_to(whole / "holdout")
    return unfinished.rename(folder)


HEAD = """# Malicious clients, and what a combining rule does about them

{malicious} of {clients} clients attack in every round: by turning their update around (*sign flip*), by
sending 100 times their update, or by sending NaN. A cell is the recall@10 of the hold-out after a whole
run, in percent; chance is {chance:.1f}. What the rules are, what this shows and how to choose:
[robustness.md](robustness.md).

Measured by `python benchmarks/attacks.py` on {machine}.
"""
NOTES = """
## How it is measured
- A run of the preset `{model}`, layer-wise: {stages} stages of {rounds} rounds of {epochs} local epoch,
  batches of {batch}, learning rate {rate:g}. A client has at most {examples} emoji of one drawing style;
  three of the seven styles have two clients. The attackers are second clients of their style, so no style
  is lost with them.
- One process and no broker: clients train by the code of `edge_client/`, and their updates go through the
  checks, rules and checkpoints of `aggregator/`. So a NaN is refused as in any run, whatever the rule
  ({refused} times in a run), and its column is a run of the {honest} honest clients.
- `malicious_fraction` is {fraction}, which is the truth here. Clipping is to an L2 norm of {norm:g}; the
  median of honest updates without an attack is {norms} in stages 1 to {stages}.
- Each cell is one run, of seed 0 unless it says another. Runs of other seeds differ in nothing but the
  order of their examples: so far apart are results anyway.
"""


def page(results: Results) -> str:
    """`docs/attacks.md`."""
    known = {
        (rule, attack): result
        for rule in (*RULES, *HONEST)
        for attack in ATTACKS
        if (result := results.get(rule, attack)) is not None
    }
    plain = known["fedavg", NONE]
    machine = plain["machine"]
    place = f"{machine['cores']} cores of {machine['processor']}, {machine['kernel']}"
    lines = [f"| | {' | '.join(ATTACKS)} |", "| --- |" + " ---: |" * len(ATTACKS)]
    for rule in (*RULES, *HONEST):
        cells = [known.get((rule, attack)) for attack in ATTACKS]
        if any(cells):
            words = ["" if cell is None else f"{100 * cell['recall']:.1f}" for cell in cells]
            lines.append(f"| {rule} | {' | '.join(words)} |")
    head = HEAD.format(
        malicious=MALICIOUS,
        clients=SCALE.clients,
        chance=100 * plain["chance"],
        machine=place,
    )
    notes = NOTES.format(
        model=SCALE.model,
        stages=len(plain["norms"]),
        rounds=SCALE.rounds,
        epochs=SCALE.local_epochs,
        batch=SCALE.batch_size,
        rate=SCALE.learning_rate,
        examples=SCALE.examples,
        refused=known["fedavg", NAN]["refusals"]["not_finite"],
        honest=SCALE.clients - MALICIOUS,
        fraction=RunPlan().malicious_fraction,
        norm=MAX_NORM,
        norms=", ".join(f"{value:.2f}" for value in plain["norms"].values()),
    )
    return "\n".join([head, *lines, notes])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lamina-work/attacks"), help="figures and data")
    parser.add_argument("--rule", action="append", choices=[*RULES, *HONEST], help="[default: all]")
    parser.add_argument("--attack", action="append", choices=list(ATTACKS), help="[default: all]")
    parser.add_argument("--again", action="store_true", help="run also what is known already")
    parser.add_argument("--report", action="store_true", help="write the page, run nothing")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
