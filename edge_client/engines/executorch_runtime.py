"""ExecuTorch on a device: a library over the C++ runtime in its wheel, built here once, called by ctypes.

Rules: of the wheel only `lib/` and `include/` are used, and nothing of it is imported: its Python modules
load torch. The library is built by the device's own compiler for its own processor, at first use, and kept
in the user's cache under a name that tells all it was made from. It is built under another name and
renamed, so processes may build at once. Each program has threads of its own. Whatever is fed is checked
here, for the runtime reads what it is given.

Next: `edge_client/engines/executorch_shim.cpp`, the library; `edge_client/engines/executorch.py`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs

from wire.errors import GraphError, LocalError, UserError
from wire.manifest import Graph
from wire.tensors import Array

VERSION = "1.5.1"  # of the wheel whose libraries these sources are written against
INFER = "infer"

_INSTALL = "install it: pip install 'lamina[executorch]'"
_SOURCES = ("executorch_shim.cpp", "executorch_kernels.cpp", "executorch_shim.h")
_LIBRARIES = (
    "executorch",
    "executorch_kernels_optimized",
    "executorch_backend_xnnpack",
    "executorch_threadpool",
)
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-Wall", "-Wextra"),
    *(
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-signed-zeros",
        "-fassociative-math",
    ),  # vectors, but NaN stays
    *("-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_USE_THREADPOOL"),
)
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int64), 6: np.dtype(np.float32)}  # ExecuTorch's numbers
_TYPES = {dtype: number for number, dtype in _DTYPES.items()}
_MAX_DIMS = 8

AnyArray = npt.NDArray[Any]

log = logging.getLogger(__name__)


class _Value(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("dims", ctypes.c_int32),
        ("sizes", ctypes.c_int32 * _MAX_DIMS),
    )


@dataclass(frozen=True)
class Spec:
    """A tensor that a method takes or gives. `shape`: the largest, the first size may be less."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def wheel() -> Path:
    """The folder of ExecuTorch's wheel. Raises `UserError` where there is none of the right version."""
    try:
        found = importlib.metadata.distribution("executorch")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("ExecuTorch is not installed", _INSTALL) from error
    if found.version.partition("+")[0] != VERSION:
        raise UserError(f"ExecuTorch {found.version} is installed, Lamina needs {VERSION}", _INSTALL)
    folder = Path(str(found.locate_file("executorch")))
    if not (folder / "lib" / "libexecutorch.so").is_file():
        raise UserError("the ExecuTorch that is installed has no C++ libraries", _INSTALL)
    return folder


def compiler() -> str:
    """The C++ compiler of this device: `CXX`, or the first that is found. Raises `UserError`."""
    for name in filter(None, (os.environ.get("CXX"), *_COMPILERS)):
        if path := shutil.which(name):
            return path
    raise UserError("there is no C++ compiler here", "install g++: apt install g++")


def built() -> Path:
    """The library, built if it is not there yet. Raises `UserError` where it cannot be."""
    folder, here = wheel(), Path(__file__).parent
    digest = hashlib.sha256()
    for part in (VERSION, str(folder), platform.machine(), _processor(), *_FLAGS):
        digest.update(part.encode() + b"\0")
    for name in _SOURCES:
        digest.update((here / name).read_bytes())
    target = platformdirs.user_cache_path("lamina") / f"executorch-{digest.hexdigest()[:20]}.so"
    if not target.is_file():
        log.info("building the library of the executorch engine, once on this device")
        _build(compiler(), folder, here, target)
    return target


