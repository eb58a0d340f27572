"""Every decoder of what comes from outside, as a target for a fuzzer.

    python tests/fuzz/targets.py NAME [options of libFuzzer] [CORPUS]      # with pip install "lamina[fuzz]"

Rules: a target is fed bytes. It returns, or raises what its decoder documents: `PeerError` of what a peer
sends, `UserError` of what lies on the device. Whatever else comes out is a crash. Its seeds are real
encodings and decode. `max_bytes` is what the decoder takes, or somewhat more, so that its own limit is
met; a process that only runs this target needs at most `rss_mb` of memory, the interpreter included.

Next: `tests/fuzz/run.py`, which runs them; `tests/fuzz/test_targets.py`, the same without a fuzzer.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import random
import shutil
import sys
import tempfile
import wave
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

if __name__ == "__main__":
    import atheris

    # Before the decoders are imported: what they import is instrumented then.
    instrumented = atheris.instrument_imports(
        include=["wire", "inputs", "aggregator", "edge_client", "lamina", "csv", "safetensors"]
    )
else:
    instrumented = contextlib.nullcontext()

with instrumented:
    import msgspec
    import numpy as np
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding
    from PIL import Image

    from aggregator.books import NAME, Books, RunRecord
    from edge_client import pending
    from edge_client.checkpoint import Checkpoint, Progress
    from inputs.audio import AudioReader
    from inputs.image import ImageReader
    from inputs.readers import Reader, Unreadable
    from inputs.rows import Rows, write_rows
    from inputs.series import SeriesReader
    from inputs.table import read_table
    from lamina.identity.ca import Ca, owner_key
    from lamina.identity.certificates import key_pem, new_key, public_pem
    from wire import topics
    from wire.compression import compress, decompress, max_compressed_bytes, restore, round_off
    from wire.errors import PeerError, UserError
    from wire.manifest import (
        FORMAT,
        AdamW,
        BlobRef,
        Graph,
        Manifest,
        Modality,
        Parameter,
        Stage,
        TensorSpec,
        decode_manifest,
        encode_manifest,
    )
    from wire.messages import (
        MAX_MESSAGE_BYTES,
        MAX_OFFER_BYTES,
        Announcement,
        Bye,
        Change,
        Hello,
        Message,
        Offer,
        Receipt,
        Report,
        RoundKey,
        TrainPlan,
        Usage,
        Want,
        decode,
        encode,
    )
    from wire.mqtt import Broker
    from wire.signature import SIGNATURE_BYTES, SIGNATURE_NAME, Owner, read_signature, signed_text
    from wire.store import Store
    from wire.tensors import max_bytes, pack, unpack, unpack_file
    from wire.transfer import Missing, Owed, decode_chunk, encode_chunk, extent

EXPECTED = (PeerError, UserError)
BASE_MB = 160  # the interpreter, the decoders, the fuzzer and its corpus

SHAPES = {"head.bias": (3,), "head.scale": (), "image.block.1.weight": (4, 5)}
CHUNK_BYTES = 1 << 10
CONTENT = bytes(range(256)) * 12  # of a blob of four chunks
BLOB = BlobRef.of(CONTENT)
KEY = RoundKey(1, 4)
PLAN = TrainPlan(1e-3, 32, 2, 7, "int8", "float16", 4)
KEY_OF_OWNER = Ed25519PrivateKey.from_private_bytes(bytes(32))
OWNER = Owner.of(KEY_OF_OWNER.public_key())
SIGNATURE = KEY_OF_OWNER.sign(signed_text(BLOB))
CHANGE = Change(BlobRef.of(b"base"), BlobRef.of(b"change"), BlobRef.of(b"result"))


@dataclass(frozen=True)
class Target:
    """decode: takes the fuzzer's bytes. seeds: that it accepts. max_bytes: of an input.

    tree: of inputs that are a tree of values, what reads and writes such a tree. msgspec is not written in
    Python, so the fuzzer does not see how far it came; a tree with one other value gets further than bytes.
    """

    decode: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    max_bytes: int
    rss_mb: int = BASE_MB
    tree: Any = None


def accepts(target: Target, content: bytes) -> bool:
    """Whether the decoder takes this; raises what it must not."""
    try:
        target.decode(content)
    except EXPECTED:
        return False
    return True


VALUES = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63 - 1,
    2**63,
    1e308,
    -0.0,
    "",
    "a/b",
    "+",
    "\0",
    "x" * 70,
    b"\xff",
    [],
    {},
)


def with_another_value(tree: Any, dice: random.Random, times: int) -> Any:
    """Somewhere in it a value is another one, another's, gone, or there twice and up to so many times."""
    places: list[tuple[Any, Any]] = []

    def gather(value: Any) -> None:
        inner = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else ()
        )
        for key, one in inner:
            places.append((value, key))
            gather(one)

    gather(tree)
    if not places:
        return dice.choice(VALUES)
    (parent, key), (other, place) = dice.choice(places), dice.choice(places)
    match dice.randrange(4):
        case 0:
            parent[key] = dice.choice(VALUES)
        case 1:
            parent[key] = other[place] if other[place] is not parent else None
        case 2:
            del parent[key]
        case 3 if isinstance(parent, list):
            parent *= dice.choice((2, 3, times))
        case _:
            parent[dice.choice(("news", "sha256", "size_bytes", "type"))] = dice.choice(VALUES)
    return tree


