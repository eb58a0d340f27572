"""What real devices do: vanish in the middle, come back, lose their broker, lose their aggregator."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from programs import CLIENTS, Aggregator, Programs, Started, paused, until

from aggregator.events import ClientLeft, RoundClosed, RoundOpened, RunClosed, RunOpened, UpdateAccepted
from wire.manifest import MANIFEST_NAME
from wire.messages import RoundKey

ALL = ("--min-available-clients", "3")
SLOW = ("--local-epochs", "60")  # some seconds of training


def keys(aggregator: Aggregator) -> list[RoundKey]:
    return [event.key for event in aggregator.all(RoundClosed)]


EVERY_ROUND = [RoundKey(0, 0), RoundKey(0, 1), RoundKey(1, 0), RoundKey(1, 1)]


@pytest.fixture
def undisturbed(programs: Programs, broker: Started) -> dict[str, np.ndarray]:
    """The final parameters of a run in which nothing goes wrong."""
    aggregator = programs.aggregator(broker.url, "undisturbed", *ALL)
    clients = programs.clients(broker.url, "undisturbed")
    aggregator.until_a(RunClosed)
    assert [client.end() for client in clients.values()] == [0, 0, 0]
    return aggregator.final()


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_a_client_killed_in_the_middle_of_a_round(programs: Programs, broker: Started) -> None:
    aggregator = programs.aggregator(broker.url, "run", *ALL, *SLOW, "--round-deadline-s", "20")
    clients = programs.clients(broker.url)
    opened = aggregator.until_a(RoundOpened)
    assert opened.cohort == CLIENTS
    time.sleep(0.3)
    begin = time.monotonic()
    clients["bob"].kill()

    closed = aggregator.until_a(RoundClosed)
    assert time.monotonic() - begin > 15, "the round is open until its deadline, for bob may come back"
    assert (closed.accepted, closed.missing) == (("ann", "cy"), ("bob",))
    assert [event.client for event in aggregator.all(ClientLeft)] == ["bob"], "the broker told it at once"

    clients["bob"] = programs.client(broker.url, "bob")
    closed = aggregator.until_a(RoundClosed)
    assert closed.accepted == CLIENTS
    aggregator.until_a(RunClosed)
    assert [client.end() for client in clients.values()] == [0, 0, 0]
    assert keys(aggregator) == EVERY_ROUND


def test_a_client_that_is_back_before_the_deadline_is_still_counted(
    programs: Programs, broker: Started, undisturbed: dict[str, np.ndarray]
) -> None:
    aggregator = programs.aggregator(broker.url, "run", *ALL)
    clients = programs.clients(broker.url)
    for _ in EVERY_ROUND:
        aggregator.until_a(RoundOpened)
        clients["cy"].again()
    aggregator.until_a(RunClosed)
    assert [event.accepted for event in aggregator.all(RoundClosed)] == [CLIENTS] * 4
    assert_equal(aggregator.final(), undisturbed)


def test_a_broker_that_forgets_everything(
    programs: Programs, broker: Started, undisturbed: dict[str, np.ndarray]
) -> None:
    aggregator = programs.aggregator(broker.url, "run", *ALL)
    programs.clients(broker.url)
    aggregator.until_a(RoundOpened)
    broker.again()
    aggregator.until_a(RoundOpened, RoundKey(1, 0))
    broker.again()
    aggregator.until_a(RunClosed)
    assert keys(aggregator) == EVERY_ROUND
    assert_equal(aggregator.final(), undisturbed)


@pytest.mark.parametrize("after", [RoundKey(0, 0), RoundKey(0, 1), RoundKey(1, 0)])
def test_an_aggregator_goes_on_where_it_was_killed(
    programs: Programs, broker: Started, undisturbed: dict[str, np.ndarray], after: RoundKey
) -> None:
    aggregator = programs.aggregator(broker.url, "run", *ALL)
    clients = programs.clients(broker.url)
    aggregator.until_a(RoundClosed, after)
    aggregator.kill()
    aggregator = programs.aggregator(broker.url, "run", *ALL, "--resume")
    aggregator.until_a(RunClosed)
    assert keys(aggregator) == EVERY_ROUND[EVERY_ROUND.index(after) + 1 :]
    assert [client.end() for client in clients.values()] == [0, 0, 0]
    assert_equal(aggregator.final(), undisturbed)


def test_an_aggregator_killed_in_the_middle_of_a_round_asks_nobody_again(
    programs: Programs, broker: Started, undisturbed: dict[str, np.ndarray]
) -> None:
    aggregator = programs.aggregator(broker.url, "run", *ALL)
    clients = programs.clients(broker.url)
    aggregator.until_a(RoundOpened)
    with paused(clients["cy"]):
        assert {aggregator.until_a(UpdateAccepted).client for _ in range(2)} == {"ann", "bob"}
        aggregator.kill()
        coming = aggregator.folder / "updates" / f"{'f' * 64}.3@dan.coming"
        coming.write_bytes(b"an upload that was under way")
        with paused(clients["ann"], clients["bob"]):
            aggregator = programs.aggregator(broker.url, "run", *ALL, "--resume")
            assert aggregator.until_a(RoundOpened).cohort == CLIENTS
            assert coming.exists()
            clients["cy"].process.send_signal(signal.SIGCONT)
            assert aggregator.until_a(RoundClosed).accepted == CLIENTS
            assert [event.client for event in aggregator.all(UpdateAccepted)] == ["cy"]
    aggregator.until_a(RunClosed)
    assert not coming.exists()
    assert keys(aggregator) == EVERY_ROUND
    assert [client.end() for client in clients.values()] == [0, 0, 0]
    assert_equal(aggregator.final(), undisturbed)


@pytest.mark.parametrize("what", ["robust", "calibrated"])
def test_more_than_a_mean_goes_on_where_the_aggregator_was_killed(
    programs: Programs, broker: Started, undisturbed: dict[str, np.ndarray], data: Path, what: str
) -> None:
    options: tuple[str, ...] = ("--calibration", str(data / "holdout"))
    if what == "robust":
        options = ("--aggregation", "median", "--server-optimizer", "momentum", "--proximal-mu", "0.1")
    finals = [undisturbed]
    for name in ("whole", "run"):
        aggregator = programs.aggregator(broker.url, name, *ALL, *options)
        programs.clients(broker.url, name)
        for after in (RoundKey(0, 0), RoundKey(1, 0)) if name == "run" else ():
            aggregator.until_a(RoundClosed, after)
            aggregator.kill()
            aggregator = programs.aggregator(broker.url, name, *ALL, *options, "--resume")
        aggregator.until_a(RunClosed)
        finals.append(aggregator.final())
    assert_equal(finals[2], finals[1])
    assert not all(np.array_equal(finals[0][name], value) for name, value in finals[1].items())


def test_stages_end_when_they_no_longer_improve_also_after_a_restart(
    programs: Programs, broker: Started, data: Path, bundle: Path, tmp_path: Path
) -> None:
    """With a learning rate of next to nothing the first round's metric is never exceeded."""
    longer = shutil.copytree(bundle, tmp_path / "longer")
    manifest = (longer / MANIFEST_NAME).read_text()
    (longer / MANIFEST_NAME).write_text(manifest.replace('"rounds": 2', '"rounds": 9'))
    options = ("--bundle", str(longer), "--rounds", "auto", "--patience", "1", "--learning-rate", "1e-30")
    holdout = ("--holdout", str(data / "holdout"))
    aggregator = programs.aggregator(broker.url, "run", *ALL, *options, *holdout)
    programs.clients(broker.url)
    aggregator.until_a(RoundClosed, RoundKey(0, 1))
    aggregator.kill()
    aggregator = programs.aggregator(broker.url, "run", *ALL, *options, *holdout, "--resume")
    aggregator.until_a(RunClosed)
    done = aggregator.rows("SELECT stage, round FROM rounds ORDER BY stage, round")
    assert done == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_run_is_not_resumed_with_other_calibration(
    programs: Programs, broker: Started, data: Path
) -> None:
    calibrated = ("--calibration", str(data / "holdout"))
    first = programs.aggregator(broker.url, "run", *ALL, *calibrated)
    first.until_a(RunOpened)
    first.kill()
    for options in ((), ("--calibration", str(data / "clients" / "ann"))):
        again = programs.aggregator(broker.url, "run", *ALL, *options, "--resume")
        assert again.end() == 2
        assert "of another bundle or other settings" in again.text()


