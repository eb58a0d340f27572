"""Packages come through npm, pip and apt-get, count only with their pinned content, and are kept."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import msgspec
import pytest
from tiny_registry import Publish, PublishWheel, calls, deb

from lamina.data import fetchers
from lamina.data.deb import files_of_deb
from lamina.data.registry import cache_folder, fetch, read_member
from wire.errors import LocalError, UserError
from wire.manifest import BlobRef


def quiet(what: str, done: int, steps: int) -> None:
    pass


def test_packages_are_fetched_once_and_kept(
    archives: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = [publish("@icons/one", {"a.json": 1}), publish("two", {"a.json": [2]})]
    steps: list[tuple[int, int]] = []
    paths = fetch(packages, lambda what, done, of: steps.append((done, of)))
    assert [read_member(paths[p.name], "a.json") for p in packages] == [b"1", b"[2]"]
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert sorted(calls(archives)) == ["@icons/one@1.0.0", "two@1.0.0"]

    monkeypatch.setenv("PATH", "")
    assert fetch(packages, quiet) == paths
    assert sorted(cache_folder().iterdir()) == sorted(paths.values())


def test_a_damaged_download_is_fetched_again(archives: Path, publish: Publish) -> None:
    package = publish("one", {"a.json": 1})
    path = fetch([package], quiet)["one"]
    path.write_bytes(b"half")
    fetch([package], quiet)
    assert read_member(path, "a.json") == b"1"
    assert len(calls(archives)) == 2


def test_other_content_is_refused_and_not_kept(publish: Publish) -> None:
    pinned = publish("one", {"a.json": 1})
    publish("one", {"a.json": 2})
    with pytest.raises(UserError, match=r"one 1\.0\.0 is not the content") as caught:
        fetch([pinned], quiet)
    assert "npm config get registry" in caught.value.hint
    assert list(cache_folder().iterdir()) == []


def test_what_npm_cannot_get_is_named(archives: Path, publish: Publish) -> None:
    good, gone = publish("good", {"a.json": 1}), publish("gone", {"a.json": 1})
    (archives / gone.archive).unlink()
    with pytest.raises(UserError, match=r"npm could not download gone 1.0.0 \(E404\)") as caught:
        fetch([good, gone], quiet)
    assert "npm ping" in caught.value.hint


def test_no_npm_at_all(archives: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    package = publish("one", {"a.json": 1})
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(fetchers.sysconfig, "get_path", lambda name: "/nonexistent")
    with pytest.raises(UserError, match=r"no npm to download one 1\.0\.0") as caught:
        fetch([package], quiet)
    assert "lamina[data]" in caught.value.hint


def test_the_npm_beside_this_python_will_do(
    archives: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = publish("one", {"a.json": 1})
    monkeypatch.setattr(fetchers.sysconfig, "get_path", lambda name, path=os.environ["PATH"]: path)
    monkeypatch.setenv("PATH", "")
    assert fetch([package], quiet)["one"].is_file()


def test_the_archive_is_called_what_npm_calls_it(publish: Publish) -> None:
    package = msgspec.structs.replace(publish("@icons/one", {}), version="2.1.0")
    assert package.archive == "icons-one-2.1.0.tgz"


def test_a_wheel_is_fetched_by_pip_and_kept(
    archives: Path, publish: Publish, publish_wheel: PublishWheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an archive of npm's; that the wheel wants a Python that nobody has is of no matter."""
    packages = [publish("one", {"a.json": 1}), publish_wheel("some_data", {"some_data/b.bin": b"23"})]
    paths = fetch(packages, quiet)
    assert read_member(paths["some_data"], "some_data/b.bin") == b"23"
    assert paths["some_data"].name == "some_data-1.0.0-py3-none-any.whl"
    assert sorted(cache_folder().iterdir()) == sorted(paths.values())

    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("fetched again"))
    assert fetch(packages, quiet) == paths
    with pytest.raises(LocalError, match="no file some_data/c"):
        read_member(paths["some_data"], "some_data/c")