def mutated(target: Target, content: bytes, max_bytes: int, seed: int) -> bytes:
    """What the fuzzer tries next: half of the time a tree with another value, where the input is one."""
    dice = random.Random(seed)
    if target.tree is not None and dice.random() < 0.5:
        with contextlib.suppress(
            msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError, TypeError
        ):
            times = max(2, min(100, max_bytes // max(1, len(content))))  # more would only be thrown away
            changed = target.tree.encode(with_another_value(target.tree.decode(content), dice, times))
            if len(changed) <= max_bytes:
                return bytes(changed)
    return bytes(atheris.Mutate(content, max_bytes))


MESSAGES: dict[type[Any], tuple[Message, ...]] = {
    Announcement: (
        Announcement("r1", BLOB, 1.7e9, 10.0, 120 << 10),
        Announcement("r1", BLOB, 1.7e9, 1e9, CHUNK_BYTES, open=False, signature=bytes(64)),
    ),
    Hello: (Hello({"text": 7, "image": 5}, "onnx", 4096, "0.1"),),
    Bye: (Bye(),),
    Offer: (
        Offer(KEY, 1.7e9, ("ann", "bob"), BLOB, (BlobRef.of(b"frozen"),), PLAN, 599.5, CHANGE),
        Offer(RoundKey(0, 0), 0.0, (), BLOB, (), PLAN, 0.0),
    ),
    Want: (Want(BLOB, ((0, 2), (3, 4))), Want(BLOB, ())),
    Report: (Report(KEY, BLOB, ("image.block.1", "head"), 40, 0.3),),
    Receipt: (Receipt(KEY), Receipt(KEY, "late", "stage 2 round 5 is over")),
    Usage: (Usage(KEY, 2**40, 1, 2**33, 12.25, 1.7e9, 3.5),),
}


def _message(kind: type[Any]) -> Target:
    limit = MAX_OFFER_BYTES if kind is Offer else MAX_MESSAGE_BYTES
    seeds = tuple(map(encode, MESSAGES[kind]))
    return Target(lambda content: decode(content, kind), seeds, limit + 1, tree=msgspec.msgpack)


def _want(content: bytes) -> None:
    """As far as what is owed then."""
    owed = Owed()
    want = decode(content, Want)
    owed.add("ann", BLOB, want.ranges, CHUNK_BYTES)
    while owed.next() is not None:
        pass


def _chunk(content: bytes) -> None:
    """As far as the place where its data is written."""
    Missing(BLOB, CHUNK_BYTES, 4).place(decode_chunk(content))


def _topic(content: bytes) -> None:
    """What the broker delivers to an aggregator: two levels are the sender's, the rest is the filter's."""
    client, _, kind = content.decode(errors="replace").replace("/", "").partition("\n")
    topic = topics.up("run", client, kind)  # type: ignore[arg-type]
    assert (topics.run_of(topic), topics.client_of(topic), topics.kind_of(topic)) == ("run", client, kind)
    if topics.is_name(client):
        assert client.isascii()
        assert 1 <= len(client) <= 64
        assert not set(client) & set("/+#\0\n")


def _arrays() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        name: np.asarray(generator.standard_normal(shape), np.float32) for name, shape in SHAPES.items()
    }


def _manifest() -> Manifest:
    graph = Graph("image.0.onnx", ("image",), ("features",), {"w": "image.block.1.weight"})
    stage = Stage(
        trainable=("image.block.1", "head"),
        frozen=(),
        rounds=3,
        warm_start={},
        inputs={
            "image": TensorSpec((3, 8, 8), "float32"),
            "image_anchor": TensorSpec((4,), "float32"),
        },
        parameters={"w": "image.block.1.weight"},
        engines={"onnx": {"train": "train.onnx", "eval": "eval.onnx"}},
        segments={"image": graph},
        encoders={"image": graph},
        anchors={"image": graph},
    )
    names = ("image.0.onnx", "train.onnx", "eval.onnx", "initial.safetensors", "words.model")
    return Manifest(
        format=FORMAT,
        builder="models.image_text:image_text",
        builder_options={"width": 8},
        task="contrastive",
        schedule="layerwise",
        modalities={
            "image": Modality(
                "image", {"image": TensorSpec((3, 8, 8), "float32")}, {"mean": [0.5, 0.4, 0.3]}
            )
        },
        classes=(),
        optimizer=AdamW(),
        max_batch_size=64,
        parameters={name: Parameter(name.rpartition(".")[0], shape) for name, shape in SHAPES.items()},
        stages=(stage,),
        initial="initial.safetensors",
        files={name: BlobRef.of(name.encode()) for name in names},
    )


class Files:
    """Targets that read files, in a folder of their own; in memory where the system has such a folder."""

    def __init__(self) -> None:
        place = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=place if place.is_dir() else None))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        image = Modality("image", {"image": TensorSpec((3, 16, 16), "float32")}, {"size": 16})
        steps = {"x": TensorSpec((8, 3), "float32")}
        series = Modality("series", steps, {"length": 8, "channels": 3})
        sizes: dict[str, Any] = {"length": 8, "mels": 3, "rate_hz": 8000, "window_ms": 25, "hop_ms": 10}
        self._image_reader = ImageReader(image, Path)
        self._series_reader = SeriesReader(series, Path)
        self._audio_reader = AudioReader(Modality("audio", steps, sizes), Path)

    def tensors(self, content: bytes) -> None:
        unpack_file(self._written("tensors", content), SHAPES)

    def pending(self, content: bytes) -> None:
        pending.load(self._written("pending", content))

    def rows(self, content: bytes) -> None:
        rows = Rows.open(self._written("rows.npy", content), (3, 4), np.float32)
        if rows is not None:
            rows.read([2, 0])

    def table(self, content: bytes) -> None:
        self._written("table.csv", content)
        read_table(self.folder, ("image", "text", "label"))

    def image(self, content: bytes) -> None:
        self._encoded(self._image_reader, "image", content)

    def npy(self, content: bytes) -> None:
        self._encoded(self._series_reader, "series.npy", content)

    def csv(self, content: bytes) -> None:
        self._encoded(self._series_reader, "series.csv", content)

    def wav(self, content: bytes) -> None:
        self._encoded(self._audio_reader, "sound.wav", content)

    def _encoded(self, reader: Reader, name: str, content: bytes) -> None:
        self._written(name, content)
        try:
            encoded = reader.encode(self.folder, name)
        except Unreadable as error:  # which a data set makes a `UserError` with the row
            raise UserError(str(error), error.hint) from error
        assert (encoded.shape, encoded.dtype) == (reader.shape, np.dtype(reader.dtype))

    def books(self, content: bytes) -> None:
        """All that a run that goes on reads of them."""
        for name in (f"{NAME}-wal", f"{NAME}-shm", f"{NAME}-journal"):
            (self.folder / name).unlink(missing_ok=True)
        self._written(NAME, content)
        with contextlib.closing(Books(self.folder)) as books:
            books.run()
            books.rounds()
            books.clients_told(KEY)
            books.figures((0, 1))

    def checkpoint(self, content: bytes) -> None:
        (folder := self.folder / "training").mkdir(exist_ok=True)
        (folder / "progress").write_bytes(content)
        Checkpoint(folder, _work(), "onnx", 60.0).resume(NoEngine())  # type: ignore[arg-type]

    def partial(self, content: bytes) -> None:
        """A transfer that a killed process has left, gone on with to its end."""
        store = Store(self.folder / "blobs")
        name = f"{BLOB.sha256}.4@ann.coming"
        (self.folder / "blobs" / name).write_bytes(content)
        with store.receive(BLOB, 4, "ann") as partial:
            missing = Missing(BLOB, CHUNK_BYTES, 4, partial.have)
            for index in [index for first, end in missing.ask() for index in range(first, end)]:
                partial.write(index, *_part(index))
        store.remove(BLOB)

    def owner(self, content: bytes) -> None:
        Owner.read(self._written("owner.pub", content)).has_signed(BLOB, bytes(SIGNATURE_BYTES))

    def owner_key(self, content: bytes) -> None:
        owner_key(self._written("owner.key", content))

    def signature(self, content: bytes) -> None:
        self._written(SIGNATURE_NAME, content)
        assert not OWNER.has_signed(BLOB, read_signature(self.folder)) or content == SIGNATURE

    def certificate(self, content: bytes) -> None:
        (folder := self.folder / "ca" / "issued").mkdir(parents=True, exist_ok=True)
        (folder / "000001-ann.crt").write_bytes(content)
        [(one.name, one.role, one.expires) for one in Ca(folder.parent).members()]

    def revoked(self, content: bytes) -> None:
        (folder := self.folder / "crl").mkdir(exist_ok=True)
        (folder / "crl.pem").write_bytes(content)
        Ca(folder).members()

    def seed_of_checkpoint(self) -> bytes:
        folder = self.folder / "training"
        Checkpoint(folder, _work(), "onnx", 60.0).save(NoEngine(), Progress(1, 8, 2.5))  # type: ignore[arg-type]
        return (folder / "progress").read_bytes()

    def seed_of_rows(self) -> bytes:
        write_rows(path := self.folder / "seed.npy", (3, 4), np.float32, [np.ones((3, 4), np.float32)])
        return path.read_bytes()

    def seed_of_books(self) -> bytes:
        """With a run that has begun. It is small: few pages, and no log beside it."""
        folder = self.folder / "seed"
        with contextlib.closing(Books(folder)) as books:
            books.begin(RunRecord("run", BLOB.sha256, "{}", 1.7e9))
        return (folder / NAME).read_bytes()

    def _written(self, name: str, content: bytes) -> Path:
        (path := self.folder / name).write_bytes(content)
        return path


