"""A run in which programs are killed at random instants, beside the same run without.

    python tests/faults/kills.py --kills 50 --seed 0

Rules:
- Everything is real: a mosquitto that keeps nothing on disk, an aggregator, three clients. A kill is
  SIGKILL; it hits the aggregator, the broker or a client, and now and then two of them at once. Each is
  started again after a pause, as a service manager would do; so is one that ends because it found no broker
  (exit code 69).
- Who is killed, when, and for how long it stays away comes from the seed. The instant is a number of
  rounds: 12.3 is three tenths of an undisturbed round's time after round 12 was opened. So the kills spread
  over the whole run however long it takes, and each lands while it goes on.
- Deadlines are so long that every round has every client. The schedule is then deterministic, and the final
  parameters must equal the undisturbed run's bit for bit; the books must agree with the clients' logs.

Next: `tests/faults/ledger.py`, the check of the books; `tests/faults/soak.py`, an hour of such runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import IO

if (tests := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.insert(0, tests)

import msgspec
import numpy as np
from ledger import disagreements, read_books, read_logs
from programs import CLIENTS, Mosquitto
from proxy import Faults, Proxy
from safetensors.numpy import load_file

from aggregator.events import Event, RoundClosed, RoundOpened, from_json
from lamina.processes import last_line

AGGREGATOR, BROKER = "aggregator", "broker"
KINDS = (AGGREGATOR, BROKER, "client")
STAGES = 2
TWO_AT_ONCE = 0.2
PAUSE_S = 1.5
NO_BROKER = 69
RETRY_S = 0.5
POLL_S = 0.02
GRACE_S = 20.0
PLAN = {
    "min-available-clients": len(CLIENTS),
    "min-updates": len(CLIENTS),
    "round-deadline-s": 86_400,
    "batch-size": 8,
    "local-epochs": 20,
    "announce-s": 1,
    "heartbeat-s": 2,
    "chunk-bytes": 16_384,
}


@dataclass(frozen=True)
class Kill:
    """at: rounds since the run began. pauses_s: how long each victim stays away."""

    at: float
    victims: tuple[str, ...]
    pauses_s: tuple[float, ...]


def plan_kills(seed: int, num_kills: int, rounds: int) -> list[Kill]:
    """At instants drawn evenly from the whole run."""
    dice = random.Random(seed)
    kills = []
    for at in sorted(dice.uniform(0, rounds) for _ in range(num_kills)):
        chosen = dice.sample(KINDS, 2 if dice.random() < TWO_AT_ONCE else 1)
        victims = tuple(dice.choice(CLIENTS) if kind == "client" else kind for kind in chosen)
        kills.append(Kill(at, victims, tuple(dice.uniform(0, PAUSE_S) for _ in victims)))
    return kills


class RunFailed(Exception):
    """A program ended as it must not, or the run did not end."""


class Service:
    """A `lamina` command that is started again when it was killed or found no broker."""

    def __init__(self, name: str, log: Path, *arguments: str) -> None:
        self.name = name
        self.log = log
        self.no_broker = 0  # how often it ended so
        self._arguments = arguments
        self._again_s = 0.0
        self._start()

    @property
    def is_up(self) -> bool:
        return self.process.poll() is None

    @property
    def is_done(self) -> bool:
        return self.process.poll() == 0

    def kill(self, pause_s: float) -> None:
        self.process.kill()
        self.process.wait()
        self._again_s = time.monotonic() + pause_s

    def tend(self) -> None:
        """Start it again if it is time. Raises `RunFailed` where it has ended by a fault of its own."""
        code = self.process.poll()
        if code is None or code == 0:
            return
        if code == NO_BROKER and self._again_s == 0.0:
            self.no_broker += 1
            self._again_s = time.monotonic() + RETRY_S
        elif code not in (NO_BROKER, -signal.SIGKILL):
            raise RunFailed(f"{self.name} ended with exit code {code}: {last_line(self.log)}")
        if time.monotonic() >= self._again_s:
            self._start()

    def stop(self) -> None:
        """Wait for its end, and hasten it at last. Raises `RunFailed` for an exit code that is no good."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S / 4)
        self.process.terminate()  # one that was away when the run ended waits for the next
        code = self.process.wait(GRACE_S)
        if code not in (0, 130, NO_BROKER, -signal.SIGKILL):  # the last two: it was away
            raise RunFailed(f"{self.name} ended with exit code {code}: {last_line(self.log)}")

    def _start(self) -> None:
        self._again_s = 0.0
        with self.log.open("ab") as log:
            log.write(b"\n")  # a killed process may have left half a line
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lamina", *self._arguments, "--log-format", "json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, stdout: IO[bytes]) -> None:
        with stdout:
            for line in stdout:
                self.take(line)

    def take(self, line: bytes) -> None:
        """A line that the program printed."""


