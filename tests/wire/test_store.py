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
    with store.receive(ref, 2) as partial:
        partial.write(1, 2, b"cd")
        assert not store.has(ref)
        partial.write(0, 0, b"ab")
    assert store.has(ref)
    assert files(store) == [ref.sha256]


def test_an_empty_blob_is_received(store: Store) -> None:
    with store.receive(BlobRef.of(b""), 0) as partial:
        assert partial.have == set()
    assert store.has(BlobRef.of(b""))


def test_other_content_is_not_kept(store: Store) -> None:
    with pytest.raises(HashMismatch), store.receive(BlobRef.of(b"abcd"), 1) as partial:
        partial.write(0, 0, b"abce")
    assert files(store) == []


class BrokenOff(BaseException):
    """As Ctrl-C is, or a kill."""


def some(store: Store, ref: BlobRef, num_chunks: int = 3, peer: str = "") -> set[int]:
    """Receive the chunk 1 of a blob, and no more; what was there before."""
    before: set[int] = set()

    def broken_off() -> None:
        with store.receive(ref, num_chunks, peer) as partial:
            before.update(partial.have)
            partial.write(1, 2, b"bb")
            raise BrokenOff

    with pytest.raises(BrokenOff):
        broken_off()
    return before


def test_what_has_come_is_still_there_for_another_process(store: Store) -> None:
    ref = BlobRef.of(b"aabbcc")
    assert some(store, ref) == set()
    assert not store.has(ref)
    store = Store(store.path(ref).parent)
    assert some(store, ref) == {1}
    with store.receive(ref, 3) as partial:
        assert partial.have == {1}
        partial.write(0, 0, b"aa")
        partial.write(2, 4, b"cc")
    assert store.path(ref).read_bytes() == b"aabbcc"
    assert files(store) == [ref.sha256]


def test_a_transfer_in_other_chunks_begins_anew(store: Store) -> None:
    ref = BlobRef.of(b"aabbcc")
    some(store, ref)
    assert some(store, ref, 6) == set()
    assert len(files(store)) == 1, "and takes the place of the other"


def test_of_each_peer_there_is_one_that_is_not_whole(store: Store) -> None:
    one, two = BlobRef.of(b"aabbcc"), BlobRef.of(b"ddbbff")
    for peer in ("ann", "an", "n"):
        some(store, one, peer=peer)
    assert len(files(store)) == 3
    some(store, two, peer="n")
    assert len(files(store)) == 3
    assert some(store, one, peer="an") == some(store, one, peer="ann") == {1}
    assert some(store, one, peer="n") == set()


def test_what_is_being_received_is_left_alone(store: Store) -> None:
    one, two = BlobRef.of(b"aabbcc"), BlobRef.of(b"ddbbff")
    with store.receive(one, 1) as partial:
        some(store, two)
        store.keep(())
        partial.write(0, 0, b"aabbcc")
    assert files(store) == [one.sha256], "the other was swept up"


def test_what_is_wanted_is_kept_whole_or_not(store: Store) -> None:
    whole, coming, gone = store.put(b"whole"), BlobRef.of(b"aabbcc"), BlobRef.of(b"ddbbff")
    some(store, coming, peer="ann")
    some(store, gone, peer="bob")
    store.keep({whole, coming})
    assert store.has(whole)
    assert some(store, coming, peer="ann") == {1}
    assert some(store, gone, peer="bob") == set()


@pytest.mark.parametrize("length", [0, 1, 8, 10, 100])
def test_a_file_of_another_length_begins_anew(store: Store, length: int) -> None:
    ref = BlobRef.of(b"aabbcc")
    some(store, ref)
    (path,) = store.path(ref).parent.iterdir()
    path.write_bytes(b"\1" * length)
    assert some(store, ref) == set()


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
