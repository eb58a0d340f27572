"""`lamina provision`: what it makes, who can read it, and what a second time leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import stat
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from lamina.cli import command
from lamina.identity import files
from lamina.identity.federation import Federation
from lamina.identity.files import make_folder, write, write_key
from lamina.options import tomllib
from wire import topics
from wire.errors import LocalError, UserError
from wire.mqtt import Broker
from wire.signature import Owner
from wire.tls import Credentials

NOW = datetime.now(timezone.utc).replace(microsecond=0)
HOSTS = ("192.0.2.10", "hub.local")


def provision(folder: Path, *clients: str, hosts: Collection[str] = (), **options: bool) -> list[str]:
    with Federation.opened(folder, new=True) as federation:
        return federation.provision(hosts, None, clients, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With ann and bob."""
    folder = tmp_path / "federation"
    provision(folder, "ann", "bob", hosts=HOSTS)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def states(folder: Path, now: datetime = NOW) -> dict[str, str]:
    with Federation.opened(folder) as federation:
        return {one.name: one.state(now) for one in federation.ca.members()}


def revoke(folder: Path, name: str) -> bool:
    with Federation.opened(folder) as federation:
        return federation.revoke(name)


def verify(folder: Path, who: Path, purpose: str) -> str:
    """What OpenSSL says, at its strictest, revocation included."""
    command = ["openssl", "verify", "-x509_strict", "-check_ss_sig", "-purpose", purpose, "-crl_check"]
    command += ["-CAfile", str(folder / "ca/ca.crt"), "-CRLfile", str(folder / "broker/crl.pem"), str(who)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return "OK" if done.returncode == 0 else done.stderr


def test_each_machine_gets_a_folder_with_all_that_it_needs(folder: Path):
    papers = {"ca.crt", "owner.pub"}
    client = papers | {"client.crt", "client.key", "client.toml"}
    assert {path.name for path in (folder / "clients/ann").iterdir()} == client
    assert {path.name for path in (folder / "clients/bob").iterdir()} == client
    aggregator = papers | {"aggregator.crt", "aggregator.key", "aggregator.toml"}
    assert {path.name for path in (folder / "aggregator").iterdir()} == aggregator
    broker = {"ca.crt", "broker.crt", "broker.key", "crl.pem", "mosquitto.conf", "acl"}
    assert {path.name for path in (folder / "broker").iterdir()} == broker
    assert (folder / "clients/ann/client.key").read_bytes() != (
        folder / "clients/bob/client.key"
    ).read_bytes()


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o377])
def test_nobody_else_can_read_any_of_it(tmp_path: Path, mask: int):
    with umask(mask):
        provision(tmp_path / "federation", "ann", hosts=HOSTS)
    for path in (tmp_path / "federation", *(tmp_path / "federation").rglob("*")):
        if path.name != "lock":  # which is empty
            expected = 0o700 if path.is_dir() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_not_even_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With no mode set afterwards, the modes are those that the files were made with."""
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    with umask(0):
        provision(tmp_path / "federation", "ann", hosts=HOSTS)
    keys = [*(tmp_path / "federation").rglob("*.key")]
    assert len(keys) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    folders = [path for path in (tmp_path / "federation").rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


def test_once_more_changes_nothing(folder: Path):
    before = contents(folder)
    assert provision(folder, "ann", "bob", hosts=HOSTS) == []
    assert provision(folder) == []
    assert contents(folder) == before


def test_a_client_more_leaves_the_others_alone(folder: Path):
    (folder / "clients/ann/client.toml").write_text("# mine\n")
    before = contents(folder)
    assert provision(folder, "ann", "cy") == ["cy"]
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[1] for name in after.keys() - before.keys()} == {"cy", "issued"}


def test_renewing_keeps_the_keys(folder: Path):
    before = contents(folder)
    assert provision(folder, "ann", renew=True) == ["ann"]
    assert provision(folder, renew=True) == ["broker", "aggregator", "ann", "bob"]
    after = contents(folder)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {
        "broker/broker.crt",
        "aggregator/aggregator.crt",
        "clients/ann/client.crt",
        "clients/bob/client.crt",
    }
    for name in ("ann", "bob"):
        home = folder / "clients" / name
        Credentials(home / "ca.crt", home / "client.crt", home / "client.key").context()
        assert verify(folder, home / "client.crt", "sslclient") == "OK"


def test_another_address_is_a_new_certificate_for_the_broker_alone(folder: Path):
    before = contents(folder)
    assert provision(folder, hosts=["192.0.2.11"]) == ["broker"]
    after = contents(folder)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"broker/broker.crt", "ca/broker.json"}
    assert provision(folder, "cy") == ["cy"]
    assert "192.0.2.11" in (folder / "clients/cy/client.toml").read_text()


def test_killed_at_any_write_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = 0

    class Killed(BaseException):
        pass

    def counted(path: Path, content: bytes, mode: int = 0o600) -> None:
        nonlocal written
        written += 1
        if written == last:
            path.with_name(f"{path.name}.x.partial").write_bytes(content[:7])
            raise Killed
        write(path, content, mode)

    for module in ("files", "ca", "federation"):
        monkeypatch.setattr(f"lamina.identity.{module}.write", counted)
    last = 0
    provision(tmp_path / "whole", "ann", hosts=HOSTS)
    total = written
    assert total > 20
    for number in range(1, total + 1):
        written, last = 0, number
        folder = tmp_path / str(number)
        with pytest.raises(Killed):
            provision(folder, "ann", hosts=HOSTS)
        last = 0
        keys = {path: path.read_bytes() for path in folder.rglob("*.key")}
        provision(folder, "ann", hosts=HOSTS)
        assert all(path.read_bytes() == content for path, content in keys.items())
        assert contents(folder).keys() - {"lock"} == contents(tmp_path / "whole").keys() - {"lock"}
        ann = folder / "clients/ann"
        Credentials(ann / "ca.crt", ann / "client.crt", ann / "client.key").context()
        shutil.rmtree(folder)


def test_a_key_is_never_written_over(tmp_path: Path):
    write_key(tmp_path / "a.key", b"1")
    with pytest.raises(LocalError):
        write_key(tmp_path / "a.key", b"2")
    assert (tmp_path / "a.key").read_bytes() == b"1"
    make_folder(tmp_path / "x" / "y")
    assert stat.S_IMODE((tmp_path / "x/y").stat().st_mode) == 0o700
    assert files.PRIVATE == 0o600


def test_what_was_moved_away(folder: Path, tmp_path: Path):
    """The broker's and the aggregator's folders are not made again; a client's would be another client."""
    for name in ("broker", "aggregator", "clients/ann"):
        (folder / name).rename(tmp_path / name.rpartition("/")[2])
    assert provision(folder, "cy") == ["cy"]
    assert not (folder / "broker").exists()
    with pytest.raises(UserError, match=r"ann has a certificate, and .*client\.key is gone") as caught:
        provision(folder, "ann")
    assert "lamina client revoke" in caught.value.hint
    with pytest.raises(UserError, match=r"broker has a certificate, and .*broker\.key is gone"):
        provision(folder, renew=True)
    assert revoke(folder, "ann")
    assert provision(folder, "ann") == ["ann"]