def test_a_client_killed_in_the_middle_of_its_training_goes_on_there(
    programs: Programs, broker: Started
) -> None:
    options = (*ALL, "--local-epochs", "100", "--rounds", "1")
    finals = []
    for name in ("whole", "run"):
        aggregator = programs.aggregator(broker.url, name, *options)
        clients = programs.clients(broker.url, name, CLIENTS, "--checkpoint-s", "0")
        if name == "run":
            until(lambda: programs.is_training("ann"), "the first checkpoint")
            clients["ann"].again()
        aggregator.until_a(RunClosed)
        finals.append(aggregator.final())
    assert "going on in epoch" in clients["ann"].text()
    assert_equal(*finals)


def test_clients_that_are_all_gone_for_a_while(programs: Programs, broker: Started) -> None:
    aggregator = programs.aggregator(broker.url, "run", *ALL, *SLOW, "--round-deadline-s", "2")
    clients = programs.clients(broker.url, "run", CLIENTS, "--checkpoint-s", "0")
    aggregator.until_a(RoundOpened)
    until(lambda: all(map(programs.is_training, CLIENTS)), "the first checkpoint of all")
    for client in clients.values():
        client.kill()

    def deadlines() -> int:
        return aggregator.text().count("the deadline is there")

    until(deadlines, "the deadline")
    time.sleep(3)  # on a slow machine it was another's, from before they were gone
    passed = deadlines()
    time.sleep(3)  # and another would be
    assert deadlines() == passed, "it waits for clients, not in circles"
    clients = programs.clients(broker.url)
    assert aggregator.until_a(RoundOpened).extended
    aggregator.until_a(RunClosed)
    assert keys(aggregator) == EVERY_ROUND
    assert [client.end() for client in clients.values()] == [0, 0, 0]


