"""`lamina experiment` as a person types it: killed in the middle, run again, and its results evaluated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import CLIENTS, lamina, until
from pyarrow import parquet

from lamina.experiment.result import Result, read_result
from lamina.options import STOP_WITH_STDIN

FILE = """
[base]
data = "{data}"
model = "models.image_text:image_text"
option.size = 16
option.patch = 4
option.width = 32
option.heads = 2
option.image_blocks = 2
option.text_blocks = 2
option.vocabulary = 60
option.length = 8
option.embedding = 16
engine = "onnx"
batch_size = 8
announce_s = 1

[[grid]]
name = "hosting"
total_rounds = 4
client_processes = [0, 2]

[[grid]]
name = "odd"
total_rounds = 3  # of two stages
"""


@dataclass
class Done:
    """What has happened. ids: of the rows. before: the first row's result as the killed command left it."""

    folder: Path
    file: Path
    ids: list[str]
    before: tuple[bytes, int]
    hosted: list[str]
    left: list[str]
    last: subprocess.CompletedProcess[str]

    def result(self, place: int) -> Result:
        found = read_result(self.folder / "rows" / self.ids[place] / "result.json")
        assert found is not None
        return found


def command_lines(word: str) -> list[str]:
    """Of the processes that have `word` in theirs, this one apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found


def file_of(path: Path) -> tuple[bytes, int]:
    return path.read_bytes(), path.stat().st_mtime_ns


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Done:
    """Run until the second row trains, kill -9, run again to the end."""
    folder = tmp_path_factory.mktemp("experiment")
    file = folder / "small.toml"
    file.write_text(FILE.format(data=data))
    words = ("experiment", str(file), "--dir", str(folder / "work"))
    listed = [json.loads(line) for line in lamina(*words, "--list", "--json").stdout.splitlines()]
    ids = [one["id"] for one in listed]
    rows = folder / "work" / "rows"
    with (folder / "log").open("w") as log:
        killed = subprocess.Popen([sys.executable, "-m", "lamina", *words], stdout=log, stderr=log)
    try:
        training = rows / ids[1] / "run" / "clients" / CLIENTS[2] / "pending"
        until(lambda: training.exists() or killed.poll() is not None, "the second row's training")
        assert killed.poll() is None, (folder / "log").read_text()
        hosted = [line for line in command_lines(str(folder)) if " clients " in line]
    finally:
        killed.kill()
        killed.wait()
    until(lambda: not command_lines(str(folder)), "the end of all children")
    left = sorted(path.name for path in (rows / ids[1]).iterdir())
    before = file_of(rows / ids[0] / "result.json")
    last = lamina(*words)
    return Done(folder / "work", file, ids, before, hosted, left, last)


def test_a_killed_experiment_goes_on_where_it_was(done: Done) -> None:
    assert done.left == ["run"]
    assert f"{done.ids[0]} begins" not in done.last.stderr
    assert file_of(done.folder / "rows" / done.ids[0] / "result.json") == done.before
    assert f"{done.ids[1]} is done" in done.last.stderr
    again = lamina("experiment", str(done.file), "--dir", str(done.folder), "--only", "hosting")
    assert again.returncode == 0, again.stderr
    assert "0 of 2 rows to run" in again.stderr


def test_a_row_that_fails_is_a_line_and_the_others_go_on(done: Done) -> None:
    assert done.last.returncode == 1
    lines = [line for line in done.last.stderr.splitlines() if "has failed" in line]
    assert len(lines) == 1
    assert done.ids[2] in lines[0]
    assert "total_rounds is 3, and layerwise has 2 stages - take a multiple of 2" in lines[0]
    assert done.last.stderr.splitlines()[-1].startswith("lamina: 1 of 2 rows have failed")


def test_clients_of_one_process_are_those_of_their_own(done: Done) -> None:
    """The same rounds, bit for bit; and they did share a process, all but the first."""
    alone, together = done.result(0), done.result(1)
    (line,) = done.hosted
    assert line.split()[-2:] == [*CLIENTS[1:]]
    for one, other in zip(alone.rounds, together.rounds, strict=True):
        assert (one.metrics, one.loss, one.flops) == (other.metrics, other.loss, other.flops)
    for result in (alone, together):
        assert len(result.rounds) == 4
        assert (result.updates, result.missing, result.refusals) == (4 * len(CLIENTS), 0, 0)
        assert result.first == CLIENTS[0]
        assert [one.stage for one in result.rounds] == [1, 1, 2, 2]
        assert result.last.flops > 0
        assert result.last.bytes_sent > 1000
        assert 20 < (result.last.peak_memory_mb or 0) < 400
    assert alone.last.bytes_sent == pytest.approx(together.last.bytes_sent, rel=0.1)


def test_the_final_model_has_the_reports_metric(done: Done) -> None:
    for place in (0, 1):
        result = done.result(place)
        model = done.folder / "rows" / result.id / "model"
        said = lamina("evaluate", str(model), "--data", str(done.folder / result.holdout), "--json")
        assert said.returncode == 0, said.stderr
        found = json.loads(said.stdout)
        assert found.keys() == result.metrics.keys()
        for name, value in result.metrics.items():
            assert found[name] == pytest.approx(value, abs=1e-6), name
        assert sorted(path.name for path in model.parent.iterdir()) == ["model", "result.json"]


def test_a_row_that_runs_again_is_done_until_it_is_done_anew(done: Done, tmp_path: Path) -> None:
    work, row = tmp_path / "work", done.ids[0]
    shutil.copytree(done.folder, work)
    words = ("experiment", str(done.file), "--dir", str(work), "--only", row, "--again")
    stopped = subprocess.Popen([sys.executable, "-m", "lamina", *words], stderr=subprocess.DEVNULL)
    try:
        until(lambda: (work / "rows" / row / "run" / "aggregator").exists(), "the row's new run")
    finally:
        stopped.kill()
        stopped.wait()
    until(lambda: not command_lines(str(work)), "the end of all children")
    assert (work / "rows" / row / "result.json").read_bytes() == done.before[0]
    assert (work / "rows" / row / "model").is_dir()
    again = lamina(*words)
    assert again.returncode == 0, again.stderr
    before, after = done.result(0), read_result(work / "rows" / row / "result.json")
    assert after is not None
    assert (after.metrics, after.last.flops) == (before.metrics, before.last.flops)
    assert after.date >= before.date
    assert sorted(path.name for path in (work / "rows" / row).iterdir()) == ["model", "result.json"]


def test_the_report_is_there(done: Done) -> None:
    report = done.folder / "report"
    assert done.last.stdout.strip() == str(report / "report.md")
    page = (report / "report.md").read_text()
    assert "2 of 3 rows" in page
    for place in (0, 1):
        assert f"--only {done.ids[place]}" in page
    assert (report / "hosting.png").is_file()
    assert len(parquet.read_table(report / "rounds.parquet")) == 8
    listed = lamina("experiment", str(done.file), "--dir", str(done.folder), "--list").stdout.splitlines()
    assert [line.endswith("  -") for line in listed] == [False, False, True]


def test_ctrl_c_ends_everything(tmp_path: Path, data: Path) -> None:
    (tmp_path / "small.toml").write_text(FILE.format(data=data))
    words = ("experiment", str(tmp_path / "small.toml"), "--dir", str(tmp_path / "work"), "--jobs", "2")
    stopped = subprocess.Popen(
        [sys.executable, "-m", "lamina", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert stopped.stderr is not None
    try:
        until(lambda: any(" export " in line for line in command_lines(str(tmp_path))), "an export")
        exports = [line for line in command_lines(str(tmp_path)) if " export " in line]
        assert len(exports) == 1  # the second row waits for the first's
        stopped.send_signal(signal.SIGINT)
        assert stopped.wait(30) == 130
        until(lambda: not command_lines(str(tmp_path)), "the end of all children")
        said = stopped.stderr.read().decode()
        assert "Traceback" not in said, said
    finally:
        stopped.kill()
        stopped.wait()
        stopped.stderr.close()


def test_a_command_ends_with_its_parent_and_so_do_its_children(tmp_path: Path) -> None:
    """One without an event loop, such as `lamina export`."""
    program = (
        "import subprocess, sys, time; from lamina.options import end_with_parent; end_with_parent();"
        f"subprocess.Popen(['sleep', '301.{os.getpid()}']); print('ready', flush=True); time.sleep(300)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, STOP_WITH_STDIN: "1"},
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdout.readline()
        until(lambda: command_lines(f"sleep 301.{os.getpid()}"), "the child's child")
        time.sleep(0.1)
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(10) == -signal.SIGKILL
        until(lambda: not command_lines(f"sleep 301.{os.getpid()}"), "the end of the child's child")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_hosted_client_that_cannot_train_does_not_stop_the_others(tmp_path: Path, data: Path) -> None:
    partly = shutil.copytree(data, tmp_path / "partly")
    table = partly / "clients" / CLIENTS[2] / "table.csv"
    table.write_text(table.read_text().replace("image,text,label", "image,sound,label"))
    grid = 'name = "few"\nmin_available_clients = {}\nclient_processes = 2\nrounds = 1'
    base = FILE[: FILE.index("[[grid]]")].format(data=partly)
    results = {}
    for least in (2, 3):
        file = tmp_path / f"least-{least}.toml"
        file.write_text(f"{base}[[grid]]\n{grid.format(least)}\n")
        results[least] = lamina("experiment", str(file), "--dir", str(tmp_path / f"work-{least}"))
    assert results[2].returncode == 0, results[2].stderr
    assert f"{CLIENTS[2]}: " in results[2].stderr
    assert results[3].returncode == 1
    for result in results.values():
        assert "has no column 'text'" in result.stderr


LITTLE_MEMORY = """total_rounds = 2
client_processes = 2