class Aggregator(Service):
    """Its events, as they come."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        super().__init__(AGGREGATOR, log, *arguments)

    def take(self, line: bytes) -> None:
        with contextlib.suppress(msgspec.MsgspecError):  # half a line of a killed process
            self.events.put(from_json(line))


class Broker:
    """A mosquitto that is started again when it was killed."""

    def __init__(self, folder: Path) -> None:
        self._mosquitto = Mosquitto.plain(folder)
        self.port = self._mosquitto.port
        self._again_s = 0.0

    @property
    def is_up(self) -> bool:
        return self._mosquitto.process.poll() is None

    def kill(self, pause_s: float) -> None:
        self._mosquitto.kill()
        self._again_s = time.monotonic() + pause_s

    def tend(self) -> None:
        if not self.is_up and time.monotonic() >= self._again_s:
            self._mosquitto.start()


@dataclass
class Progress:
    """How far the run is, in rounds. round_s: of an undisturbed one; 0: not known."""

    rounds_of_a_stage: int
    round_s: float = 0.0
    closed: int = 0
    opened: int = -1
    opened_s: float = 0.0
    instants_s: list[float] = field(default_factory=list)  # of the first opening of each round

    def take(self, event: Event) -> None:
        if not isinstance(event, RoundOpened | RoundClosed):
            return
        number = event.key.stage * self.rounds_of_a_stage + event.key.round
        if isinstance(event, RoundClosed):
            self.closed = max(self.closed, number + 1)
        elif number > self.opened:
            self.opened, self.opened_s = number, time.monotonic()
            self.instants_s.append(self.opened_s)

    def is_at(self, at: float) -> bool:
        """Whether so many rounds have gone by."""
        whole = int(at)
        since_s = time.monotonic() - self.opened_s
        return self.closed > whole or (
            self.closed == self.opened == whole and since_s >= (at - whole) * self.round_s
        )


@dataclass
class Outcome:
    """What happened in a run. final: torch name -> float32. round_s: median time of a round."""

    final: dict[str, np.ndarray]
    rounds: int
    updates: int
    seconds: float
    round_s: float
    kills: Counter[str] = field(default_factory=Counter)  # by kind, and "two at once"
    no_broker: int = 0
    proxied: dict[str, int] = field(default_factory=dict)
    broken_lines: int = 0
    disagreements: list[str] = field(default_factory=list)


def conduct(
    folder: Path,
    data: Path,
    bundle: Path,
    *,
    rounds: int,
    kills: Sequence[Kill] = (),
    round_s: float = 0.0,
    faults: Faults | None = None,
    seed: int = 0,
    compression: str = "none",
    limit_s: float = 1200.0,
) -> Outcome:
    """A run of `rounds` rounds in all, with these kills. Raises `RunFailed`."""
    folder.mkdir(parents=True)
    plan = {**PLAN, "rounds": rounds // STAGES, "compression": compression}
    progress = Progress(rounds // STAGES, round_s)
    counts: Counter[str] = Counter()
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        broker = Broker(folder)
        stack.callback(broker.kill, 0.0)
        url, proxy = f"mqtt://127.0.0.1:{broker.port}", None
        if faults is not None:
            proxy = stack.enter_context(Proxy(broker.port, faults, seed))
            url = proxy.url
        aggregator = Aggregator(
            folder / "aggregator.log",
            *(
                "aggregator",
                "--broker",
                url,
                "--bundle",
                str(bundle),
                "--name",
                "run",
                "--json",
                "--resume",
            ),
            *("--dir", str(folder / "aggregator")),
            *(word for name, value in plan.items() for word in (f"--{name}", str(value))),
        )
        stack.callback(aggregator.kill, 0.0)
        services: dict[str, Service | Broker] = {AGGREGATOR: aggregator, BROKER: broker}
        for client in CLIENTS:
            services[client] = service = Service(
                client,
                folder / f"{client}.log",
                *("client", "--broker", url, "--data", str(data / "clients" / client), "--run", "run"),
                *("--name", client, "--dir", str(folder / client), "--threads", "1"),
            )
            stack.callback(service.kill, 0.0)

        waiting = list(kills)
        while not aggregator.is_done:
            if time.monotonic() - begin > limit_s:
                raise RunFailed(f"not done after {limit_s:.0f} s, {progress.closed} of {rounds} rounds are")
            with contextlib.suppress(queue.Empty):
                progress.take(aggregator.events.get(timeout=POLL_S))
            for service in services.values():
                service.tend()
            if waiting and progress.is_at(waiting[0].at):
                victims = [services[name] for name in waiting[0].victims]
                if all(victim.is_up for victim in victims):
                    kill = waiting.pop(0)
                    for victim, pause_s in zip(victims, kill.pauses_s, strict=True):
                        victim.kill(pause_s)
                    counts.update("client" if name in CLIENTS else name for name in kill.victims)
                    counts["kills"] += 1
                    counts["two at once"] += len(victims) == 2
        seconds = time.monotonic() - begin
        clients = [services[client] for client in CLIENTS]
        for client in clients:
            assert isinstance(client, Service)
            client.stop()
    logs = [folder / f"{client}.log" for client in CLIENTS]
    combined, accepted = read_books(folder / "aggregator")
    gaps = [after - before for before, after in pairwise(progress.instants_s)]
    return Outcome(
        final=load_file(folder / "aggregator" / "model" / "model.safetensors"),
        rounds=len(combined),
        updates=len(accepted),
        seconds=seconds,
        round_s=median(gaps),
        kills=counts,
        no_broker=sum(one.no_broker for one in services.values() if isinstance(one, Service)),
        proxied=_proxied(proxy),
        broken_lines=read_logs(logs).broken,
        disagreements=list(disagreements(folder / "aggregator", logs, CLIENTS)),
    )


def _proxied(proxy: Proxy | None) -> dict[str, int]:
    """What the proxy did, both directions together."""
    actions = ("pass", "cut", "stall", "drop", "drop in silence", "duplicate", "hold")
    return {} if proxy is None else {action: proxy.total(action) for action in actions}


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def lines(outcome: Outcome, undisturbed: Outcome) -> Iterator[str]:
    """The table."""
    kills = outcome.kills
    by_kind = ", ".join(f"{kind} {kills[kind]}" for kind in KINDS)
    yield f"kills    {kills['kills']}, of which {kills['two at once']} of two at once: {by_kind}"
    yield f"rounds   {outcome.rounds} in {outcome.seconds:.0f} s; undisturbed {undisturbed.seconds:.0f} s"
    yield f"restarts {outcome.no_broker} because no broker was there"
    if outcome.proxied:
        yield "packets  " + ", ".join(f"{name} {number}" for name, number in outcome.proxied.items())
    for line in outcome.disagreements:
        yield f"books    {line}"
    if not outcome.disagreements:
        yield f"books    agree with the clients' logs: {outcome.updates} updates"
    same = equal(outcome.final, undisturbed.final)
    yield f"final    {'equal to' if same else 'OTHER THAN'} the undisturbed run's, bit for bit"


def main() -> int:
    """The exit code."""
    from real_run import write_bundle, write_data

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="in all, an even number; default: one a kill")
    parser.add_argument("--compression", choices=["none", "float16", "int8"], default="none")
    parser.add_argument("--dir", type=Path, help="where everything is left, logs too; default: nowhere")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    arguments = parser.parse_args()
    rounds = arguments.rounds or max(6, arguments.kills + arguments.kills % 2)
    with contextlib.ExitStack() as stack:
        folder = arguments.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = write_data(folder / "data")
        bundle = write_bundle(folder / "bundle", data)
        settings = {"rounds": rounds, "compression": arguments.compression}
        try:
            undisturbed = conduct(folder / "undisturbed", data, bundle, **settings)
            outcome = conduct(
                folder / "killed",
                data,
                bundle,
                kills=plan_kills(arguments.seed, arguments.kills, rounds),
                round_s=undisturbed.round_s,
                seed=arguments.seed,
                **settings,
            )
        except RunFailed as error:
            print(error)
            return 1
    good = equal(outcome.final, undisturbed.final) and not outcome.disagreements
    if arguments.json:
        told = {name: value for name, value in vars(outcome).items() if name != "final"}
        print(json.dumps({"good": good, **told}))
    else:
        print(*lines(outcome, undisturbed), sep="\n")
    return not good


if __name__ == "__main__":
    sys.exit(main())
