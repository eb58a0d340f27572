"""A Flower client with PyTorch: all of the model's parameters, by Lamina's data, order and optimizer.

Rules: it is what a person would write with Flower's `ClientApp`, without tricks for or against it. It reads
the examples by Lamina's `inputs/` (from disk, one batch in memory), in the order that
`edge_client/train.py` takes them. What its process has used goes to a file for each round, when its work is
done and once more when it ends, for Flower sends the reply in between.

Next: `lamina_flower/server.py`.
"""

from __future__ import annotations

import atexit
import json
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from edge_client.device import peak_rss_bytes
from inputs.dataset import Dataset
from lamina_flower.work import Work

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    begin, cpu_begin = time.monotonic(), time.process_time()
    work, client = Work.read(str(context.run_config["work"])), str(context.node_config["client"])
    number = int(message.content["config"]["server-round"]) - 1
    torch.set_num_threads(work.threads)
    model, manifest = work.model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    dataset = Dataset.open(
        Path(work.data) / "clients" / client,
        manifest.modalities,
        manifest.task,
        manifest.classes,
        Path(work.bundle).joinpath,
        cache=Path(work.out) / "inputs" / client,
    )
    chosen = manifest.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=work.learning_rates[number],
        betas=(chosen.beta1, chosen.beta2),
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
    )
    generator = np.random.default_rng([work.seeds[number], zlib.crc32(client.encode())])
    loss = 0.0
    for _ in range(work.local_epochs):
        total, order = 0.0, generator.permutation(len(dataset))
        for first in range(0, len(order), work.batch_size):
            indices = np.sort(order[first : first + work.batch_size])
            batch = {name: torch.from_numpy(array) for name, array in dataset.batch(indices).items()}
            optimizer.zero_grad()
            value = model(batch)
            value.backward()
            optimizer.step()
            total += value.item() * len(indices)
        loss = total / len(order)
    reply = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": len(dataset)}),
        }
    )
    used = (work, client, number, time.monotonic() - begin, time.process_time() - cpu_begin)
    _note(*used)
    atexit.register(_note, *used)
    return Message(content=reply, reply_to=message)


def _note(work: Work, client: str, number: int, seconds: float, cpu_s: float) -> None:
    usage = {
        "client": client,
        "round": number,
        "peak_rss_bytes": peak_rss_bytes(),
        "cpu_s": cpu_s,
        "seconds": seconds,
    }
    path = Path(work.out) / "usage" / f"{client}.{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(usage), encoding="utf-8")