[[grid]]
name = "memory"
schedule = "progressive"
small_clients = [0, 0.4]
small_client_mb = 120

[[grid]]
name = "memory"
schedule = "end_to_end"
small_clients = 0.4
small_client_mb = 120
min_available_clients = 2
"""


def test_clients_with_little_memory_train_as_deep_as_they_can(tmp_path: Path, data: Path) -> None:
    base = FILE[: FILE.index("[[grid]]")].format(data=data).replace("width = 32", "width = 128")
    file = tmp_path / "memory.toml"
    file.write_text(base + LITTLE_MEMORY)
    done = lamina("experiment", str(file), "--dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = [read_result(path) for path in (tmp_path / "rows").glob("*/result.json")]
    found = {(one.settings["schedule"], one.settings["small_clients"]): one for one in results if one}
    small, whole = found["progressive", 0.4], found["progressive", 0.0]
    assert small.updates == whole.updates == 2 * len(CLIENTS)
    assert small.rounds[0].flops == whole.rounds[0].flops
    assert small.rounds[1].flops < 0.9 * whole.rounds[1].flops
    assert small.metrics != whole.metrics
    without = found["end_to_end", 0.4]
    assert without.updates == 2 * (len(CLIENTS) - 1)
    assert "stage 1 needs " in done.stderr
