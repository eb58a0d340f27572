"""The benchmark's figures on disk, one JSON file a model, and the machine that they come from.

Rules: a result is kept as soon as it is there, and measured again only if its settings, the machine or the
packages have changed, or it is asked for. The machine is described by its processors and packages, not by
its name.

Next: `benchmarks/report.py`, which turns them into a page.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-training-cpu", "executorch", "torch", "paho-mqtt", "amqtt")
BROKEN = (RuntimeError, OSError, KeyError, ValueError)

Result = dict[str, Any]


class Results:
    """The results of a model, by part and name. again: measure what is there already once more.

    missing: how many could not be measured.
    """

    def __init__(self, path: Path, settings: Result, *, again: bool = False) -> None:
        self._path, self._settings, self._again = path, settings, again
        self._machine = machine()
        self.missing = 0
        self._values: Result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._values |= {"settings": settings}

    def get(self, part: str, name: str) -> Result | None:
        """What is known, by the settings of now and measured on this machine with these packages."""
        known: Result | None = self._values.get("parts", {}).get(part, {}).get(name)
        now = (self._settings, self._machine)
        return known if known is not None and (known["settings"], known["machine"]) == now else None

    def need(self, part: str, name: str, measure: Callable[[], Result]) -> Result | None:
        """The result, measured unless it is known. None, and a line that says why, where it cannot be."""
        known = self.get(part, name)
        if known is not None and not self._again:
            print(f"{part} {name}: known", flush=True)
            return known
        begin = time.time()
        try:
            result = measure()
        except BROKEN as error:
            print(f"{part} {name}: not measured: {error}", flush=True)
            self.missing += 1
            return None
        when = time.strftime("%Y-%m-%d", time.localtime(begin))
        result |= {"settings": self._settings, "machine": self._machine}
        result |= {"date": when, "took_s": round(time.time() - begin, 1)}
        self._values.setdefault("parts", {}).setdefault(part, {})[name] = result
        self._values["machine"] = self._machine
        partial = self._path.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(self._values, indent=1), encoding="utf-8")
        partial.replace(self._path)
        print(f"{part} {name}: {headline(result)}", flush=True)
        return result


def headline(result: Result) -> str:
    """One line of a result."""
    words = [f"{result['took_s']:.0f} s"]
    for name, unit in (("peak_mb", "MB"), ("bytes_up", "bytes up"), ("bytes_down", "bytes down")):
        if result.get(name) is not None:
            words.append(f"{result[name]:,.0f} {unit}")
    if result.get("recall") is not None:
        words.append(f"recall@10 {100 * result['recall']:.1f}%")
    return ", ".join(words)


def machine() -> Result:
    """Processor, cores, memory, kernel, Python and packages."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in PACKAGES if name in installed},
    }


def processor() -> str:
    """Its model, as the kernel tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