def test_an_owners_key_that_was_moved_away_is_not_missed(folder: Path):
    (folder / "owner/owner.key").unlink()
    before = (folder / "owner/owner.pub").read_bytes()
    provision(folder, "cy")
    assert (folder / "clients/cy/owner.pub").read_bytes() == before
    assert not (folder / "owner/owner.key").exists()


def test_an_authoritys_key_that_is_gone(folder: Path):
    (folder / "ca/ca.key").unlink()
    with pytest.raises(UserError, match=r"ca\.key is gone"):
        provision(folder, "cy")


@pytest.mark.parametrize("name", ["a/b", "+", "", "a b", "x" * 65, "#"])
def test_what_is_no_name(folder: Path, name: str):
    before = contents(folder)
    with pytest.raises(UserError, match="is not a usable name"):
        provision(folder, "cy", name)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["aggregator", "Broker", "ca", "owner"])
def test_names_that_are_taken(folder: Path, name: str):
    with pytest.raises(UserError, match="cannot be called"):
        provision(folder, name)


def test_names_that_differ_by_case_only(folder: Path):
    with pytest.raises(UserError, match="differ by case only"):
        provision(folder, "Ann")
    with pytest.raises(UserError, match="differ by case only"):
        provision(folder, "cy", "CY")


def test_the_broker_has_to_be_somewhere(tmp_path: Path, folder: Path):
    with pytest.raises(UserError, match="where will the broker be") as caught:
        provision(tmp_path / "new", "ann")
    assert "--broker-host" in caught.value.hint
    with Federation.opened(folder) as federation, pytest.raises(UserError, match="listens on port 8883"):
        federation.provision((), 1, ())


