"""Who is let in, who may write where, what a client runs: real programs on a real mosquitto."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from programs import CLIENTS, Programs, Started, free_port, lamina, mosquitto, start
from secured import Secured, provision, sign

from aggregator.events import ClientCame, RoundClosed, RunClosed
from lamina.identity.federation import Federation
from wire import topics
from wire.errors import TransportError
from wire.manifest import BlobRef, read_manifest
from wire.messages import Announcement, encode
from wire.mqtt import Broker, Connection
from wire.signature import SIGNATURE_NAME
from wire.tls import Credentials

PATIENCE_S = 60
TWO = ("--min-available-clients", "2", "--rounds", "1")


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """`lamina provision` for three clients; the port."""
    folder, port = tmp_path_factory.mktemp("provisioned") / "federation", free_port()
    provision(folder, port, *CLIENTS)
    return folder, port


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, provisioned: tuple[Path, int]) -> Path:
    """What somebody else has provisioned for the same broker."""
    folder = tmp_path_factory.mktemp("stranger") / "federation"
    provision(folder, provisioned[1], "ann")
    return folder


@pytest.fixture
def secured(provisioned: tuple[Path, int], tmp_path: Path, data: Path) -> Iterator[Secured]:
    """A mosquitto that runs with it, in a copy of its own."""
    if mosquitto() is None:
        pytest.skip("mosquitto is not installed; .ci/run installs it")
    folder = shutil.copytree(provisioned[0], tmp_path / "federation")
    with contextlib.ExitStack() as stack:
        yield Secured(folder, provisioned[1], data, stack)


@pytest.fixture
def signed(bundle: Path, tmp_path: Path, provisioned: tuple[Path, int]) -> Path:
    """A bundle that its owner has signed."""
    copy = shutil.copytree(bundle, tmp_path / "signed")
    sign(copy, provisioned[0] / "owner" / "owner.key")
    return copy


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_a_run_with_what_was_provisioned_and_nothing_else(
    secured: Secured, signed: Path, tmp_path: Path
) -> None:
    """Each folder is copied to where its machine might have it."""
    homes = {name: tmp_path / "elsewhere" / name for name in CLIENTS}
    for name, home in homes.items():
        shutil.copytree(secured.folder / "clients" / name, home)
    aggregator = secured.aggregator(signed, "--min-available-clients", "3", "--rounds", "1")
    clients = [secured.client(name, home=home) for name, home in homes.items()]
    closed = aggregator.until_a(RunClosed)
    assert [client.end() for client in clients] == [0, 0, 0]
    assert [event.accepted for event in aggregator.all(RoundClosed)] == [CLIENTS] * 2
    assert closed.total.updates == 6
    assert "is signed by owner" in aggregator.text()
    for text in (aggregator.text(), *(client.text() for client in clients)):
        assert "ignored" not in text
        assert "lost" not in text
    listed = lamina("client", "list", "--dir", str(secured.folder))
    assert [line.split()[::2] for line in listed.stdout.splitlines()[1:]] == [
        [name, "valid"] for name in CLIENTS
    ]


class Case:
    """A change of ann's files or options, and the line that she is refused with."""

    def __init__(self, change: Callable[[Secured, Path, Path], list[str]], line: str) -> None:
        self.change, self.line = change, line


def no_certificate(secured: Secured, ann: Path, _stranger: Path) -> list[str]:
    toml = ann / "client.toml"
    lines = toml.read_text().splitlines(keepends=True)
    toml.write_text("".join(line for line in lines if not line.startswith(("cert", "key"))))
    return []


def another_authority(secured: Secured, ann: Path, stranger: Path) -> list[str]:
    for name in ("client.crt", "client.key"):
        shutil.copy(stranger / "clients/ann" / name, ann / name)
    return []