def test_more_clients_are_asked_than_are_waited_for(programs: Programs, broker: Started) -> None:
    options = ("--fraction-train", "0.6", "--over-selection", "0.5", "--rounds", "1")
    aggregator = programs.aggregator(broker.url, "run", *ALL, *options)
    clients = programs.clients(broker.url)
    opened = aggregator.until_a(RoundOpened)
    assert opened.cohort == CLIENTS
    with paused(clients["cy"]):
        closed = aggregator.until_a(RoundClosed)
        assert (closed.accepted, closed.missing) == (("ann", "bob"), ("cy",))
    aggregator.until_a(RunClosed)
    assert [client.end() for client in clients.values()] == [0, 0, 0]


def test_an_update_that_comes_rounds_later_counts_for_less(programs: Programs, broker: Started) -> None:
    options = (*SLOW, "--buffer-size", "2", "--max-staleness", "50", "--rounds", "8")
    aggregator = programs.aggregator(broker.url, "run", *ALL, *options)
    clients = programs.clients(broker.url, "run", CLIENTS, "--checkpoint-s", "0")
    aggregator.until_a(RoundOpened)
    until(lambda: programs.is_training("cy"), "cy's training")
    with paused(clients["cy"]):
        assert aggregator.until_a(RoundClosed, RoundKey(0, 1)).accepted == ("ann", "bob")
    late = aggregator.until(lambda event: isinstance(event, UpdateAccepted) and event.client == "cy")
    assert late.key == RoundKey(0, 0)
    assert late.staleness >= 2
    query = "SELECT counted_in FROM updates WHERE client = 'cy' AND stage = 0 AND round = 0"
    assert aggregator.rows(query) == [(late.staleness,)]
    aggregator.until_a(RunClosed)
    assert [client.end() for client in clients.values()] == [0, 0, 0]


def test_a_folder_of_another_run_is_not_written_over(
    programs: Programs, broker: Started, tmp_path: Path
) -> None:
    aggregator = programs.aggregator(broker.url, "run", *ALL)
    programs.clients(broker.url)
    aggregator.until_a(RoundClosed)
    aggregator.kill()
    assert programs.aggregator(broker.url, "run", *ALL).end() == 2
    assert programs.aggregator(broker.url, "run", "--resume", "--seed", "5").end() == 2
    last = aggregator.text().splitlines()
    assert "--resume" in last[-2]
    assert "other settings" in last[-1]
    assert not any("Traceback" in line for line in last)


