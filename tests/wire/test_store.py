"""Blobs on disk: whole or not there, never under a name from the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from wire.errors import HashMismatch, UserError
from wire.manifest import BlobRef
from wire.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "new" / "blobs")


def files(store: Store) -> list[str]:
    return sorted(path.name for path in store.path(BlobRef.of(b"")).parent.iterdir())


def test_put_and_remove(store: Store) -> None:
    ref = store.put(b"content")
    assert ref == BlobRef.of(b"content")
    assert store.path(ref).read_bytes() == b"content"
    assert store.has(ref)
    store.remove(ref)
    store.remove(ref)
    assert not store.has(ref)


def test_received_in_any_order(store: Store) -> None:
    ref = BlobRef.of(b"abcd")
    with store.receive(ref) as file:
        file.seek(2)
        file.write(b"cd")
        assert not store.has(ref)
        file.seek(0)
        file.write(b"ab")
    assert store.has(ref)
    assert files(store) == [ref.sha256]


def test_other_content_is_not_kept(store: Store) -> None:
    with pytest.raises(HashMismatch), store.receive(BlobRef.of(b"abcd")) as file:
        file.write(b"abce")
    assert files(store) == []


def test_nothing_is_left_of_what_was_broken_off(store: Store) -> None:
    def broken_off() -> None:
        with store.receive(BlobRef.of(b"abcd")) as file:
            file.write(b"ab")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert files(store) == []


def test_a_damaged_blob_is_noticed_and_removed(store: Store) -> None:
    ref = store.put(b"content")
    store.path(ref).write_bytes(b"c0ntent")
    assert not store.has(ref)
    assert files(store) == []


def test_what_a_killed_process_left_is_swept_up(store: Store, tmp_path: Path) -> None:
    ref = store.put(b"content")
    folder = store.path(ref).parent
    (folder / "1234.partial").write_bytes(b"half")
    assert Store(folder).has(ref)
    assert files(store) == [ref.sha256]


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path / "file" / "blobs")