def revoked(secured: Secured, ann: Path, _stranger: Path) -> list[str]:
    kept = shutil.copytree(ann, ann.parent / "kept")
    done = lamina("client", "revoke", "ann", "--dir", str(secured.folder))
    assert "ann is revoked" in done.stdout
    assert "restart mosquitto" in done.stdout
    kept.rename(ann)
    secured.mosquitto.restart()
    return []


def expired(secured: Secured, ann: Path, _stranger: Path) -> list[str]:
    then = datetime.now(timezone.utc) - timedelta(days=3 * 365)
    with Federation.opened(secured.folder, now=then) as federation:
        federation.provision(clients=["ann"], renew=True)
    return []


def another_broker(secured: Secured, ann: Path, stranger: Path) -> list[str]:
    shutil.copy(stranger / "clients/ann/ca.crt", ann / "ca.crt")
    return []


def another_host(secured: Secured, _ann: Path, _stranger: Path) -> list[str]:
    return ["--broker", secured.url.replace("127.0.0.1", "localhost")]


def without_tls(secured: Secured, ann: Path, _stranger: Path) -> list[str]:
    (ann / "client.toml").write_text('name = "ann"\n')
    return ["--broker", secured.url.replace("mqtts", "mqtt")]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(no_certificate, "asks for a certificate"), id="no certificate"),
        pytest.param(
            Case(another_authority, "refuses this certificate, which is of another authority"),
            id="a certificate of another authority",
        ),
        pytest.param(
            Case(revoked, "refuses this certificate, which is revoked"), id="a revoked certificate"
        ),
        pytest.param(
            Case(expired, "refuses this certificate, which has expired"), id="an expired certificate"
        ),
        pytest.param(
            Case(another_broker, "has a certificate that is not to be trusted: self-signed certificate in"),
            id="a broker of another authority",
        ),
        pytest.param(
            Case(another_host, "certificate is not valid for 'localhost'"), id="a broker of another name"
        ),
        pytest.param(Case(without_tls, "does not answer as an MQTT broker"), id="no TLS"),
    ],
)
def test_who_is_not_let_in(secured: Secured, stranger: Path, case: Case) -> None:
    options = case.change(secured, secured.folder / "clients" / "ann", stranger)
    done = lamina(*secured.client_words("ann", *options))
    print(done.stderr, end="")  # noqa: T201 - seen with -s
    assert done.stderr.startswith("lamina: mqtt")
    assert done.stderr.count("\n") == 1
    assert case.line in done.stderr
    assert " - " in done.stderr
    assert done.returncode == 69


def test_a_client_writes_under_its_own_name_only(secured: Secured) -> None:
    """And only the aggregator for everybody; in MQTT 3.1.1 nobody is told, but nothing arrives either."""
    forbidden = [
        topics.up("run", "bob", "hello"),
        topics.up("run", "bob", "report"),
        topics.down("run", "bob", "receipt"),
        topics.down("run", "ann", "receipt"),
        topics.announcement("run"),
        topics.offer("run"),
        topics.blob("run", "0" * 64),
        "lamina/v1/run/c/ann/other",
        "elsewhere",
        "$SYS/broker/uptime",
    ]

    async def main() -> None:
        async with (
            secured.connection("aggregator") as aggregator,
            secured.connection("bob") as bob,
            secured.connection("ann") as ann,
        ):
            await aggregator.subscribe("#")
            await bob.subscribe("#")
            for topic in forbidden:
                with pytest.raises(TransportError, match="does not let us write to") as caught:
                    await ann.publish(topic, b"forged")
                print(f"{caught.value} - {caught.value.hint}")  # noqa: T201 - seen with -s
            await ann.publish(topics.up("run", "ann", "hello"), b"mine")
            assert (await aggregator.packet()).payload == b"mine"
            await aggregator.publish(topics.offer("run"), b"for everybody")
            assert (await bob.packet()).payload == b"for everybody"
        async with (
            secured.connection("aggregator") as aggregator,
            secured.connection("bob") as bob,
            secured.connection("ann", version=4) as ann,
        ):
            await aggregator.subscribe("#")
            await bob.subscribe("#")
            for topic in forbidden:
                await ann.publish(topic, b"forged")
            await ann.publish(topics.up("run", "ann", "hello"), b"mine")
            assert (await aggregator.packet()).payload == b"mine"
            await aggregator.publish(topics.down("run", "bob", "want"), b"for bob")
            assert (await bob.packet()).payload == b"for bob"

    run(main)