def test_too_few_updates_at_the_deadline_and_the_round_is_offered_again(
    programs: Programs, broker: Started
) -> None:
    aggregator = programs.aggregator(
        broker.url, "run", *ALL, *SLOW, "--min-updates", "3", "--round-deadline-s", "15"
    )
    clients = programs.clients(broker.url)
    aggregator.until_a(RoundOpened)
    time.sleep(0.3)
    clients["ann"].kill()
    aggregator.until_a(ClientLeft)
    time.sleep(14)
    clients["ann"] = programs.client(broker.url, "ann")
    assert aggregator.until_a(RoundOpened).extended
    assert aggregator.until_a(RoundClosed, RoundKey(0, 0)).accepted == CLIENTS


def test_an_extension_does_not_call_off_the_training_it_waits_for(
    programs: Programs, broker: Started
) -> None:
    """Training takes several deadlines, and still ends."""
    options = ("--local-epochs", "150", "--min-updates", "3", "--round-deadline-s", "1.5", "--rounds", "1")
    aggregator = programs.aggregator(broker.url, "run", *ALL, *options)
    programs.clients(broker.url)
    assert aggregator.until_a(RoundClosed).accepted == CLIENTS
    assert any(event.extended for event in aggregator.all(RoundOpened))


def test_clients_follow_a_run_that_begins_anew_under_the_same_name(
    programs: Programs, broker: Started, undisturbed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    aggregator = programs.aggregator(broker.url, "run", *ALL, "--learning-rate", "0.01")
    clients = programs.clients(broker.url)
    aggregator.until_a(RoundClosed)
    aggregator.kill()
    aggregator.folder.rename(tmp_path / "given-up")
    aggregator = programs.aggregator(broker.url, "run", *ALL, "--chunk-bytes", "4096")
    aggregator.until_a(RunClosed)
    assert [client.end() for client in clients.values()] == [0, 0, 0]
    assert "has begun anew" in clients["ann"].text()
    assert_equal(aggregator.final(), undisturbed)


def test_clients_that_come_around_the_end_of_a_run_go_home_or_wait(
    programs: Programs, broker: Started
) -> None:
    """Whoever has joined is told that it is over; whoever came too late waits for the next run."""
    aggregator = programs.aggregator(broker.url, "run", *ALL)
    programs.clients(broker.url)
    late = []
    while not aggregator.all(RunClosed):
        aggregator.until(lambda event: isinstance(event, RoundClosed | RunClosed))
        late.append(programs.client(broker.url, f"late{len(late)}", data="ann"))
    for client in late:
        deadline = time.monotonic() + 60
        while client.process.poll() is None and "no run is open" not in client.text():
            assert time.monotonic() < deadline, client.text()
            time.sleep(0.1)
        if "joining run" in client.text():
            assert client.end() == 0
        else:
            assert client.stop() == 130


def test_programs_stop_in_order(programs: Programs, broker: Started) -> None:
    aggregator = programs.aggregator(broker.url, "run", *ALL, *SLOW)
    clients = programs.clients(broker.url)
    aggregator.until_a(RoundOpened)
    time.sleep(0.3)
    assert clients["ann"].stop() == 130
    assert aggregator.until_a(ClientLeft).client == "ann"
    assert aggregator.stop() == 130
    assert "Traceback" not in clients["ann"].text() + aggregator.text()


def test_no_torch_and_no_onnx_in_a_client(programs: Programs, broker: Started) -> None:
    aggregator = programs.aggregator(broker.url, "run", *ALL)
    clients = programs.clients(broker.url)
    aggregator.until_a(RoundClosed)
    mapped = Path(f"/proc/{clients['ann'].process.pid}/maps").read_text()
    assert "onnxruntime" in mapped, "it has trained"
    assert not [line for line in mapped.splitlines() if "/torch/" in line or "/onnx/" in line]