def test_another_wheel_is_refused_and_not_kept(publish_wheel: PublishWheel) -> None:
    pinned = publish_wheel("some_data", {"b.bin": b"1"})
    publish_wheel("some_data", {"b.bin": b"2"})
    with pytest.raises(UserError, match=r"pip's some_data 1\.0\.0 is not the content") as caught:
        fetch([pinned], quiet)
    assert "pip config list" in caught.value.hint
    assert list(cache_folder().iterdir()) == []


def test_what_pip_cannot_get_is_named(archives: Path, publish_wheel: PublishWheel) -> None:
    gone = publish_wheel("some_data", {"b.bin": b"1"})
    (archives / gone.archive).unlink()
    told = r"pip could not download some_data 1\.0\.0 \(No matching distribution found"
    with pytest.raises(UserError, match=told) as caught:
        fetch([gone], quiet)
    assert "\n" not in str(caught.value)


def test_no_pip_at_all(publish_wheel: PublishWheel, monkeypatch: pytest.MonkeyPatch) -> None:
    package = publish_wheel("some_data", {"b.bin": b"1"})

    def not_installed(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", not_installed)
    with pytest.raises(UserError, match=r"no pip to download some_data 1\.0\.0") as caught:
        fetch([package], quiet)
    assert "ensurepip" in caught.value.hint


FILES = {"./usr/a/one.txt": b"1", "./usr/b/two.txt": b"2", "./usr/a/c/three.txt": b""}


def test_a_debian_package_is_fetched_by_apt_and_kept(
    archives: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, content = deb("some-data", FILES)
    (archives / package.archive).write_bytes(content)
    path = fetch([publish("one", {"a.json": 1}), package], quiet)["some-data"]
    assert path.name == "some-data_1.0.0_all.deb"
    assert list(files_of_deb(path, "./usr/a/")) == [("one.txt", b"1"), ("c/three.txt", b"")]
    monkeypatch.setenv("PATH", "")
    assert fetch([package], quiet) == {"some-data": path}


def test_what_apt_cannot_get_is_named(archives: Path) -> None:
    with pytest.raises(UserError, match=r"apt-get could not .*some-data 1\.0\.0 \(Unable to loc") as caught:
        fetch([deb("some-data", FILES)[0]], quiet)
    assert "apt-get update" in caught.value.hint


def test_no_apt_at_all(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no apt-get to download some-data") as caught:
        fetch([deb("some-data", FILES)[0]], quiet)
    assert "Debian" in caught.value.hint


WHOLE = deb("some-data", FILES)[1]
DATA = WHOLE.index(b"data.tar.xz") + 60


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no Debian package"),
        (b"PK" * 40, "no Debian package"),
        (b"!<arch>\n", "no data.tar.xz"),
        (WHOLE.replace(b"data.tar.xz", b"data.tar.gz"), "no data.tar.xz"),
        (WHOLE[:8] + WHOLE[8:68].replace(b"4  ", b"-60") + WHOLE[68:], "no data.tar.xz"),
        (WHOLE[:-40], "damaged"),
        (WHOLE[: DATA + 30], "damaged"),
        (WHOLE[: DATA + 40] + bytes([WHOLE[DATA + 40] ^ 8]) + WHOLE[DATA + 41 :], "damaged"),
        (WHOLE[:DATA] + b"PK" * 100, "damaged"),
    ],
)
def test_what_is_no_whole_debian_package(tmp_path: Path, content: bytes, told: str) -> None:
    assert WHOLE[8:24] == b"debian-binary   "
    (tmp_path / "a.deb").write_bytes(content)
    with pytest.raises(LocalError, match=told):
        list(files_of_deb(tmp_path / "a.deb", "./usr/"))


def test_a_python_without_lzma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.deb").write_bytes(WHOLE)
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(UserError, match="no lzma"):
        list(files_of_deb(tmp_path / "a.deb", "./usr/"))


def test_a_large_package_is_waited_for(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = msgspec.structs.replace(deb("some-data", FILES)[0], content=BlobRef("0" * 64, 10**9))
    waited: list[float] = []

    def run(*_arguments: object, timeout: float, **_more: object) -> None:
        waited.append(timeout)
        raise OSError("gone")

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(UserError, match="gone"):
        fetch([package], quiet)
    assert waited[0] > 10_000
