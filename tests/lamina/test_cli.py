"""The `lamina` command as a person meets it: help, and one line and an exit code for each mistake."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from small_world import World

from export.final import write_final
from lamina.cli import COMMANDS
from lamina.evaluation import evaluate_model
from models.saved import read_saved

ROOT = Path(__file__).parents[2]
HELP = [
    (),
    *((name,) for name in COMMANDS),
    ("data", "prepare"),
    ("data", "prepare", "emoji"),
    ("client", "list"),
    ("client", "revoke"),
]
USAGE, NO_BROKER, STOPPED = 2, 69, 130


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: a bundle, a final model, and folders with and without examples."""
    folder = tmp_path_factory.mktemp("cli")
    world = World.of(tmp_path_factory)
    (folder / "bundles").mkdir()
    shutil.copytree(world.folder, folder / "bundles" / "small")
    shutil.copytree(world.data, folder / "examples")
    write_final(world.folder, world.values, folder / "model")
    (folder / "empty").mkdir()
    (folder / "rows").mkdir()
    (folder / "rows" / "table.csv").write_text("image,text\n")
    (folder / "captions").mkdir()
    (folder / "captions" / "table.csv").write_text("image,caption\na.png,a fox\n")
    (folder / "no" / "clients").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def closed() -> Iterator[str]:
    """A broker's address that nobody listens on, nor will while this test has it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"mqtt://127.0.0.1:{taken.getsockname()[1]}"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    stdout: str
    stderr: str
    returncode: int


def environment(folder: Path) -> dict[str, str]:
    ours = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "80"}
    return {name: value for name, value in os.environ.items() if not name.startswith("LAMINA_")} | ours


def python(folder: Path, *arguments: str) -> Done:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return Done(done.stdout, done.stderr, done.returncode)


def lamina(folder: Path, *words: str) -> Done:
    """The command in a process of its own."""
    return python(folder, "-m", "lamina", *words)


ONE_BY_ONE = """
import contextlib, io, json, logging, sys, traceback
from lamina.cli import main
for words in json.loads(sys.argv[1]):
    logging.root.handlers.clear()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["lamina", *words]
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.print_exc() or 1
    print(json.dumps([out.getvalue(), err.getvalue(), code]))
