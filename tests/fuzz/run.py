"""`make fuzz`: every target under atheris, its share of ten minutes each, and a table of what came of it.

    python tests/fuzz/run.py --minutes 10 --jobs 2

Rules: each target runs in a process of its own, which libFuzzer ends when its time is over, when its memory
is over its limit, when an input takes longer than `SLOW_S`, or at the first exception that must not be. The
corpus of each is kept in `--dir` for the next time, as is the input that ended it; `--only NAME` runs some
again. Exit code 1 if any target was ended so.

Next: `tests/fuzz/targets.py`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TARGETS = Path(__file__).with_name("targets.py")
SLOW_S = 10
GRACE_S = 60


@dataclass(frozen=True)
class Verdict:
    """Of one target. rss_mb: the peak. ended: the reason, or empty."""

    name: str
    executions: int
    seconds: float
    rss_mb: int
    limit_mb: int
    corpus: int
    ended: str


def fuzz(name: str, folder: Path, seconds: int, seed: int) -> Verdict:
    """Run one target for so long."""
    from targets import targets

    target = targets()[name]
    corpus = folder / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(content)
    log = folder / f"{name}.log"
    options = {
        "max_total_time": seconds,
        "rss_limit_mb": target.rss_mb,
        "max_len": target.max_bytes,
        "timeout": SLOW_S,
        "seed": seed,
        "print_final_stats": 1,
        "artifact_prefix": f"{folder}/{name}-",
    }
    words = [f"-{option}={value}" for option, value in options.items()]
    begin = time.monotonic()
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, str(TARGETS), name, *words, str(corpus)],
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=seconds + GRACE_S,
            check=False,
        )
    told = log.read_text(errors="replace")
    return Verdict(
        name,
        executions=statistic(told, "number_of_executed_units"),
        seconds=time.monotonic() - begin,
        rss_mb=statistic(told, "peak_rss_mb"),
        limit_mb=target.rss_mb,
        corpus=len(list(corpus.iterdir())),
        ended=reason(told, done.returncode),
    )


def statistic(told: str, name: str) -> int:
    """A number that libFuzzer has told at its end; 0 if it has not."""
    found = re.search(rf"stat::{name}:\s*(\d+)", told)
    return int(found[1]) if found else 0


def reason(told: str, code: int) -> str:
    """What ended it, if it was not its time."""
    if code == 0:
        return ""
    lines = [line.strip() for line in told.splitlines()]
    for place, line in enumerate(lines):
        if "Uncaught Python exception" in line:
            return lines[place + 1][:100]
        if line.startswith("==") and "ERROR: libFuzzer:" in line:
            return line.partition("libFuzzer: ")[2][:100]
    return f"exit code {code}"


def table(verdicts: Sequence[Verdict]) -> str:
    """One line a target, and a last one for all."""
    rows = [("target", "executions", "a second", "peak RSS", "limit", "corpus", "")]
    rows += [
        (
            one.name,
            f"{one.executions:,}",
            f"{one.executions / max(one.seconds, 1):,.0f}",
            f"{one.rss_mb} MB",
            f"{one.limit_mb} MB",
            str(one.corpus),
            one.ended or "no crash",
        )
        for one in verdicts
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place in (0, 6) else cell.rjust(width) for place, (cell, width) in cells
        )
        for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
    ]
    crashes = sum(bool(one.ended) for one in verdicts)
    executions = sum(one.executions for one in verdicts)
    seconds = sum(one.seconds for one in verdicts)
    lines.append(
        f"{executions:,} executions in {seconds:.0f} s of {len(verdicts)} targets, {crashes} crashed"
    )
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """The exit code."""
    from targets import targets

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="of all together")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer")
    parser.add_argument("--only", action="append", choices=list(targets()), help="these targets")
    parser.add_argument("--dir", type=Path, default=Path("lamina-work/fuzz"))
    arguments = parser.parse_args()
    names = arguments.only or list(targets())
    seconds = max(1, round(60 * arguments.minutes * arguments.jobs / len(names)))
    folder: Path = arguments.dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        verdicts = list(pool.map(lambda name: fuzz(name, folder, seconds, arguments.seed), names))
    print(table(verdicts))
    return any(one.ended for one in verdicts)


if __name__ == "__main__":
    sys.exit(main())