class NoEngine:
    """Whose state is three bytes."""

    def save(self, path: Path) -> None:
        path.write_bytes(b"123")

    def resume(self, path: Path) -> None:
        assert path.read_bytes() == b"123"


def _work() -> pending.Work:
    announcement, offer = MESSAGES[Announcement][0], MESSAGES[Offer][0]
    assert isinstance(announcement, Announcement)
    assert isinstance(offer, Offer)
    return pending.Work.of(announcement, "data", offer)


def _pending() -> bytes:
    (report,) = MESSAGES[Report]
    assert isinstance(report, Report)
    return msgspec.msgpack.encode(pending.Pending(_work(), report))


def _part(index: int) -> tuple[int, bytes]:
    """Offset and data of a chunk of the blob."""
    offset, length = extent(BLOB, index, CHUNK_BYTES)
    return offset, CONTENT[offset : offset + length]


def _partial() -> bytes:
    """Chunks 0 and 2 have come."""
    whole = bytearray(CONTENT) + b"\1\0\1\0"
    for index in (1, 3):
        offset, data = _part(index)
        whole[offset : offset + len(data)] = bytes(len(data))
    return bytes(whole)


def _certificates() -> tuple[bytes, bytes]:
    """A client's certificate, and a list that revokes it; in PEM."""
    with tempfile.TemporaryDirectory() as folder:
        now = datetime(2026, 1, 1, tzinfo=timezone.utc)
        ca = Ca(Path(folder))
        issued = ca.issue(new_key(), "client", "ann", (), now)
        ca.revoke([issued], now)
        return issued.certificate.public_bytes(Encoding.PEM), ca.crl.read_bytes()