"""


def laminas(folder: Path, commands: Sequence[Sequence[str]]) -> list[Done]:
    """One command after the other in one process, which saves the time of starting it."""
    done = python(folder, "-c", ONE_BY_ONE, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return [Done(*json.loads(line)) for line in done.stdout.splitlines()]


def assert_refused(done: Done, exit_code: int, *facts: str) -> None:
    assert done.stdout == ""
    assert done.stderr.startswith("lamina: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    for fact in facts:
        assert fact in done.stderr
    assert done.returncode == exit_code, done.stderr


@pytest.fixture(scope="module")
def helps(folder: Path) -> dict[tuple[str, ...], Done]:
    return dict(zip(HELP, laminas(folder, [[*words, "--help"] for words in HELP]), strict=True))


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help(helps, words):
    done = helps[words]
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.split("\n")
    assert lines[0].startswith(" ".join(["Usage: lamina", *words, "[OPTIONS]"]))
    assert lines[2].strip()[0].isupper()
    assert max(map(len, lines)) <= 80
    if not words:
        names = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line]
        assert names == list(COMMANDS)


def test_what_lamina_client_can_do_besides(helps):
    told = helps[("client",)].stdout
    assert "--broker" in told
    for name in ("list", "revoke"):
        assert f"  lamina client {name} " in told
        assert "--dir" in helps[("client", name)].stdout


def test_the_version(folder):
    done = lamina(folder, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert importlib.metadata.version("lamina") in done.stdout


CLIENT = ("client", "--broker", "BROKER", "--data", "examples", "--dir", "state")
AGGREGATOR = ("aggregator", "--broker", "BROKER", "--bundle", "bundles/small", "--dir", "state")
TLS = ("client", "--broker", "mqtts://127.0.0.1:9", "--data", "examples", "--dir", "state")
ROWS = ("--model", "tiny", "--data", "captions", "--column", "text=caption", "--out", "out")
MISTAKES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    # The command and its options.
    (("clinet",), ("there is no command 'clinet'", "did you mean client?")),
    (("abacus",), ("there is no command 'abacus'", "choose one of run, data, export")),
    (("data", "prepar"), ("prepar", "prepare")),
    (("--nosuch",), ("--nosuch",)),
    (("client", "--brokr", "x"), ("--brokr", "--broker")),
    (("client",), ("--broker",)),
    (("client", "--broker", "mqtt://here"), ("--data",)),
    (("client", "--broker"), ("--broker", "argument")),
    (("aggregator",), ("--broker",)),
    (("evaluate",), ("MODEL",)),
    (("evaluate", "model"), ("--data",)),
    (("run", "--schedule", "fast"), ("--schedule", "fast", "layerwise")),
    ((*CLIENT, "--threads", "many"), ("--threads", "many")),
    ((*CLIENT, "--dir", "examples/table.csv"), ("--dir", "examples/table.csv")),
    ((*CLIENT, "more"), ("more",)),
    # Names and addresses.
    ((*CLIENT, "--name", "a/b"), ("the client's name 'a/b'", "letters, digits")),
    ((*CLIENT, "--run", "+"), ("the run's name '+'",)),
    ((*AGGREGATOR, "--name", "a b"), ("the run's name 'a b'",)),
    ((*CLIENT, "--broker", ""), ("''", "mqtt://host:1883")),
    ((*CLIENT, "--broker", "here"), ("'here'", "mqtt://host:1883")),
    ((*CLIENT, "--broker", "mqtt://"), ("'mqtt://'", "mqtt://host:1883")),
    ((*CLIENT, "--broker", "mqtt://here:port"), ("mqtt://here:port", "mqtt://host:1883")),
    ((*CLIENT, "--broker", "mqtt://here:65536"), ("mqtt://here:65536", "mqtt://host:1883")),
    ((*CLIENT, "--broker", "mqtt://[::1"), ("mqtt://[::1", "mqtt://host:1883")),
    ((*CLIENT, "--broker", "mqtt://here?version=3"), ("version 3",)),
    ((*AGGREGATOR, "--broker", "http://here"), ("'http://here'", "mqtt://host:1883")),
    (("run", "--data", "no", "--broker", "here/there"), ("'here/there'", "mqtt://host:1883")),
    # Who is who.
    ((*CLIENT, "--ca", "nowhere"), ("is without TLS", "mqtts://")),
    ((*TLS, "--ca", "nowhere"), ("nowhere cannot be read", "--ca, --cert and --key")),
    ((*TLS, "--ca", "examples/table.csv"), ("examples/table.csv holds no certificate",)),
    ((*TLS, "--cert", "examples/table.csv"), ("belong together", "give both --cert and --key")),
    ((*CLIENT, "--owner", "nowhere"), ("nowhere cannot be read",)),
    ((*CLIENT, "--owner", "examples/table.csv"), ("is not an owner's public key", "owner.pub")),
    ((*AGGREGATOR, "--owner", "examples/table.csv"), ("is not an owner's public key",)),
    (("provision", "new"), ("where will the broker be?", "--broker-host 192.0.2.10")),
    (("provision", "new", "--broker-host", "mqtts://here"), ("'mqtts://here' is not a host",)),
    (("provision", "new", "--broker-host", "here", "--client", "a/b"), ("the client's name 'a/b'",)),
    (("provision", "new", "--broker-host", "here", "--client", "Broker"), ("cannot be called 'Broker'",)),
    (("provision", "examples", "--broker-host", "here"), ("examples holds something else",)),
    (("client", "list", "--dir", "examples"), ("examples was not made by lamina provision",)),
    (("client", "list"), ("--dir",)),
    (("client", "revoke", "ann", "--dir", "nowhere"), ("nowhere was not made by lamina provision",)),
    (("client", "revoke", "--dir", "nowhere"), ("NAME",)),
    (("client", "lst"), ("--broker",)),
    (("sign", "nowhere", "--key", "owner.key"), ("nowhere holds no bundle",)),
    (("sign", "bundles/small", "--key", "nowhere"), ("nowhere cannot be read", "--key")),
    (("sign", "bundles/small", "--key", "examples/table.csv"), ("is not an owner's private key",)),
    # Data.
    ((*CLIENT, "--data", "nowhere"), ("there is no folder nowhere",)),
    ((*CLIENT, "--data", "empty"), ("empty holds neither table.csv nor table.parquet",)),
    ((*CLIENT, "--data", "rows"), ("rows/table.csv has no rows",)),
    ((*CLIENT, "--column", "caption"), ("--column caption has no =", "--column name=value")),
    ((*AGGREGATOR, "--holdout", "empty"), ("empty holds neither",)),
    ((*AGGREGATOR, "--holdout", "captions"), ("no column 'text'", "'caption'", "--column text=")),
    ((*AGGREGATOR, "--holdout", "examples", "--column", "text"), ("--column text has no =",)),
    (("evaluate", "model", "--data", "nowhere"), ("there is no folder nowhere",)),
    (("evaluate", "model", "--data", "captions"), ("no column 'text'", "--column text=")),
    (("run", "--data", "nowhere"), ("nowhere has no clients/<name>/",)),
    (("run", "--data", "examples"), ("examples has no clients/<name>/", "lamina data prepare")),
    (("run", "--data", "no"), ("no has no clients/<name>/",)),
    (("export", "--data", "empty", "--out", "out"), ("empty holds neither",)),
    (
        ("export", "--model", "digits", "--data", "captions"),
        ("digits tells classes apart", "--data FOLDER"),
    ),
    (("export", "--option", "task=classification"), ("tiny tells classes apart", "--data FOLDER")),
    (("export", "--memory-budget", "200"), ("'200' is not an amount of memory", "write 200MB")),
    (("run", "--memory-budget", "much"), ("'much' is not an amount of memory",)),
    (
        ("export", "--memory-budget", "1GB", "--micro-batch-size", "8"),
        ("--memory-budget chooses --micro-batch-size",),
    ),
    (
        ("export", "--memory-budget", "1GB", "--batch-size", "65"),
        ("--batch-size 65 is over --max-batch-size 64",),
    ),
    (("plan", "nowhere"), ("nowhere holds no bundle", "lamina export")),
    (("plan",), ("BUNDLE",)),
    (("plan", "bundles/small", "--batch-size", "0"), ("--batch-size", "0")),
    (
        ("plan", "bundles/small", "--engine", "executorch"),
        ("no files for the engine executorch", "choose onnx"),
    ),
    # Bundles and models.
    (("aggregator", "--broker", "BROKER"), ("bundle holds no bundle", "lamina export")),
    ((*AGGREGATOR, "--bundle", "nowhere"), ("nowhere holds no bundle",)),
    ((*AGGREGATOR, "--bundle", "examples"), ("examples holds no bundle",)),
    (("run", "--bundle", "nowhere"), ("nowhere holds no bundle", "lamina export")),
    (("run", "--bundle", "bundles/small", "--model", "tiny"), ("--model was decided when", "leave it out")),
    (("run", "--bundle", "bundles/small", "--engine", "executorch"), ("executorch", "onnx")),
    (("evaluate", "nowhere", "--data", "examples"), ("nowhere holds no trained model",)),
    (("evaluate", "examples", "--data", "examples"), ("examples holds no trained model",)),
    (("export", "--model", "tinny", "--data", "captions"), ("no model 'tinny'", "did you mean tiny?")),
    (("export", "--micro-batch-size", "some"), ("some is not a number", "--micro-batch-size 8,16,16")),
    (("export", "--micro-batch-size", "8,8", *ROWS), ("2 sizes of micro-batches for 4 stages",)),
    (("export", "--micro-batch-size", "65", *ROWS), ("micro-batches of 65, 65, 65, 65", "has 64")),
    (("export", "--micro-batch-size", "-1", *ROWS), ("micro-batches of -1, -1", "from 0")),
    # Settings of a run.
    ((*AGGREGATOR, "--fraction-train", "2"), ("fraction_train is 2.0", "at most 1")),
    ((*AGGREGATOR, "--rounds", "-1"), ("rounds is -1", "0 or more")),
    ((*AGGREGATOR, "--rounds", "x"), ("--rounds", "x")),
    ((*AGGREGATOR, "--learning-rate", "nan"), ("learning_rate is nan",)),
    ((*AGGREGATOR, "--aggregation", "mean"), ("--aggregation", "mean")),
    ((*AGGREGATOR, "--malicious-fraction", "0.5"), ("malicious_fraction is 0.5", "less than 0.5")),
    ((*AGGREGATOR, "--chunk-bytes", "1"), ("1 bytes", "1024")),
]


@pytest.fixture(scope="module")
def mistakes(folder: Path, closed: str) -> list[Done]:
    commands = [[closed if word == "BROKER" else word for word in words] for words, _ in MISTAKES]
    return laminas(folder, commands)


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda number: " ".join(MISTAKES[number][0]))
def test_a_mistake_is_one_line_and_exit_code_2(folder, mistakes, number):
    assert_refused(mistakes[number], USAGE, *MISTAKES[number][1])
    assert not (folder / "state" / "blobs").exists()  # nothing was begun


@pytest.mark.parametrize(
    "number", range(0, len(MISTAKES), 8), ids=lambda number: " ".join(MISTAKES[number][0])
)
def test_a_process_of_its_own_says_the_same(folder, closed, mistakes, number):
    done = lamina(folder, *(closed if word == "BROKER" else word for word in MISTAKES[number][0]))
    assert done == mistakes[number]


@pytest.mark.parametrize("command", [CLIENT, AGGREGATOR], ids=["client", "aggregator"])
def test_without_a_broker_the_exit_code_is_69(folder, tmp_path, closed, command):
    address = closed.replace("mqtt://", "mqtt://ann:secret@")
    done = lamina(folder, *command[:1], *command[3:-1], str(tmp_path / "state"), "--broker", address)
    assert_refused(done, NO_BROKER, f"no broker at {closed}", "refused", "lamina broker")
    assert "secret" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [CLIENT, AGGREGATOR], ids=["client", "aggregator"])
def test_ctrl_c_while_it_connects(folder, tmp_path, command, number):
    """To a server that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"mqtt://127.0.0.1:{server.getsockname()[1]}"
        arguments = *command[:1], *command[3:-1], str(tmp_path / "state"), "--broker", address
        with subprocess.Popen(
            [sys.executable, "-m", "lamina", *arguments],
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            server.settimeout(60)
            peer, _ = server.accept()
            with peer:
                process.send_signal(number)
                out, err = process.communicate(timeout=60)
    assert (out, err.strip(), process.returncode) == ("", "", STOPPED)


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str | bytes], list[str]]:
    """Write a file of options; the words that name it."""
    numbers = count()

    def write(text: str | bytes) -> list[str]:
        path = tmp_path / f"options{next(numbers)}.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", str(path)]

    return write