def test_a_client_reads_what_is_for_it_only(secured: Secured) -> None:
    async def main() -> None:
        async with secured.connection("aggregator") as aggregator, secured.connection("ann") as ann:
            await ann.subscribe("#", topics.down("run", "bob", "+"), topics.up("run", "+", "+"))
            await aggregator.publish(topics.down("run", "bob", "want"), b"for bob")
            await aggregator.publish(topics.up("run", "bob", "chunk"), b"of bob")
            await aggregator.publish(topics.down("run", "ann", "want"), b"for ann")
            assert (await ann.packet()).payload == b"for ann"

    run(main)


def test_nobody_can_end_anothers_connection_by_its_client_id(secured: Secured) -> None:
    async def main() -> None:
        async with secured.connection("bob", client_id="lamina-run-bob") as bob:
            await bob.subscribe(topics.down("run", "bob", "+"))
            async with secured.connection("ann", client_id="lamina-run-bob") as ann:
                await ann.publish(topics.up("run", "ann", "hello"), b"1")
            async with secured.connection("ann", client_id="bob") as ann:
                await ann.publish(topics.up("run", "ann", "hello"), b"1")
            lost = asyncio.ensure_future(bob.until_reconnected(1.5))
            await bob.publish(topics.up("run", "bob", "hello"), b"1")
            assert not await lost

    run(main)


def test_a_last_will_is_heard_if_it_is_ones_own(secured: Secured) -> None:
    async def main() -> None:
        async with secured.connection("aggregator") as aggregator:
            await aggregator.subscribe(topics.up("run", "+", "bye"))
            for name, victim in (("ann", "bob"), ("bob", "bob")):
                broker = Broker.parse(secured.url, secured.credentials(name))
                will = topics.up("run", victim, "bye"), name.encode()
                async with Connection(broker, name, will), Connection(broker, name):
                    pass  # the second has ended the first, without a goodbye
            assert (await aggregator.packet()).payload == b"bob"

    run(main)


def test_a_client_with_another_name_than_its_certificates(secured: Secured, signed: Path) -> None:
    secured.aggregator(signed, *TWO)
    done = lamina(*secured.client_words("ann", "--name", "bob"))
    print(done.stderr, end="")  # noqa: T201 - seen with -s
    last = done.stderr.splitlines()[-1]
    assert f"does not let us write to {topics.up('run', 'bob', 'want')}" in last, "not the goodbye"
    assert "Not authorized" in last
    assert done.returncode == 69
    assert "Traceback" not in done.stderr


def test_revoked_in_the_middle_of_a_run(secured: Secured, signed: Path) -> None:
    """It stays outside and goes on trying; the others go on training."""
    options = ("--min-available-clients", "2", "--rounds", "3", "--round-deadline-s", "12")
    aggregator = secured.aggregator(signed, *options, "--local-epochs", "20")
    clients = {name: secured.client(name) for name in CLIENTS}
    for _ in CLIENTS:
        aggregator.until_a(ClientCame)
    aggregator.until_a(RoundClosed)
    home = secured.folder / "clients/cy"
    kept = shutil.copytree(home, secured.folder / "kept")
    assert lamina("client", "revoke", "cy", "--dir", str(secured.folder)).returncode == 0
    kept.rename(home)
    secured.mosquitto.restart()
    closed = aggregator.until_a(RunClosed)
    assert closed.total.rounds == 6
    assert aggregator.all(RoundClosed)[-1].accepted == ("ann", "bob")
    assert [clients[name].end() for name in ("ann", "bob")] == [0, 0]
    line = "refuses this certificate, which is revoked"
    until(lambda: clients["cy"].text().count(line) >= 2, "cy goes on trying")
    assert clients["cy"].process.poll() is None
    assert clients["cy"].stop() == 130
    assert "Traceback" not in clients["cy"].text()


