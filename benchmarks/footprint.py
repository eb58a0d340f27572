"""What each extra installs on a device, and what its engine costs in memory before any work.

Makes an environment for each extra from the wheel of this tree, and measures in it: the size of
`site-packages` without pip, and the resident memory of a Python process that has imported nothing, and of
one that has imported what a client does. `executorch` is measured twice: as the extra installs it, and with
its wheel alone (`pip install --no-deps executorch==1.5.1`), which is all that the engine uses.

    python benchmarks/footprint.py
    python benchmarks/footprint.py --extra client
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = {
    "client": (["[client]"], [], "onnx"),
    "ort-training": (["[ort-training]"], [], "ort-training"),
    "executorch": (["[executorch]"], [], "executorch"),
    "executorch, its wheel alone": ([""], ["executorch==1.5.1"], "executorch"),
}
"""Name -> extras of the wheel, packages without their dependencies, the engine."""

RESIDENT = """
import sys
{imports}
with open("/proc/self/status") as status:
    print(next(line for line in status if line.startswith("VmRSS")).split()[1])
"""
IMPORTS = """
from edge_client.session import take_part
from edge_client.engines import choose, ENGINES
choose({engine!r}, ENGINES)
assert not {{"torch", "onnx"}} & set(sys.modules)
"""


def main() -> None:
    """Measure, and print a line for each extra."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--extra", action="append", choices=list(EXTRAS), help="[default: all]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lamina-footprint-") as name:
        folder = Path(name)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", name, str(ROOT))
        (wheel,) = folder.glob("*.whl")
        print(f"{'':<30}{'installed':>10}{'packages':>10}{'Python':>10}{'client':>10}")
        for place, extra in enumerate(options.extra or EXTRAS):
            print(line(extra, folder / str(place), wheel), flush=True)


def line(extra: str, folder: Path, wheel: Path) -> str:
    """The figures of one extra: MB on disk, packages, MB resident without and with a client's imports."""
    extras, alone, engine = EXTRAS[extra]
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", *(f"{wheel}{one}" for one in extras))
    for package in alone:
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", package)
    packages = run(python, "-m", "pip", "list", "--format", "freeze").splitlines()
    run(
        python, "-c", IMPORTS.format(engine=engine).replace("assert", "import sys; assert")
    )  # builds, compiles
    bare = run(python, "-c", RESIDENT.format(imports=""))
    loaded = run(python, "-c", RESIDENT.format(imports=IMPORTS.format(engine=engine)))
    skipped = ("pip", "setuptools")
    (site,) = folder.glob("lib/python*/site-packages")
    size = sum(
        path.stat().st_size
        for path in site.rglob("*")
        if path.is_file() and not path.relative_to(site).parts[0].startswith(skipped)
    )
    count = sum(not one.startswith(skipped) for one in packages)
    return (
        f"{extra:<30}{size / 1e6:>7.0f} MB{count:>10}{int(bare) / 1e3:>7.0f} MB{int(loaded) / 1e3:>7.0f} MB"
    )


def run(*command: str) -> str:
    """What a command prints. Exits where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
