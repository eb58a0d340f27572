"""The device: one process a folder, and what it says about itself."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from platform import libc_ver

import pytest

from edge_client.device import Device, memory_mb, peak_rss_bytes, version
from wire.errors import UserError

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from edge_client.device import Device
with Device("ann", Path("data"), Path(sys.argv[1])).opened():
    print("open", flush=True)
    sys.stdin.read()
"""
TRY = """
import sys
from pathlib import Path
from edge_client.device import Device
from wire.errors import UserError
try:
    with Device("bob", Path("data"), Path(sys.argv[1])).opened():
        print("open")
except UserError as error:
    print(error, error.hint, sep="; ")
"""
TWO_THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from edge_client.device import peak_rss_bytes, share_heap
if sys.argv[1] == "shared":
    share_heap()
kept, before = [], peak_rss_bytes()
def work(_):
    pieces = [np.ones(60_000, np.uint8) for _ in range(1000)]
    kept.append(pieces[-1])  # what lies below it cannot be given back to the system
with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
    for pool in (one, other, one, other):
        list(pool.map(work, [0]))
print(peak_rss_bytes() - before)
"""
BIG_PARENT = """
import subprocess, sys
block = bytearray(300_000_000)
for page in range(0, len(block), 4096):
    block[page] = 1
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""
SMALL_CHILD = """
import resource
from pathlib import Path
from edge_client.device import peak_rss_bytes
SLACK = 1e6  # the kernel counts pages in bunches
def current():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before, peak = current(), peak_rss_bytes()
assert before - SLACK < peak < 150e6, (before, peak)
block = bytearray(b"x") * 50_000_000
peak = peak_rss_bytes()
assert peak > max(current(), before + 50e6) - SLACK, (before, current(), peak)
del block
assert current() < peak - 40e6
assert peak_rss_bytes() > peak - SLACK
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def device(folder: Path) -> Device:
    return Device("ann", folder / "data", folder)


def test_a_second_process_is_told_who_is_in_the_way(tmp_path):
    with device(tmp_path).opened(), start(TRY, str(tmp_path)) as second:
        told, _ = second.communicate(timeout=60)
    assert f"another process uses {tmp_path}; stop it" in told
    assert "--dir" in told
    with start(TRY, str(tmp_path)) as second:
        assert second.communicate(timeout=60)[0] == "open\n"


def test_a_process_that_was_killed_holds_nothing(tmp_path):
    with start(HOLD, str(tmp_path)) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another process uses"), device(tmp_path).opened():
            pass
        first.kill()
    with device(tmp_path).opened():
        pass


def test_the_lock_goes_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), device(tmp_path).opened():
        raise ZeroDivisionError
    with device(tmp_path).opened():
        pass


def test_two_folders_are_no_trouble(tmp_path):
    with device(tmp_path / "one").opened(), device(tmp_path / "two").opened():
        pass


def test_the_folder_is_made_and_keeps_its_blobs(tmp_path):
    folder = tmp_path / "deep" / "down"
    with device(folder).opened() as store:
        ref = store.put(b"content")
    assert (folder / "blobs" / ref.sha256).read_bytes() == b"content"
    with device(folder).opened() as store:
        assert store.has(ref)


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"), device(tmp_path / "file").opened():
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_process_own_and_never_less_than_now():
    """Also in a child of a process that is larger than it will ever be."""
    with start(BIG_PARENT, SMALL_CHILD) as parent:
        parent.communicate(timeout=60)
    assert parent.returncode == 0


def test_without_proc_peak_memory_comes_from_the_kernels_account(monkeypatch):
    def read_text(path):
        raise FileNotFoundError(path)

    class Usage:
        ru_maxrss = 123_456

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr("resource.getrusage", lambda _who: Usage)
    for platform, expected in {"linux": 123_456 * 1024, "darwin": 123_456}.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_rss_bytes() == expected


def test_memory_is_in_millions_of_bytes(monkeypatch):
    assert memory_mb() > 100
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 250_000}.__getitem__)
    assert memory_mb() == 1024


def test_the_version_is_the_distributions(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", {"lamina": "1.2.3"}.__getitem__)
    assert version() == "1.2.3"

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert version() == "unknown"


@pytest.mark.skipif(libc_ver()[0] != "glibc", reason="other C libraries have one heap, or their own ways")
def test_a_thread_uses_what_another_has_freed() -> None:
    def grown(heap: str) -> int:
        command = [sys.executable, "-c", TWO_THREADS, heap]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)

    assert grown("own") > 100_000_000
    assert grown("shared") < 80_000_000