# From here on: what a client runs. A signature needs no TLS, so these runs have the embedded broker.


@pytest.fixture
def owner(provisioned: tuple[Path, int]) -> tuple[str, str]:
    """The option that names the owner."""
    return "--owner", str(provisioned[0] / "owner" / "owner.pub")


def fetched(state: Path) -> set[str]:
    """Hashes of what a client has in its store."""
    return {path.name for path in (state / "blobs").iterdir()}


def changed_manifest(signed: Path, _stranger: Path) -> str:
    """One byte, and still a manifest."""
    path = signed / "manifest.json"
    content = path.read_bytes()
    assert content.count(b'"weight_decay": 0.01') == 1
    path.write_bytes(content.replace(b'"weight_decay": 0.01', b'"weight_decay": 0.02'))
    read_manifest(signed)
    return "signed, but not by owner"


def signed_by_another(signed: Path, stranger: Path) -> str:
    sign(signed, stranger / "owner" / "owner.key")
    return "signed, but not by owner"


def not_signed(signed: Path, _stranger: Path) -> str:
    (signed / SIGNATURE_NAME).unlink()
    return "not signed by owner"


@pytest.mark.parametrize("change", [changed_manifest, signed_by_another, not_signed])
def test_a_bundle_that_the_owner_has_not_signed_is_not_even_asked_for(
    programs: Programs,
    broker: Started,
    signed: Path,
    stranger: Path,
    owner: tuple[str, str],
    data: Path,
    tmp_path: Path,
    change: Callable[[Path, Path], str],
) -> None:
    """It might as well not be there: the client waits, and joins the owner's run when that comes."""
    bad = shutil.copytree(signed, tmp_path / "bad")
    line = change(bad, stranger)
    programs.aggregator(broker.url, "bad", "--bundle", str(bad), *TWO)
    words = ("client", "--broker", broker.url, "--data", str(data / "clients" / "ann"), "--name", "ann")
    words += ("--dir", str(tmp_path / "state"), *owner)
    with start(tmp_path / "ann.log", *words) as client:
        until(lambda: "ignored run bad" in client.text(), "the client sees it")
        print(client.text(), end="")  # noqa: T201 - seen with -s
        time.sleep(2.5)  # two more announcements
        assert fetched(tmp_path / "state") == set()
        options = ("--bundle", str(signed), "--min-available-clients", "1", "--rounds", "1")
        assert programs.aggregator(broker.url, "good", *options).until_a(RunClosed).total.updates == 2
        assert client.end() == 0
    assert client.text().count("ignored run bad") == 1
    assert line in client.text()
    assert "joining run bad" not in client.text()
    assert "joining run good" in client.text()


@pytest.mark.parametrize("change", [changed_manifest, signed_by_another, not_signed])
def test_an_aggregator_that_knows_the_owner_says_so_first(
    broker: Started,
    signed: Path,
    stranger: Path,
    owner: tuple[str, str],
    tmp_path: Path,
    change: Callable[[Path, Path], str],
) -> None:
    words = ("aggregator", "--broker", broker.url, "--dir", str(tmp_path / "run"), *owner)
    change(signed, stranger)
    done = lamina(*words, "--bundle", str(signed))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not signed" in done.stderr or "is changed, or signed by someone else" in done.stderr
    assert "lamina sign" in done.stderr


