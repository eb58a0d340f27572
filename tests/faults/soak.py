"""`make soak`: an hour of runs with random kills behind bad links, and a report of them.

    python tests/faults/soak.py --minutes 60 --report soak.jsonl

Rules: one run after the other, each of another seed, through the proxy with all of its faults, with and
without compression. A run's line goes to the report when it is over; with a report that is there already,
the soak goes on after its last run, and its minutes count. What a run that went wrong has left is kept
beside the report. Exit code 1 if any went wrong.

Next: `tests/faults/kills.py`, a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if (tests := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.insert(0, tests)

from kills import Outcome, RunFailed, conduct, equal, plan_kills
from proxy import Faults

KILLS, ROUNDS = 12, 12
COMPRESSIONS = ("none", "int8", "float16")
FAULTS = Faults(
    delay_s=0.001,
    jitter_s=0.01,
    cut=0.001,
    refuse_s=0.5,
    stall=0.001,
    stall_s=0.5,
    drop=0.005,
    acknowledged=0.9,
    duplicate=0.01,
    hold=0.01,
)


def read_report(path: Path) -> list[dict[str, Any]]:
    """The runs so far; half a line at the end, of a soak that was killed, is left out."""
    runs = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            runs.append(json.loads(line))
    return runs


def one_run(folder: Path, seed: int, data: Path, bundle: Path, undisturbed: Outcome) -> dict[str, Any]:
    """A line of the report. `wrong`: what is, or empty."""
    begin = time.monotonic()
    kills = plan_kills(seed, KILLS, ROUNDS)
    told: dict[str, Any] = {"seed": seed, "wrong": ""}
    try:
        outcome = conduct(
            folder,
            data,
            bundle,
            rounds=ROUNDS,
            kills=kills,
            round_s=undisturbed.round_s,
            faults=FAULTS,
            seed=seed,
            compression=COMPRESSIONS[seed % len(COMPRESSIONS)],
        )
    except RunFailed as error:
        told["wrong"] = str(error)
    else:
        told |= {name: value for name, value in vars(outcome).items() if name != "final"}
        if outcome.disagreements:
            told["wrong"] = outcome.disagreements[0]
        elif not equal(outcome.final, undisturbed.final):
            told["wrong"] = "the final parameters are other than the undisturbed run's"
    return {**told, "seconds": round(time.monotonic() - begin, 1)}


def as_line(run: dict[str, Any]) -> str:
    kills, packets = run.get("kills", {}), run.get("proxied", {})
    bad = sum(number for name, number in packets.items() if name not in ("pass", "drop in silence"))
    good = f"{kills.get('kills', 0)} kills, {bad} packets spoilt of {bad + packets.get('pass', 0)}, equal"
    return f"seed {run['seed']}: {run['seconds']:.0f} s, {run['wrong'] or good}"


def summary(runs: list[dict[str, Any]]) -> Iterator[str]:
    kills: Counter[str] = Counter()
    packets: Counter[str] = Counter()
    for run in runs:
        kills.update(run.get("kills", {}))
        packets.update(run.get("proxied", {}))
    wrong = [run for run in runs if run["wrong"]]
    minutes = sum(run["seconds"] for run in runs) / 60
    yield f"{len(runs)} runs in {minutes:.0f} minutes, {len(wrong)} went wrong"
    yield f"kills: {', '.join(f'{name} {number}' for name, number in kills.items())}"
    yield f"packets: {', '.join(f'{name} {number}' for name, number in packets.items())}"
    yield from (f"seed {run['seed']}: {run['wrong']}" for run in wrong)


def main() -> int:
    """The exit code."""
    from real_run import write_bundle, write_data

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--report", type=Path, default=Path("lamina-work/soak/report.jsonl"))
    arguments = parser.parse_args()
    report: Path = arguments.report
    report.parent.mkdir(parents=True, exist_ok=True)
    runs = read_report(report)
    if report.exists() and not report.read_text().endswith("\n"):
        report.write_text("".join(json.dumps(run) + "\n" for run in runs))
    seed = max((run["seed"] for run in runs), default=-1) + 1
    with contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = write_data(folder / "data")
        bundle = write_bundle(folder / "bundle", data)
        undisturbed: dict[str, Outcome] = {}
        while sum(run["seconds"] for run in runs) < 60 * arguments.minutes:
            compression = COMPRESSIONS[seed % len(COMPRESSIONS)]
            if compression not in undisturbed:
                undisturbed[compression] = conduct(
                    folder / compression, data, bundle, rounds=ROUNDS, compression=compression
                )
            run = one_run(folder / f"seed-{seed}", seed, data, bundle, undisturbed[compression])
            if run["wrong"]:
                shutil.copytree(folder / f"seed-{seed}", report.parent / f"seed-{seed}", dirs_exist_ok=True)
            shutil.rmtree(folder / f"seed-{seed}")
            runs.append(run)
            with report.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(as_line(run), flush=True)
            seed += 1
    print(*summary(runs), sep="\n")
    return any(run["wrong"] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