def test_a_config_file_gives_options(folder, tmp_path, closed, config):
    client = f'broker = "{closed}"\ndata = "{folder}/examples"\nname = "ann"\nthreads = 1\n'
    aggregator = f'broker = "{closed}"\nbundle = "{folder}/bundles/small"\n'
    done = laminas(
        folder,
        [
            ["client", *config(client), "--dir", str(tmp_path / "state")],
            ["client", *config(client.replace("ann", "a/b"))],
            ["aggregator", *config(aggregator + f'holdout = "{folder}/empty"\n')],
            ["aggregator", *config(aggregator + "fraction-train = 1.5\n")],
            ["aggregator", *config(aggregator + "fraction_train = 2.5\n")],
            [
                "aggregator",
                *config(aggregator + f'holdout = "{folder}/examples"\n[column]\ntext = "nosuch"\n'),
            ],
        ],
    )
    assert_refused(done[5], USAGE, "no column 'nosuch'")
    assert_refused(done[0], NO_BROKER, closed)
    assert (tmp_path / "state").exists()
    assert_refused(done[1], USAGE, "the client's name 'a/b'")
    assert_refused(done[2], USAGE, "empty holds neither")
    assert_refused(done[3], USAGE, "fraction_train is 1.5")
    assert_refused(done[4], USAGE, "fraction_train is 2.5")


