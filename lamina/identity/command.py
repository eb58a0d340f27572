"""`lamina provision`, `lamina sign`, `lamina client list` and `lamina client revoke`.

Rules: this file reads options and prints; cryptography is imported when a command runs, as it is an extra.

Next: `lamina/identity/federation.py`.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wire.errors import UserError

if TYPE_CHECKING:
    from lamina.identity.ca import Issued
    from lamina.identity.federation import Federation

_HOST = re.compile(r"(?=.{1,253}$)([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)(\.[A-Za-z0-9-]{1,63})*")

_folder_option = click.option(
    "--dir",
    "folder",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder that `lamina provision` has made.",
)

log = logging.getLogger(__name__)


@click.command("provision", short_help="Keys and certificates for everybody.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--broker-host",
    "hosts",
    multiple=True,
    metavar="HOST",
    help="The broker's name or IP address; may be repeated, clients take the first.  [default: as before]",
)
@click.option(
    "--broker-port", "port", type=click.IntRange(1, 65535), help="The broker's port.  [default: 8883]"
)
@click.option("--client", "clients", multiple=True, metavar="NAME", help="A client; may be repeated.")
@click.option(
    "--renew", is_flag=True, help="New certificates, for the clients that are named or for everybody."
)
def provision_command(
    folder: Path, hosts: tuple[str, ...], port: int | None, clients: tuple[str, ...], renew: bool
) -> None:
    """Make a private authority, certificates, and what broker, aggregator and clients are started with.

    FOLDER gets a folder for each machine. Run again, it adds clients and leaves what is there.
    """
    addresses = [_host(host) for host in hosts]
    with _federation(folder, new=True) as federation:
        made = federation.provision(addresses, port, clients, renew=renew)
        click.echo(f"new certificates: {', '.join(made)}" if made else "everything is there already")
        steps = list(_next_steps(federation, clients))
        width = max(len(name) for name, _ in steps)
        for name, step in steps:
            click.echo(f"{name:<{width}}  {step}")
        click.echo(f"Copy them, do not move them; {folder / 'ca'} and {folder / 'owner'} are yours alone.")
        _warn(federation)


@click.command("list", short_help="The clients that were provisioned.")
@_folder_option
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def list_command(folder: Path, as_json: bool) -> None:
    """List the clients that `lamina provision` has made in --dir, and until when they are let in."""
    now = datetime.now(timezone.utc)
    with _federation(folder) as federation:
        clients = [one for one in federation.ca.members() if one.role == "client"]
        if as_json:
            click.echo(json.dumps({"clients": [_as_json(client, now) for client in clients]}))
        else:
            width = max([len("client"), *(len(client.name) for client in clients)])
            click.echo(f"{'client':<{width}}  {'expires':<10}  state")
            for client in clients:
                click.echo(f"{client.name:<{width}}  {client.expires:%Y-%m-%d}  {client.state(now)}")
        _warn(federation)


@click.command("revoke", short_help="Shut a client out.")
@click.argument("name")
@_folder_option
def revoke_command(name: str, folder: Path) -> None:
    """Shut the client NAME out: its certificates, of --dir, are no longer good.

    The broker has to be told, and how is printed.
    """
    with _federation(folder) as federation:
        fresh = federation.revoke(name)
    click.echo(f"{name} is revoked" if fresh else f"{name} was revoked before")
    click.echo(
        f"Copy {folder / 'ca' / 'crl.pem'} over the one that the broker has, and restart mosquitto.\n"
        "(A reload would not end the connection that it has now. All others come back by themselves.)"
    )


@click.command("sign", short_help="Say as a run's owner that a bundle may run.")
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The owner's private key, owner.key.",
)
def sign_command(bundle: Path, key: Path) -> None:
    """Sign the bundle's manifest, and by that every file that it names, as the run's owner.

    Clients that were given the owner's public key run nothing else.
    """
    with _cryptography():
        from lamina.identity.ca import owner_key
    from lamina.identity.files import PUBLIC, write
    from wire.manifest import BlobRef, check_files, read_manifest
    from wire.signature import SIGNATURE_NAME, Owner, signed_text

    manifest, content = read_manifest(bundle)
    check_files(bundle, manifest)
    private = owner_key(key)
    try:
        write(bundle / SIGNATURE_NAME, private.sign(signed_text(BlobRef.of(content))), PUBLIC)
    except OSError as error:
        raise UserError(f"{bundle} cannot be written: {error.strerror}", "check its permissions") from error
    click.echo(f"{bundle} is signed by owner {Owner.of(private.public_key()).name}")


def _next_steps(federation: Federation, clients: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    folder, host = federation.folder, federation.where().hosts[0]
    yield "broker", f"copy {folder / 'broker'} to {host}; there: cd broker && mosquitto -c mosquitto.conf"
    yield "owner", f"lamina sign bundle --key {folder / 'owner' / 'owner.key'}"
    yield "aggregator", f"lamina aggregator --config {folder / 'aggregator' / 'aggregator.toml'}"
    for name in clients:
        yield (
            name,
            f"copy {federation.home('client', name)} to it; there: lamina client "
            f"--config {name}/client.toml --data EXAMPLES",
        )


def _warn(federation: Federation) -> None:
    """About certificates that end, the broker's and the aggregator's too."""
    now = datetime.now(timezone.utc)
    ending = [one for one in federation.ca.members() if one.state(now) in ("expires soon", "expired")]
    for one in ending:
        log.warning("the certificate of %s ends on %s", one.name, f"{one.expires:%Y-%m-%d}")
    if ending:
        log.warning("renew with lamina provision %s --renew, and hand them over", federation.folder)


def _as_json(client: Issued, now: datetime) -> dict[str, str]:
    return {
        "name": client.name,
        "serial": f"{client.certificate.serial_number:x}",
        "expires": client.expires.isoformat(),
        "state": client.state(now),
    }


def _host(text: str) -> str:
    """A name or an address. Raises `UserError`."""
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        if not _HOST.fullmatch(text):
            raise UserError(
                f"{text!r} is not a host", "give a name or an IP address, without mqtts:// and port"
            ) from None
        return text.lower()


@contextmanager
def _federation(folder: Path, *, new: bool = False) -> Iterator[Federation]:
    with _cryptography():
        from lamina.identity.federation import Federation
    with Federation.opened(folder, new=new) as federation:
        yield federation


@contextmanager
def _cryptography() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError("this needs cryptography", 'pip install "lamina[identity]"') from error