def test_a_folder_of_something_else(tmp_path: Path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="holds something else"):
        provision(tmp_path, hosts=HOSTS)
    with pytest.raises(UserError, match="was not made by lamina provision"):
        revoke(tmp_path, "ann")


@pytest.mark.parametrize("name", ["ca/ca.key", "ca/ca.crt", "ca/crl.pem", "ca/broker.json"])
def test_a_damaged_file_is_named(folder: Path, name: str):
    (folder / name).write_bytes(b"?")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        provision(folder, "cy")


def test_certificates_pass_the_strictest_check(folder: Path):
    clients = [folder / f"clients/{name}/client.crt" for name in ("ann", "bob")]
    for path in (*clients, folder / "aggregator/aggregator.crt"):
        assert verify(folder, path, "sslclient") == "OK"
        assert "unsuitable certificate purpose" in verify(folder, path, "sslserver")
    assert verify(folder, folder / "broker/broker.crt", "sslserver") == "OK"
    assert "unsuitable certificate purpose" in verify(folder, folder / "broker/broker.crt", "sslclient")


def test_the_fields_of_a_certificate(folder: Path):
    ca, ann = certificate(folder / "ca/ca.crt"), certificate(folder / "clients/ann/client.crt")
    assert ann.subject.rfc4514_string() == "CN=ann,OU=client,O=Lamina"
    assert ann.issuer == ca.subject
    assert ca.subject != certificate_of_another(folder).subject
    assert ann.not_valid_before_utc < NOW - timedelta(hours=23)
    assert timedelta(days=729) < ann.not_valid_after_utc - NOW < timedelta(days=731)
    assert timedelta(days=3649) < ca.not_valid_after_utc - NOW < timedelta(days=3651)
    usage = ann.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    broker = certificate(folder / "broker/broker.crt")
    names = broker.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.10"]
    assert names.get_values_for_type(x509.DNSName) == ["hub.local"]
    serials = {certificate(path).serial_number for path in (folder / "ca/issued").iterdir()}
    assert len(serials) == 4


def certificate_of_another(folder: Path) -> x509.Certificate:
    provision(folder.parent / "another", hosts=HOSTS)
    return certificate(folder.parent / "another/ca/ca.crt")


def test_no_certificate_outlives_its_authority(tmp_path: Path):
    with Federation.opened(tmp_path / "old", new=True, now=NOW - timedelta(days=3300)) as federation:
        federation.provision(HOSTS, None, ())
    provision(tmp_path / "old", "ann")
    ends = [certificate(tmp_path / "old" / name) for name in ("ca/ca.crt", "clients/ann/client.crt")]
    assert ends[0].not_valid_after_utc == ends[1].not_valid_after_utc