def _image(name: str, mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (20, 12), 77 if mode in "LP" else None).save(file, name)
    return file.getvalue()


def _npy(order: Literal["C", "F"]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(30, dtype=np.float32).reshape((10, 3), order=order))
    return file.getvalue()


def _wav(channels: int, width: int, rate_hz: int = 8000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((channels, width, rate_hz, 0, "NONE", ""))
        written.writeframes(bytes(range(240)) * channels * width)
    return file.getvalue()


def targets() -> dict[str, Target]:
    """By name, in the order in which they are run."""
    arrays, files = _arrays(), Files()
    table = b'image,text,label\na.png,a red fox,animal\nb.png,"ferns, green",plant\n'
    found = {kind.__name__.lower(): _message(kind) for kind in get_args(Message)}
    found["want"] = replace(found["want"], decode=_want)
    found["chunk"] = Target(_chunk, (encode_chunk(BLOB, 0, CONTENT[: CHUNK_BYTES - 20]),), 2 * CHUNK_BYTES)
    found["topic"] = Target(_topic, (b"ann\nreport", b"pi-4.b_c\nhello"), 200)
    found["manifest"] = Target(
        decode_manifest, (encode_manifest(_manifest()),), 256 << 10, tree=msgspec.json
    )
    limit = max_bytes(SHAPES) + 1
    found["tensors"] = Target(lambda content: unpack(content, SHAPES), (pack(arrays),), limit)
    found["tensors_file"] = Target(files.tensors, (pack(arrays),), limit)
    for kind in ("float16", "int8"):
        seeds = {seed: round_off(arrays, kind, seed) for seed in (None, 1)}
        restored = partial(restore, shapes=SHAPES, compression=kind)
        found[f"rounded_{kind}"] = Target(restored, tuple(seeds.values()), limit)
        inflated = partial(decompress, shapes=SHAPES, compression=kind)
        content = tuple(compress(arrays, kind, seed) for seed in seeds)
        found[f"change_{kind}"] = Target(inflated, content, max_compressed_bytes(SHAPES, kind) + 1)
    found["pending"] = Target(files.pending, (_pending(),), 4 << 10, tree=msgspec.msgpack)
    checkpoint = files.seed_of_checkpoint()
    found["checkpoint"] = Target(files.checkpoint, (checkpoint,), 4 << 10, tree=msgspec.msgpack)
    found["partial"] = Target(files.partial, (_partial(),), 8 << 10)
    found["owner"] = Target(files.owner, (public_pem(KEY_OF_OWNER.public_key()),), 1 << 10)
    found["owner_key"] = Target(files.owner_key, (key_pem(KEY_OF_OWNER),), 1 << 10)
    found["signature"] = Target(files.signature, (SIGNATURE,), SIGNATURE_BYTES + 1)
    certificate, revoked = _certificates()
    found["certificate"] = Target(files.certificate, (certificate,), 4 << 10)
    found["revoked"] = Target(files.revoked, (revoked,), 4 << 10)
    found["rows"] = Target(files.rows, (files.seed_of_rows(),), 1 << 10)
    found["books"] = Target(files.books, (files.seed_of_books(),), 64 << 10)
    found["table"] = Target(files.table, (table, b"\xef\xbb\xbf" + table), 16 << 10)
    images = tuple(
        _image(name, mode)
        for name, mode in (("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("GIF", "L"), ("WEBP", "RGB"))
    )
    pixels = (Image.MAX_IMAGE_PIXELS or 0) >> 20
    found["image"] = Target(files.image, images, 16 << 10, rss_mb=BASE_MB + 13 * pixels)  # inputs/image.py
    found["npy"] = Target(files.npy, (_npy("C"), _npy("F")), 4 << 10)
    found["csv"] = Target(files.csv, (b"ax,ay,az\n1,2,3\n-4.5,5e3,.6\n",), 4 << 10)
    floats = _wav(1, 4).replace(b"fmt \x10\0\0\0\x01", b"fmt \x10\0\0\0\x03")
    quiet = floats[:44] + np.linspace(-1, 1, 240, dtype="<f4").tobytes()
    found["wav"] = Target(files.wav, (_wav(1, 2), _wav(2, 3), _wav(1, 1, 44100), quiet), 4 << 10)
    address = (b"mqtt://ann:secret@pi:1883?version=5", b"mqtts://[::1]")
    found["address"] = Target(lambda content: Broker.parse(content.decode(errors="replace")), address, 200)
    return found


def main() -> None:
    """Fuzz one, as long as libFuzzer's options say."""
    target = targets()[sys.argv.pop(1)]
    atheris.Setup(
        sys.argv, lambda content: accepts(target, content), custom_mutator=partial(mutated, target)
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