def one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_graph_with_one_changed_byte(
    programs: Programs, broker: Started, signed: Path, owner: tuple[str, str], tmp_path: Path
) -> None:
    """The signature is good, and the manifest; the file is not the one that it names."""
    manifest, _ = read_manifest(signed)
    graphs = manifest.stages[0].engines["onnx"]
    for name in graphs.values():
        one_byte(signed / name)
    programs.aggregator(broker.url, "run", "--bundle", str(signed), *TWO)
    options = (*owner, "--engine", "onnx")
    clients = {name: programs.client(broker.url, name, "run", *options) for name in ("ann", "bob")}
    for client in clients.values():
        until(lambda client=client: "cannot be trained: " in client.text(), "the file is refused")
        line = next(one for one in client.text().splitlines() if "cannot be trained" in one)
        print(line)  # noqa: T201 - seen with -s
        assert "the content is not" in line
        assert client.text().count("came damaged, asking again") == 2
    changed = {BlobRef.of_file(signed / name).sha256 for name in graphs.values()}
    named = {manifest.files[name].sha256 for name in graphs.values()}
    for name in ("ann", "bob"):
        assert fetched(tmp_path / f"run-{name}").isdisjoint(changed | named)


def test_a_file_that_is_not_the_manifests_is_neither_signed_nor_served(
    broker: Started, signed: Path, provisioned: tuple[Path, int], owner: tuple[str, str], tmp_path: Path
) -> None:
    manifest, _ = read_manifest(signed)
    name = next(iter(manifest.stages[0].engines["onnx"].values()))
    one_byte(signed / name)
    words = ("aggregator", "--broker", broker.url, "--dir", str(tmp_path / "run"), *owner)
    key = str(provisioned[0] / "owner/owner.key")
    for done in (lamina(*words, "--bundle", str(signed)), lamina("sign", str(signed), "--key", key)):
        assert done.returncode == 2
        assert f"{signed / name} is not the file that the manifest names" in done.stderr


def test_announcements_that_are_forged_in_the_middle_of_a_run(
    programs: Programs, broker: Started, signed: Path, owner: tuple[str, str]
) -> None:
    """Without access rules anybody can announce: the run's end, or another run under its name."""
    options = ("--bundle", str(signed), "--min-available-clients", "2", "--local-epochs", "30")
    aggregator = programs.aggregator(broker.url, "run", *options)
    clients = [programs.client(broker.url, name, "run", *owner) for name in ("ann", "bob")]
    aggregator.until_a(RoundClosed)
    _, content = read_manifest(signed)
    forged = [
        Announcement("run", BlobRef.of(content), 1.0, 2.0, 122880, open=False),
        Announcement("run", BlobRef.of(b"other"), time.time() + 1, 2.0, 122880, signature=bytes(64)),
    ]

    async def forge() -> None:
        async with Connection(Broker.parse(broker.url), "forger") as connection:
            for announcement in forged:
                await connection.publish(topics.announcement("run"), encode(announcement), retain=True)

    run(forge)
    assert aggregator.until_a(RunClosed).total.rounds == 4
    assert [client.end() for client in clients] == [0, 0]
    for client in clients:
        assert client.text().count("ignored run run") == 2
        assert client.text().count("joining run") == 1
        assert "has begun anew" not in client.text()


def test_without_a_certificate_of_ours_a_broker_may_still_be_checked(secured: Secured) -> None:
    """`--ca` alone, for a broker that asks for a password instead."""
    conf = secured.mosquitto.folder / "mosquitto.conf"
    conf.write_text(
        f"listener {secured.port}\ncafile ca.crt\ncertfile broker.crt\nkeyfile broker.key\n"
        "allow_anonymous true\nuser root\n"
    )
    secured.mosquitto.restart()

    async def main() -> None:
        ca = Credentials(secured.folder / "ca/ca.crt")
        async with Connection(Broker.parse(secured.url, ca), "a") as connection:
            await connection.publish("x", b"1")
        with pytest.raises(TransportError, match="is not to be trusted") as caught:
            async with Connection(Broker.parse(secured.url), "a"):
                pass
        assert "--ca" in caught.value.hint

    run(main)