@pytest.mark.parametrize("host", HOSTS)
def test_a_handshake_under_the_flags_of_python_313(folder: Path, host: str):
    ann = folder / "clients/ann"
    ours = Credentials(ann / "ca.crt", ann / "client.crt", ann / "client.key").context()
    ours.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN  # type: ignore[attr-defined]
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "broker/ca.crt")
    theirs.load_cert_chain(folder / "broker/broker.crt", folder / "broker/broker.key")
    theirs.load_verify_locations(folder / "broker/crl.pem")
    theirs.verify_mode = ssl.CERT_REQUIRED
    theirs.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    to_them, to_us = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ours.wrap_bio(to_us, to_them, server_hostname=host)
    server = theirs.wrap_bio(to_them, to_us, server_side=True)
    for _ in range(4):
        for side in (client, server):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    found = server.getpeercert()
    assert found is not None
    assert (("commonName", "ann"),) in found["subject"]


def test_who_is_revoked(folder: Path):
    provision(folder, "ann", renew=True)  # which leaves her two certificates
    given = [certificate(path) for path in sorted((folder / "ca/issued").glob("*-ann.crt"))]
    before = certificate_list(folder)
    old_key = (folder / "clients/ann/client.key").read_bytes()
    assert revoke(folder, "ann")
    assert not revoke(folder, "ann"), "she was before"
    after = certificate_list(folder)
    assert {one.serial_number for one in after} == {one.serial_number for one in given}
    assert len(given) == 2
    assert after.last_update_utc > before.last_update_utc
    assert after.next_update_utc == certificate(folder / "ca/ca.crt").not_valid_after_utc
    assert (folder / "broker/crl.pem").read_bytes() == (folder / "ca/crl.pem").read_bytes()
    for path in (folder / "ca/issued").glob("*-ann.crt"):
        assert "certificate revoked" in verify(folder, path, "sslclient")
    assert verify(folder, folder / "clients/bob/client.crt", "sslclient") == "OK"
    assert states(folder) == {"broker": "valid", "aggregator": "valid", "ann": "revoked", "bob": "valid"}
    assert not (folder / "clients/ann").exists()
    # Her name may be given again, with another key.
    assert provision(folder, "ann") == ["ann"]
    assert (folder / "clients/ann/client.key").read_bytes() != old_key
    assert (folder / "revoked/1-ann/client.key").read_bytes() == old_key
    assert verify(folder, folder / "clients/ann/client.crt", "sslclient") == "OK"
    assert states(folder)["ann"] == "valid"


def certificate_list(folder: Path) -> x509.CertificateRevocationList:
    return x509.load_pem_x509_crl((folder / "ca/crl.pem").read_bytes())


