"""How far length alone tells which recording is of which text: the mark that a model of both has to pass.

    lamina data prepare stamps && python benchmarks/length_control.py data/stamps

Of a recording counts only how long it is loud, of a text its number of characters, both as logarithms:
they match as well as a normal distribution of the two says, fitted to what clients of the language have.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inputs.dataset import GROUP
from inputs.table import read_table
from inputs.wav import read_wav
from lamina.evaluation import retrieval

Floats = npt.NDArray[np.float64]


def lengths(folder: Path) -> tuple[Floats, npt.NDArray[np.str_]]:
    """Logarithms of every example's seconds and characters, float64 [N, 2]; its language, str [N]."""
    columns = read_table(folder, ("audio", "text", GROUP)).columns
    seconds = [loud_s(*read_wav(folder / path, 3600)) for path in columns["audio"]]
    return np.log([seconds, [len(text) for text in columns["text"]]]).T, np.array(columns[GROUP])


def loud_s(samples: Floats, rate_hz: int) -> float:
    """How long a sound is loud: the frames of 10 ms that are less than 30 dB below the loudest."""
    step = rate_hz // 100
    power = (samples[: len(samples) // step * step].reshape(-1, step) ** 2).mean(axis=1)
    return 0.01 * int((power > power.max() / 1000).sum())


def main() -> None:
    """One line of JSON: the recalls of `lamina evaluate`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    trained = [lengths(folder) for folder in sorted(data.glob("clients/*"))]
    known, of = np.concatenate([values for values, _ in trained]), np.concatenate([of for _, of in trained])
    values, groups = lengths(data / "holdout")
    audio, text = np.empty((len(values), 3)), np.empty((len(values), 3))
    for group in set(groups):
        theirs, here = known[of == group], groups == group
        a, b = ((values[here] - theirs.mean(0)) / theirs.std(0)).T
        likeness = np.corrcoef(theirs.T)[0, 1]
        # Their product is the logarithm of a normal density of both, but for a constant and a factor.
        audio[here] = np.stack([-(a**2), 2 * likeness * a, -np.ones_like(a)], axis=1)
        text[here] = np.stack([np.ones_like(b), b, b**2], axis=1)
    metrics = retrieval({"audio": audio, "text": text}, tuple(groups))
    print(json.dumps({name: round(value, 3) for name, value in metrics.items()}))


if __name__ == "__main__":
    main()