def test_a_path_in_a_config_file_starts_at_its_folder(folder, tmp_path, closed):
    """One on the command line starts where the command does, as ever."""
    shutil.copytree(folder / "examples", tmp_path / "here" / "examples")
    options = tmp_path / "here" / "client.toml"
    options.write_text(f'broker = "{closed}"\ndata = "examples"\ndir = "state"\n')
    beside, other = laminas(
        tmp_path,
        [["client", "--config", str(options)], ["client", "--config", str(options), "--data", "here"]],
    )
    assert_refused(beside, NO_BROKER, closed)
    assert (tmp_path / "here" / "state" / "blobs").is_dir()
    assert_refused(other, USAGE, "here holds neither")
    exported = tmp_path / "here" / "export.toml"
    exported.write_text('data = ["examples", "empty"]\n')
    (listed,) = laminas(tmp_path, [["export", "--config", str(exported)]])
    assert_refused(listed, USAGE, f"there is no folder {tmp_path / 'here' / 'empty'}")


def test_the_command_line_comes_first(folder, tmp_path, closed, config):
    options = config('broker = "http://there"\ndata = "empty"\nname = "a/b"\n')
    given = ["--broker", closed, "--data", "examples", "--dir", str(tmp_path / "state")]
    before, after, name_left = laminas(
        folder,
        [
            ["client", *options, *given, "--name", "ann"],
            ["client", *given, "--name", "ann", *options],
            ["client", *given, *options],
        ],
    )
    assert_refused(before, NO_BROKER, closed)
    assert_refused(after, NO_BROKER, closed)
    assert_refused(name_left, USAGE, "the client's name 'a/b'")