def test_revoking_many_at_once_gives_newer_and_newer_lists(folder: Path):
    provision(folder, *(f"c{number}" for number in range(5)))
    begins, numbers = [], []
    for number in range(5):
        revoke(folder, f"c{number}")
        found = certificate_list(folder)
        begins.append(found.last_update_utc)
        numbers.append(found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
    assert begins == sorted(set(begins))
    assert numbers == [2, 3, 4, 5, 6]
    assert len(certificate_list(folder)) == 5


def test_who_cannot_be_revoked(folder: Path):
    for name in ("nobody", "aggregator", "broker"):
        with pytest.raises(UserError, match=f"has no client '{name}'") as caught:
            revoke(folder, name)
        assert "lamina client list" in caught.value.hint
    assert len(certificate_list(folder)) == 0


def test_what_time_does(folder: Path):
    assert states(folder, NOW + timedelta(days=600))["ann"] == "valid"
    assert states(folder, NOW + timedelta(days=680))["ann"] == "expires soon"
    assert states(folder, NOW + timedelta(days=731))["ann"] == "expired"


def test_the_configurations_say_where_everything_is(folder: Path):
    for home, name in ((folder / "clients/ann", "client"), (folder / "aggregator", "aggregator")):
        options = tomllib.loads((home / f"{name}.toml").read_text())
        paths = Credentials(*(home / options[one] for one in ("ca", "cert", "key")))
        broker = Broker.parse(options["broker"], paths)
        assert (broker.host, broker.port, broker.tls, broker.version) == ("192.0.2.10", 8883, True, 5)
        assert Owner.read(home / options["owner"]) == Owner.read(folder / "owner/owner.pub")
        assert options.get("name") == ("ann" if name == "client" else None)


def test_what_mosquitto_is_told(folder: Path):
    lines = (folder / "broker/mosquitto.conf").read_text().splitlines()
    told = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    for name in ("cafile", "certfile", "keyfile", "crlfile", "acl_file"):
        assert (folder / "broker" / told[name]).is_file()
    for name in ("require_certificate", "use_identity_as_username", "use_username_as_clientid"):
        assert told[name] == "true"
    assert told["allow_anonymous"] == "false"
    assert int(told["max_packet_size"]) > 256 << 10, "the largest message, an offer"
    rules = [line for line in (folder / "broker/acl").read_text().splitlines() if not line.startswith("#")]
    assert "".join(rules).count("%u") == 2
    assert topics.up("+", "%u", "+").replace("up/+", "up/#") in " ".join(rules)


def test_one_at_a_time(folder: Path):
    with Federation.opened(folder), pytest.raises(UserError, match="another process uses"):
        provision(folder, "cy")


def test_a_disk_that_does_not_take_it(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        provision(tmp_path / "file" / "federation", hosts=HOSTS)


def lamina(*words: str) -> Result:
    return CliRunner().invoke(command, words, catch_exceptions=False)


def test_what_the_command_says(tmp_path: Path):
    folder = tmp_path / "federation"
    words = ("provision", str(folder), "--broker-host", "Hub.Local", "--client", "ann")
    first, again = lamina(*words), lamina(*words)
    assert first.output.startswith("new certificates: broker, aggregator, ann\n")
    assert again.output == first.output.replace(
        "new certificates: broker, aggregator, ann", "everything is there already"
    )
    for name in ("broker", "clients/ann", "owner/owner.key", "aggregator/aggregator.toml"):
        assert str(folder / name) in first.output
    assert "to hub.local;" in first.output


def test_the_list_as_table_and_json(folder: Path):
    revoke(folder, "bob")
    listed = json.loads(lamina("client", "list", "--dir", str(folder), "--json").output)
    ann = certificate(folder / "clients/ann/client.crt")
    ends = f"{ann.not_valid_after_utc:%Y-%m-%d}"
    assert [(one["name"], one["state"]) for one in listed["clients"]] == [
        ("ann", "valid"),
        ("bob", "revoked"),
    ]
    assert listed["clients"][0]["serial"] == f"{ann.serial_number:x}"
    assert listed["clients"][0]["expires"] == ann.not_valid_after_utc.isoformat()
    lines = lamina("client", "list", "--dir", str(folder)).output.splitlines()
    expected = [["client", "expires", "state"], ["ann", ends, "valid"], ["bob", ends, "revoked"]]
    assert [line.split() for line in lines] == expected


def test_revoking_says_what_is_left_to_do(folder: Path):
    done = lamina("client", "revoke", "ann", "--dir", str(folder))
    assert done.output.startswith("ann is revoked\n")
    assert str(folder / "ca/crl.pem") in done.output
    assert "restart mosquitto" in done.output
    assert lamina("client", "revoke", "ann", "--dir", str(folder)).output.startswith(
        "ann was revoked before"
    )


def test_certificates_that_end_soon_are_told(folder: Path, caplog: pytest.LogCaptureFixture):
    with Federation.opened(folder, now=NOW - timedelta(days=700)) as federation:
        federation.provision(clients=["cy"])
    lamina("client", "list", "--dir", str(folder))
    assert [record.getMessage().split(" ends on")[0] for record in caplog.records] == [
        "the certificate of cy",
        f"renew with lamina provision {folder} --renew, and hand them over",
    ]
