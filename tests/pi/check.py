"""`make pi-check`: a client on an emulated Raspberry Pi trains as one on this machine does.

It builds a Debian 12 arm64 userland, installs the client there from the built wheel, and conducts a small
run three times: with a client on this machine, with the same client in the userland, and with one on each.

Rules: the emulated client's parameters must equal the other's within the tolerance of export's parity
check, and differ from the initial ones by more, or the comparison would say nothing. Everything is in one
folder and is used again. An emulated CPU computes as the real one does; its speed tells nothing.

Next: `userland.py`, the emulated Pi; `docs/devices.md`, a real one.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import userland
from machine import REPOSITORY, Machine, build_wheel, emulated_pi, facts, install, this_machine

from wire.errors import LaminaError, UserError
from wire.lock import locked

if TYPE_CHECKING:
    from runs import Result

ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": ("client", ()),
    "executorch": ("executorch", ("g++",)),
}
"""Engine -> the extra of the wheel that brings it, and the Debian packages that it needs besides."""

RUNTIMES = ("onnxruntime", "executorch")
DOT_PRODUCT = 1 << 20  # of AT_HWCAP, what the kernel says that an arm64 CPU can do; a Pi 4's cannot


@click.command()
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=REPOSITORY / "lamina-work" / "pi",
    help="Where the userland, the clients and the runs are kept.  [default: lamina-work/pi]",
)
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    default="onnx",
    show_default=True,
    help="What runs the train steps.",
)
@click.option("--mirror", metavar="URL", help="Debian's.  [default: that of this machine's apt]")
def command(folder: Path, engine: str, mirror: str | None) -> None:
    """Compare a client on an emulated Raspberry Pi with one on this machine. Needs root."""
    begin = time.monotonic()
    userland.private_mounts([sys.executable, *sys.argv])
    userland.prepare_host()
    folder, (extra, packages) = folder.resolve(), ENGINES[engine]
    with locked(folder, "wait for it, or choose another --dir"):
        log = folder / "build.log"
        userland.build(folder / "root", mirror, log)
        with userland.mounted(folder / "root"):
            userland.add(folder / "root", packages, log)
            wheel = build_wheel(folder / "wheel", log)
            machines = this_machine(folder / "x86-64", extra), emulated_pi(folder / "root", extra)
            told = {}
            for machine in machines:
                install(machine, wheel, extra, log)
                told[machine.name] = facts(machine)
            if told["arm64"]["hwcap"] & DOT_PRODUCT:
                raise UserError(
                    "the emulated CPU can do more than a Pi 4's", "mend QEMU_CPU in userland.py"
                )
            _compare(folder, engine, *machines, told, log)
    click.echo(f"passed ({time.monotonic() - begin:.0f} s)")


def _compare(
    folder: Path, engine: str, here: Machine, pi: Machine, told: dict[str, dict[str, Any]], log: Path
) -> None:
    """The three runs. Raises `UserError` if the emulated client's result is another one."""
    from runs import conduct, export, initial, worst, write_examples

    from export.parity import MAX_ERROR  # with it comes torch, which takes seconds

    examples = {name: write_examples(folder / "examples" / name, len(name)) for name in ("pi", "hall")}
    click.echo(f"exporting for {engine}")
    bundle = export(folder / "bundle", engine, examples["pi"], log)
    cohorts = {"x86-64": {"pi": here}, "arm64": {"pi": pi}, "both": {"pi": pi, "hall": here}}
    results = {}
    for name, cohort in cohorts.items():
        click.echo(f"training with {' and '.join(f'{one} on {of.name}' for one, of in cohort.items())}")
        clients = {client: (machine, examples[client]) for client, machine in cohort.items()}
        results[name] = conduct(folder / "runs" / name, bundle, engine, clients)
    expected = results["x86-64"].parameters
    error, tensor = worst(results["arm64"].parameters, expected)
    change, _ = worst(initial(bundle), expected)
    other, _ = worst(results["both"].parameters, expected)
    _report(told, results)
    click.echo(f"parameters: {len(expected)} tensors, arm64 is within {error:.1e} of x86-64 ({tensor});")
    click.echo(
        f"  {MAX_ERROR:.0e} is allowed, training changed them by {change:.1e}, both clients by {other:.1e}"
    )
    if not error <= MAX_ERROR:  # also true for NaN
        raise UserError(f"arm64 differs from x86-64 by {error:.1e} in {tensor}", f"see {folder / 'runs'}")
    if not min(change, other) > 10 * MAX_ERROR:
        raise UserError("the comparison cannot tell one result from another", "train more in runs.py")


def _report(told: dict[str, dict[str, Any]], results: dict[str, Result]) -> None:
    """What the machines are, and what the clients say of themselves."""
    arm64 = told["arm64"]
    runtimes = [f"{name} {arm64['packages'][name]}" for name in RUNTIMES if name in arm64["packages"]]
    losses = zip(results["arm64"].losses, results["x86-64"].losses, strict=True)
    loss_error = max(abs(got - expected) / abs(expected) for got, expected in losses)
    peaks = {name: result.peak_rss_bytes["pi"] / 1e6 for name, result in results.items()}
    click.echo(
        f"userland: {arm64['machine']}, Python {arm64['python']}, {arm64['libc']}, {arm64['cpus']} CPUs as "
        f"{userland.QEMU_CPU}, {' '.join(runtimes)}"
    )
    click.echo(f"installed: {arm64['venv_bytes'] / 1e6:.0f} MB, without torch and onnx")
    click.echo(
        f"memory: {peaks['arm64']:.0f} MB at most, qemu's own included; x86-64 {peaks['x86-64']:.0f} MB"
    )
    click.echo(f"losses: {len(results['arm64'].losses)} rounds, within {loss_error:.1e} of x86-64")


def main() -> None:
    """Run the command and exit; an error is one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends in order, as Ctrl-C does
    try:
        command(standalone_mode=False)
    except LaminaError as error:
        click.echo(f"pi-check: {error}" + (f" - {error.hint}" if error.hint else ""), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)


if __name__ == "__main__":
    main()