def test_a_config_file_that_cannot_be_used(folder, tmp_path, closed, config):
    files: dict[str | bytes, tuple[str, ...]] = {
        "brokr = 'mqtt://here'\n": ("options0.toml: there is no option 'brokr'", "lamina client --help"),
        "[client]\nname = 'ann'\n": ("options1.toml: there is no option 'client'",),
        "broker =\n": ("options2.toml cannot be read", "line 1"),
        b"broker = '\xff'\n": ("options3.toml cannot be read",),
        "threads = 'many'\n": ("--threads", "many"),
        "name = 5.5\nrun = '#'\n": ("the run's name '#'",),
        "name = ['ann']\n": ("options6.toml: name cannot be ['ann']",),
        "config = 'other.toml'\n": ("there is no option 'config'",),
    }
    needed = ["--broker", closed, "--data", "examples"]
    commands = [["client", *config(text), *needed] for text in files]
    commands += [["client", "--config", path] for path in (str(tmp_path / "nowhere.toml"), str(tmp_path))]
    expected = [*files.values(), ("nowhere.toml cannot be read",), ("--config", "directory")]
    for done, facts in zip(laminas(folder, commands), expected, strict=True):
        assert_refused(done, USAGE, *facts)


def test_evaluate_prints_the_metrics(folder, tmp_path_factory, tmp_path):
    dataset = World.of(tmp_path_factory).dataset(tmp_path / "inputs")
    expected = evaluate_model(folder / "model", read_saved(folder / "model"), dataset, 1)
    command = ["evaluate", "model", "--data", "examples"]
    as_json, as_table = laminas(folder, [[*command, "--json"], command])
    assert (as_json.returncode, as_json.stderr) == (as_table.returncode, as_table.stderr) == (0, "")
    assert json.loads(as_json.stdout) == expected
    lines = [line.split() for line in as_table.stdout.splitlines()]
    assert lines == [[name, f"{100 * value:.1f}%"] for name, value in expected.items()]


def test_what_a_device_does_not_load(folder, tmp_path, closed):
    """Nor does an aggregator load torch."""
    program = """
import sys
from lamina.cli import main
def loaded(*words):
    sys.argv = ["lamina", *words]
    try:
        main()
    except SystemExit as end:
        names = {"torch", "onnx", "onnxscript", "rich", "cryptography"}
        print(*sorted(names & set(sys.modules)), end.code, sep=",")
broker, client, aggregator = sys.argv[1:]
import lamina.client_command, edge_client.session
loaded("client", "--help")
loaded("client", "--broker", broker, "--data", "examples", "--dir", client)
loaded("aggregator", "--broker", broker, "--bundle", "bundles/small", "--holdout", "examples",
    "--dir", aggregator)
"""
    done = python(folder, "-c", program, closed, str(tmp_path / "client"), str(tmp_path / "aggregator"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["0", "69", "onnx,rich,69"]
