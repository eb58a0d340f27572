"""The folder that `lamina provision` makes: an authority, an owner, and what each machine is to be handed.

    FOLDER/ca/            the authority (`lamina/identity/ca.py`), and broker.json: where the broker is
    FOLDER/owner/         owner.key, owner.pub
    FOLDER/broker/        mosquitto.conf, acl, ca.crt, crl.pem, broker.crt, broker.key
    FOLDER/aggregator/    aggregator.toml, ca.crt, aggregator.crt, aggregator.key, owner.pub
    FOLDER/clients/NAME/  client.toml, ca.crt, client.crt, client.key, owner.pub
    FOLDER/revoked/       what were clients' folders

Rules: the folders of broker, aggregator and clients work wherever they are copied; `ca` and `owner` stay.
Everything is readable by its owner only. What is there is left as it is, keys for ever; only certificates
are renewed, and the list of revoked ones grows. Killed at any instant, the same command goes on from
there. One process at a time.

Next: `lamina/identity/mosquitto.py`, the broker's; `docs/security.md`, what it is for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ed25519

from lamina.identity.ca import Ca, load, owner_key, tls_key
from lamina.identity.certificates import Role, hosts_of, key_pem, public_pem
from lamina.identity.files import make_folder, write, write_key
from lamina.identity.mosquitto import AGGREGATOR, access_rules, configuration
from wire.errors import UserError
from wire.lock import locked
from wire.topics import check_name

BROKER = "broker"
RESERVED = (AGGREGATOR, BROKER, "ca", "owner")
PORT = 8883


class Where(msgspec.Struct, frozen=True):
    """The broker's names and addresses, the one to connect to first, and its port."""

    hosts: tuple[str, ...]
    port: int

    @property
    def url(self) -> str:
        """In MQTT 5, in which a broker says so when somebody must not write where they do."""
        host = f"[{self.hosts[0]}]" if ":" in self.hosts[0] else self.hosts[0]
        return f"mqtts://{host}:{self.port}?version=5"