def _processor() -> str:
    """What this processor can do, as Linux tells it: the library is built for that."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(program: str, folder: Path, here: Path, target: Path) -> None:
    tune = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    include = folder / "include"
    command = [program, *_FLAGS, tune]
    for path in (include, include / "executorch/runtime/core/portable_type/c10"):
        command += ["-isystem", str(path)]
    command += [str(here / name) for name in _SOURCES if name.endswith(".cpp")]
    command += [f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-Wl,--no-as-needed"]
    command += [f"-l{name}" for name in _LIBRARIES]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="executorch-", dir=target.parent) as name:
            result = Path(name) / target.name
            done = subprocess.run(
                [*command, "-o", str(result)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise UserError(
                    f"{program} cannot build the ExecuTorch engine: {_first_error(done.stderr)}",
                    "install a g++ that knows C++17, version 9 or later",
                )
            with result.open("rb") as file:
                os.fsync(file.fileno())
            result.replace(target)
    except OSError as error:
        raise UserError(
            f"the ExecuTorch engine cannot be built in {target.parent}: {error.strerror}",
            "free some space, or set XDG_CACHE_HOME",
        ) from error


def _first_error(text: str) -> str:
    lines = text.splitlines() or ["it says nothing"]
    return next((line for line in lines if "error" in line), lines[-1])


@functools.cache
def library() -> Any:
    """The library, in this process. Raises `UserError` where it cannot be built or loaded."""
    path = built()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"the ExecuTorch engine cannot be loaded: {error}", f"remove {path}") from error
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    values = ctypes.POINTER(_Value)
    loaded.lamina_error.restype = text
    loaded.lamina_close.argtypes, loaded.lamina_close.restype = [pointer], None
    loaded.lamina_open.argtypes = [text, number, ctypes.POINTER(pointer)]
    loaded.lamina_values.argtypes = [pointer, text, number, number, values, ctypes.POINTER(number)]
    loaded.lamina_run.argtypes = [pointer, text, number, values, number, values]
    return loaded


class Program:
    """An opened `.pte` file. Raises `GraphError` for a file that is none."""

    def __init__(self, path: Path, threads: int) -> None:
        self._library = library()
        self._handle = ctypes.c_void_p()
        self._path = path
        status = self._library.lamina_open(os.fsencode(path), threads, ctypes.byref(self._handle))
        if status:
            raise GraphError(
                f"{path} cannot be loaded: {self._reason(status)}", "export the bundle once more"
            )

    def close(self) -> None:
        """Give back the memory."""
        self._library.lamina_close(self._handle)
        self._handle = ctypes.c_void_p()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def takes(self, method: str) -> list[Spec]:
        """What a method is fed, in order. Raises `GraphError` where the program has no such method."""
        return self._specs(method, 0)

    def gives(self, method: str) -> list[Spec]:
        """What a method gives, in order."""
        return self._specs(method, 1)

    def _specs(self, method: str, which: int) -> list[Spec]:
        count, room = ctypes.c_int(), 0
        while True:
            values = (_Value * room)()
            status = self._library.lamina_values(
                self._handle, method.encode(), which, room, values, ctypes.byref(count)
            )
            if status:
                raise GraphError(
                    f"{self._path} has no {method} of ours: {self._reason(status)}",
                    "export the bundle once more",
                )
            if count.value <= room:
                break
            room = count.value
        try:
            return [Spec(_DTYPES[one.type], tuple(one.sizes[: one.dims])) for one in values]
        except KeyError as error:
            raise GraphError(
                f"{self._path} has a value of type {error}", "export the bundle once more"
            ) from error

    def run(
        self, method: str, inputs: Sequence[AnyArray], outputs: Sequence[AnyArray]
    ) -> list[tuple[int, ...]]:
        """Run a method on arrays that fit what it `takes` and `gives`, all of them C-contiguous. An output
        has room for its largest shape; the shapes that this batch gives come back.

        Raises `GraphError` where the runtime fails.
        """
        given = (_Value * len(inputs))(*map(_value, inputs))
        made = (_Value * len(outputs))(*map(_value, outputs))
        status = self._library.lamina_run(
            self._handle, method.encode(), len(inputs), given, len(outputs), made
        )
        if status:
            raise GraphError(f"{method} of {self._path.name} fails: {self._reason(status)}")
        return [tuple(one.sizes[: one.dims]) for one in made]

    def _reason(self, status: int) -> str:
        said = self._library.lamina_error().decode(errors="replace").splitlines()
        return f"ExecuTorch's status {status:#x}" + (f", {said[0]}" if said else "")


def _value(array: AnyArray) -> _Value:
    return _Value(
        array.ctypes.data, _TYPES[array.dtype], array.ndim, (ctypes.c_int32 * _MAX_DIMS)(*array.shape)
    )


def as_fed(name: str, value: Any, spec: Spec) -> AnyArray:
    """A batch [B, ...] as `spec` wants it. Raises `UserError` for more examples than the program takes,
    `LocalError` for anything else that does not fit.
    """
    array: AnyArray = np.require(value, spec.dtype, "C")
    if array.ndim != len(spec.shape) or array.shape[1:] != spec.shape[1:] or not array.shape[0]:
        raise LocalError(f"{name} has the shape {array.shape}, the program takes {spec.shape}")
    if array.shape[0] > spec.shape[0]:
        raise UserError(
            f"a batch of {array.shape[0]} examples, the program takes {spec.shape[0]} at most",
            "use smaller batches, or export the bundle with a larger --max-batch-size",
        )
    return array


def open_graph(path: Path, graph: Graph, threads: int) -> Any:
    """An inference graph of the bundle as a function of (inputs by name, parameters by torch name).

    Raises `GraphError` for a file that is not a program. Both may hold more than the graph needs. The
    result: output name -> array [B, ...]. Parameters are read in place at every call.
    """
    program = Program(path, threads)
    takes, gives = program.takes(INFER), program.gives(INFER)
    if len(takes) != len(graph.inputs) + len(graph.parameters) or len(gives) != len(graph.outputs):
        raise GraphError(f"{path} cannot be loaded: it is not this graph", "export the bundle once more")

    def run(inputs: Mapping[str, AnyArray], parameters: Mapping[str, Array]) -> dict[str, Array]:
        fed = [as_fed(name, inputs[name], spec) for name, spec in zip(graph.inputs, takes, strict=False)]
        for name, spec in zip(graph.parameters.values(), takes[len(fed) :], strict=True):
            value = np.require(parameters[name], spec.dtype, "C")
            if value.shape != spec.shape:
                raise LocalError(f"{name} has the shape {value.shape}, the program takes {spec.shape}")
            fed.append(value)
        # Room for what the program may write, whatever it says; pages that it leaves cost nothing.
        made = [np.empty(spec.shape, spec.dtype) for spec in gives]
        if program.run(INFER, fed, made) != [(len(fed[0]), *spec.shape[1:]) for spec in gives]:
            raise GraphError(f"{path.name} gives other shapes than it says")
        return {name: value[: len(fed[0])] for name, value in zip(graph.outputs, made, strict=True)}

    return run
