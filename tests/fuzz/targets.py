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
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

if __name__ == "__main__":
    import atheris

    # Before the decoders are imported: what they import is instrumented then.
    instrumented = atheris.instrument_imports(
        include=["wire", "inputs", "aggregator", "edge_client", "csv", "safetensors"]
    )
else:
    instrumented = contextlib.nullcontext()

with instrumented:
    import msgspec
    import numpy as np
    from PIL import Image

    from aggregator.books import NAME, Books, RunRecord
    from edge_client import pending
    from inputs.image import ImageReader
    from inputs.readers import Unreadable
    from inputs.rows import Rows, write_rows
    from inputs.table import read_table
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
    from wire.tensors import max_bytes, pack, unpack, unpack_file
    from wire.transfer import Missing, Owed, decode_chunk, encode_chunk

EXPECTED = (PeerError, UserError)
BASE_MB = 160  # the interpreter, the decoders, the fuzzer and its corpus

SHAPES = {"head.bias": (3,), "head.scale": (), "image.block.1.weight": (4, 5)}
CHUNK_BYTES = 1 << 10
CONTENT = bytes(range(256)) * 12  # of a blob of four chunks
BLOB = BlobRef.of(CONTENT)
KEY = RoundKey(1, 4)
PLAN = TrainPlan(1e-3, 32, 2, 7, "int8", "float16", 4)
CHANGE = Change(BlobRef.of(b"base"), BlobRef.of(b"change"), BlobRef.of(b"result"))


@dataclass(frozen=True)
class Target:
    """decode: takes the fuzzer's bytes. seeds: that it accepts. max_bytes: of an input."""

    decode: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    max_bytes: int
    rss_mb: int = BASE_MB


def accepts(target: Target, content: bytes) -> bool:
    """Whether the decoder takes this; raises what it must not."""
    try:
        target.decode(content)
    except EXPECTED:
        return False
    return True


MESSAGES: dict[type[Any], tuple[Message, ...]] = {
    Announcement: (
        Announcement("r1", BLOB, 1.7e9, 10.0, 120 << 10),
        Announcement("r1", BLOB, 1.7e9, 1e9, CHUNK_BYTES, open=False),
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
    return Target(lambda content: decode(content, kind), tuple(map(encode, MESSAGES[kind])), limit + 1)


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
        inputs={"image": TensorSpec((3, 8, 8), "float32")},
        parameters={"w": "image.block.1.weight"},
        engines={"onnx": {"train": "train.onnx", "eval": "eval.onnx"}},
        segments={"image": graph},
        encoders={"image": graph},
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
        modality = Modality("image", {"image": TensorSpec((3, 16, 16), "float32")}, {"size": 16})
        self._image_reader = ImageReader(modality, Path)

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
        self._written("image", content)
        try:
            self._image_reader.encode(self.folder, "image")
        except Unreadable as error:  # which a data set makes a `UserError` with the row
            raise UserError(str(error), error.hint) from error

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


def _pending() -> bytes:
    (announcement, _), (offer, _), (report,) = MESSAGES[Announcement], MESSAGES[Offer], MESSAGES[Report]
    assert isinstance(announcement, Announcement)
    assert isinstance(offer, Offer)
    assert isinstance(report, Report)
    work = pending.Work.of(announcement, "data", offer)
    return msgspec.msgpack.encode(pending.Pending(work, report))


def _image(name: str, mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (20, 12), 77 if mode in "LP" else None).save(file, name)
    return file.getvalue()


def targets() -> dict[str, Target]:
    """By name, in the order in which they are run."""
    arrays, files = _arrays(), Files()
    table = b'image,text,label\na.png,a red fox,animal\nb.png,"ferns, green",plant\n'
    found = {kind.__name__.lower(): _message(kind) for kind in get_args(Message)}
    found["want"] = Target(_want, found["want"].seeds, MAX_MESSAGE_BYTES + 1)
    found["chunk"] = Target(_chunk, (encode_chunk(BLOB, 0, CONTENT[: CHUNK_BYTES - 20]),), 2 * CHUNK_BYTES)
    found["topic"] = Target(_topic, (b"ann\nreport", b"pi-4.b_c\nhello"), 200)
    found["manifest"] = Target(decode_manifest, (encode_manifest(_manifest()),), 256 << 10)
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
    found["pending"] = Target(files.pending, (_pending(),), 4 << 10)
    found["rows"] = Target(files.rows, (files.seed_of_rows(),), 1 << 10)
    found["books"] = Target(files.books, (files.seed_of_books(),), 64 << 10)
    found["table"] = Target(files.table, (table, b"\xef\xbb\xbf" + table), 16 << 10)
    images = tuple(
        _image(name, mode)
        for name, mode in (("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("GIF", "L"), ("WEBP", "RGB"))
    )
    found["image"] = Target(files.image, images, 16 << 10, rss_mb=1600)
    address = (b"mqtt://ann:secret@pi:1883?version=5", b"mqtts://[::1]")
    found["address"] = Target(lambda content: Broker.parse(content.decode(errors="replace")), address, 200)
    return found


def main() -> None:
    """Fuzz one, as long as libFuzzer's options say."""
    target = targets()[sys.argv.pop(1)]
    atheris.Setup(sys.argv, lambda content: accepts(target, content))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
