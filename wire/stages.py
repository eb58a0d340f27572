"""From one stage to the next: what is frozen, and what the new blocks start from.

Both sides do this to the same values and get the same bits, so what follows from what a client has need
not travel. Next: `aggregator/state.py`, `edge_client/parameters.py`.
"""

from __future__ import annotations

from wire.compression import restore, round_off
from wire.manifest import Manifest
from wire.messages import Compression
from wire.tensors import Arrays


def advance(manifest: Manifest, stage: int, values: Arrays, compression: Compression) -> bytes:
    """Freeze what the stage after `stage` does not train, and start the blocks that it attaches.

    values: torch name -> float32, at least all that `stage` trains; changed in place. What is frozen is
    rounded as it travels, and blocks that start warm are copies. compression: of what is frozen.
    Returns the frozen groups as they travel.
    """
    shapes = manifest.shapes_of(manifest.groups_frozen_after(stage))
    content = round_off({name: values[name] for name in shapes}, compression)
    values.update(restore(content, shapes, compression))
    for group, source in manifest.stages[stage + 1].warm_start.items():
        for name, below in zip(manifest.names_of((group,)), manifest.names_of((source,)), strict=True):
            if below in values:
                values[name] = values[below].copy()
    return content
