"""A run behind each kind of bad link, and behind one that is bad in every way, ends like any other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kills import equal
from ledger import disagreements
from programs import CLIENTS, Aggregator, Mosquitto, Programs
from proxy import Faults, Proxy

from aggregator.events import RoundClosed, RoundOpened, RunClosed
from wire.messages import RoundKey
from wire.mqtt import Broker, Connection, Packet

ALL = ("--min-available-clients", "3", "--min-updates", "3", "--round-deadline-s", "3600")
OPTIONS = (*ALL, "--chunk-bytes", "8192", "--log-format", "json")  # many packets
LOGIN = "ann:hunter2-and-more"

LINKS = {
    "late": Faults(delay_s=0.005, jitter_s=0.02),
    "lossy": Faults(drop=0.005, acknowledged=1.0),
    "silent": Faults(drop=0.001, acknowledged=0.0),
    "repeating": Faults(duplicate=0.2),
    "overtaking": Faults(hold=0.1, hold_s=0.3),
    "torn": Faults(cut=0.002, refuse_s=0.3),
    "halting": Faults(stall=0.01, stall_s=0.5),
    "bad": Faults(
        delay_s=0.001,
        jitter_s=0.01,
        cut=0.001,
        refuse_s=0.3,
        stall=0.002,
        stall_s=0.3,
        drop=0.003,
        acknowledged=1.0,
        duplicate=0.05,
        hold=0.03,
    ),
}
DOES = {
    "late": ("pass",),
    "lossy": ("drop",),
    "silent": ("drop in silence",),
    "repeating": ("duplicate",),
    "overtaking": ("hold",),
    "torn": ("cut",),
    "halting": ("stall",),
    "bad": ("cut", "stall", "drop", "duplicate", "hold"),
}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, data: Path, bundle: Path
) -> dict[str, np.ndarray]:
    """The final parameters of a run in which nothing goes wrong."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with contextlib.ExitStack() as stack:
        broker = mosquitto_or_skip(folder)
        stack.callback(broker.kill)
        programs = Programs(folder, data, bundle, stack)
        aggregator = programs.aggregator(broker.url, "run", *ALL)
        programs.clients(broker.url)
        aggregator.until_a(RunClosed)
        return aggregator.final()


def mosquitto_or_skip(folder: Path) -> Mosquitto:
    from programs import mosquitto

    if mosquitto() is None:
        pytest.skip("mosquitto is not installed; .ci/run installs it")
    return Mosquitto.plain(folder)


def start(programs: Programs, url: str) -> Aggregator:
    """An aggregator and its clients, who come with a password, which the broker does not look at."""
    url = url.replace("//", f"//{LOGIN}@")
    aggregator = programs.aggregator(url, "run", *OPTIONS)
    for client in CLIENTS:
        programs.client(url, client, "run", "--log-format", "json")
    return aggregator


def check(aggregator: Aggregator, folder: Path, undisturbed: dict[str, np.ndarray]) -> None:
    """All that must hold of a run that is over, whatever happened to it."""
    assert [event.accepted for event in aggregator.all(RoundClosed)] == [CLIENTS] * 4
    assert equal(aggregator.final(), undisturbed)
    logs = [folder / f"run-{client}.log" for client in CLIENTS]
    assert list(disagreements(aggregator.folder, logs, CLIENTS)) == []
    for log in (*logs, aggregator.log):
        text = log.read_text()
        assert LOGIN.split(":")[1] not in text
        for line in text.splitlines():
            record = json.loads(line)
            assert record.keys() >= {"time", "level", "logger", "message"}
            assert record["level"] != "CRITICAL", line


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("link", LINKS)
def test_a_bad_link_changes_nothing(
    programs: Programs,
    real_broker: Mosquitto,
    undisturbed: dict[str, np.ndarray],
    tmp_path: Path,
    link: str,
) -> None:
    with Proxy(real_broker.port, LINKS[link], seed=1) as proxy:
        aggregator = start(programs, proxy.url)
        aggregator.until_a(RunClosed)
        assert all(proxy.total(action) >= 1 for action in DOES[link]), proxy.counts
        check(aggregator, tmp_path, undisturbed)


def test_a_link_that_is_down_while_the_broker_forgets_everything(
    programs: Programs, real_broker: Mosquitto, undisturbed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with Proxy(real_broker.port) as proxy:
        aggregator = start(programs, proxy.url)
        for key in (RoundKey(0, 0), RoundKey(1, 0)):
            aggregator.until_a(RoundOpened, key)
            proxy.restart(down_s=3)  # a client comes back after one second to two, and is refused
            real_broker.kill()
            real_broker.start()
        aggregator.until_a(RunClosed)
        assert proxy.counts["refused"] >= 1
        check(aggregator, tmp_path, undisturbed)
    lost = [line for line in aggregator.text().splitlines() if '"lost mqtt' in line]
    assert len(lost) >= 2
    assert {json.loads(line)["broker"] for line in lost} == {proxy.url}


def test_a_publish_whose_acknowledgement_stays_away_is_sent_again(
    real_broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a broker that throttles: it would wait as long as the connection holds."""
    monkeypatch.setattr("wire.mqtt.ACK_S", 0.5)

    async def main(proxy: Proxy) -> None:
        async with (
            Connection(Broker.parse(real_broker.url), "listener") as listener,
            Connection(Broker.parse(proxy.url), "ann") as ann,
        ):
            await listener.subscribe("t/#")
            proxy.faults = Faults(drop=1.0, acknowledged=0.0)
            begin = time.monotonic()
            waiting = [asyncio.ensure_future(ann.publish(f"t/{n}", bytes([n + 1]))) for n in range(3)]
            await asyncio.to_thread(until, lambda: proxy.total("drop in silence") >= 3)
            proxy.faults = Faults()
            await asyncio.gather(*waiting)
            assert time.monotonic() - begin > 0.5
            got = {await listener.packet() for _ in range(3)}
            assert got == {Packet(f"t/{n}", bytes([n + 1])) for n in range(3)}
            begin = time.monotonic()
            await ann.publish("t/4", b"4")
            assert time.monotonic() - begin < 0.5

    with Proxy(real_broker.port) as proxy:
        asyncio.run(asyncio.wait_for(main(proxy), 30))