class Federation:
    """A provisioned folder, within `opened`."""

    def __init__(self, folder: Path, now: datetime) -> None:
        self.folder = folder
        self.ca = Ca(folder / "ca")
        self._now = now

    @classmethod
    @contextmanager
    def opened(
        cls, folder: Path, *, new: bool = False, now: datetime | None = None
    ) -> Iterator[Federation]:
        """new: it may be made. now: other than it is, for tests.

        Raises `UserError` where the folder is something else, or cannot be read or written.
        """
        made = (folder / "ca").is_dir()
        if not made and not new:
            raise UserError(f"{folder} was not made by lamina provision", "give the folder that was")
        if not made and folder.is_dir() and {path.name for path in folder.iterdir()} - {"lock"}:
            raise UserError(f"{folder} holds something else", "choose a folder that is new or empty")
        try:
            make_folder(folder)
            with locked(folder, "wait until it has ended"):
                yield cls(folder, now or datetime.now(timezone.utc).replace(microsecond=0))
        except OSError as error:
            raise UserError(
                f"{error.filename or folder} cannot be used: {error.strerror}", "check the folder"
            ) from error

    def provision(
        self,
        hosts: Collection[str] = (),
        port: int | None = None,
        clients: Collection[str] = (),
        *,
        renew: bool = False,
    ) -> list[str]:
        """Make what is not there yet; whose certificates are new.

        hosts, port: the broker's; empty and None for what they were. renew: the certificates of `clients`,
        or if that is empty of everybody, are made anew for the keys that they have. Raises `UserError`.
        """
        self._check_names(clients)
        where = self._where(hosts, port)
        self.ca.authority(self._now)
        owner = {"owner.pub": self._owner()}
        everybody = renew and not clients
        if everybody:
            clients = [one.name for one in self.ca.members() if one.role == "client" and not one.is_revoked]
        made = self._make_broker(where, renew=everybody)
        files = owner | _options("aggregator", where)
        made += self._make("aggregator", AGGREGATOR, files, renew=everybody)
        for name in dict.fromkeys(clients):
            files = owner | _options("client", where, name)
            made += self._make("client", name, files, renew=renew)
        self._tell_broker()
        return made

    def where(self) -> Where:
        """Of the broker."""
        return load(self._where_path, lambda content: msgspec.json.decode(content, type=Where))

    def revoke(self, name: str) -> bool:
        """Shut out every certificate that this client was given; False if all were revoked before.

        Raises `UserError` where there is no such client.
        """
        given = [one for one in self.ca.issued() if (one.role, one.name) == ("client", name)]
        if not given:
            raise UserError(
                f"{self.folder} has no client {name!r}", f"see lamina client list --dir {self.folder}"
            )
        self.ca.revoke(given, self._now)
        self._tell_broker()
        self._put_away(name)
        return not all(one.is_revoked for one in given)

    def home(self, role: Role, name: str = "") -> Path:
        """The folder that somebody is to be handed; name: of a client."""
        return self.folder / "clients" / name if role == "client" else self.folder / role

    @property
    def _where_path(self) -> Path:
        return self.ca.folder / "broker.json"

    def _check_names(self, clients: Collection[str]) -> None:
        known = {one.name for one in self.ca.members()} | set(clients)
        for name in clients:
            check_name(name, "the client's name")
            if name.lower() in RESERVED:
                raise UserError(f"a client cannot be called {name!r}", "that name is taken, choose another")
            for other in known:  # one folder, where upper and lower case are the same
                if other != name and other.lower() == name.lower():
                    raise UserError(f"{name!r} and {other!r} differ by case only", "choose another name")

    def _where(self, hosts: Collection[str], port: int | None) -> Where:
        known = self.where() if self._where_path.exists() else None
        if known is None and not hosts:
            raise UserError(
                "where will the broker be?", "give its name or address: --broker-host 192.0.2.10"
            )
        if known is not None and port not in (None, known.port):
            raise UserError(
                f"the broker of {self.folder} listens on port {known.port}",
                "change it yourself in mosquitto.conf, aggregator.toml and every client.toml",
            )
        where = known or Where((), port or PORT)
        if hosts:
            where = Where(tuple(dict.fromkeys(hosts)), where.port)
        make_folder(self.ca.folder)
        if where != known:
            write(self._where_path, msgspec.json.encode(where))
        return where

    def _owner(self) -> bytes:
        """The public key. The private one may have been taken to a safer place."""
        folder = self.folder / "owner"
        private, public = folder / "owner.key", folder / "owner.pub"
        make_folder(folder)
        if not public.exists():
            if not private.exists():
                write_key(private, key_pem(ed25519.Ed25519PrivateKey.generate()))
            write(public, public_pem(owner_key(private).public_key()))
        return public.read_bytes()

    def _make_broker(self, where: Where, *, renew: bool) -> list[str]:
        files = {"acl": access_rules().encode(), "mosquitto.conf": configuration(where.port).encode()}
        known = self.ca.member("broker", BROKER)
        named = set(where.hosts) if known is None else set(hosts_of(known.certificate))
        return self._make("broker", BROKER, files, where.hosts, renew=renew or named != set(where.hosts))

    def _make(
        self,
        role: Role,
        name: str,
        files: Mapping[str, bytes],
        hosts: tuple[str, ...] = (),
        *,
        renew: bool,
    ) -> list[str]:
        """Key, certificate and `files` in their folder; the name, if the certificate is new."""
        folder, known = self.home(role, name), self.ca.member(role, name)
        key_path = folder / f"{role}.key"
        made: list[str] = []
        if known is not None and known.is_revoked:
            self._put_away(name)
        elif known is not None and known.expires > self._now and not key_path.exists():
            if role != "client" and not renew:
                return []  # it was moved to where it is used
            raise UserError(
                f"{name} has a certificate, and {key_path} is gone",
                "bring it back"
                + (", or revoke that one: lamina client revoke" if role == "client" else ""),
            )
        make_folder(folder.parent)
        make_folder(folder)
        key = tls_key(key_path)
        if known is None or not known.is_for(key) or renew:
            known = self.ca.issue(key, role, name, hosts, self._now)
            made.append(name)
        for file, content in {**files, "ca.crt": (self.ca.folder / "ca.crt").read_bytes()}.items():
            if not (folder / file).exists():
                write(folder / file, content)
        path = folder / f"{role}.crt"
        if not path.exists() or path.read_bytes() != known.pem:
            write(path, known.pem)
        return made

    def _tell_broker(self) -> None:
        """Who is revoked."""
        self.ca.revoke((), self._now)
        if self.home("broker").is_dir():
            write(self.home("broker") / "crl.pem", self.ca.crl.read_bytes())

    def _put_away(self, name: str) -> None:
        """A revoked client's folder: its name may be given again, its key may not."""
        folder, revoked = self.home("client", name), self.folder / "revoked"
        if folder.is_dir():
            make_folder(revoked)
            folder.rename(revoked / f"{len(list(revoked.iterdir())) + 1}-{name}")


def _options(role: Role, where: Where, name: str = "") -> dict[str, bytes]:
    """`client.toml` or `aggregator.toml`."""
    options = {"broker": where.url, **({"name": name} if name else {})}
    options |= {"ca": "ca.crt", "cert": f"{role}.crt", "key": f"{role}.key", "owner": "owner.pub"}
    lines = [f"{option} = {json.dumps(value)}\n" for option, value in options.items()]
    text = f"# Made by `lamina provision`. Relative paths start at this file's folder.\n{''.join(lines)}"
    return {f"{role}.toml": text.encode()}
