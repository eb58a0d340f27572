"""Flower's FedAvg over the clients, from the bundle's initial parameters to `final.safetensors`.

Next: `benchmarks/flower_row.py`, which starts the processes and reads what they leave.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file, save_file

from lamina_flower.work import Work

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds, once all nodes are there. No evaluation: Lamina evaluates the final parameters."""
    work = Work.read(str(context.run_config["work"]))
    model, manifest = work.model()
    model.load_state_dict(load_file(Path(work.bundle) / manifest.initial), strict=True)
    while len(list(grid.get_node_ids())) < work.num_clients:
        time.sleep(0.2)
    instants: list[float] = []

    def between_rounds(_number: int, _arrays: ArrayRecord) -> MetricRecord:
        instants.append(time.monotonic())
        return MetricRecord({})

    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=work.num_clients,
        min_available_nodes=work.num_clients,
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=len(work.learning_rates),
        timeout=24 * 3600,
        train_config=ConfigRecord({}),
        evaluate_fn=between_rounds,
    )
    out = Path(work.out)
    save_file(dict(result.arrays.to_torch_state_dict()), out / "final.safetensors")
    losses = [float(metrics["train_loss"]) for _, metrics in sorted(result.train_metrics_clientapp.items())]
    times = [after - before for before, after in pairwise(instants)]
    (out / "server.json").write_text(json.dumps({"seconds": times, "losses": losses}), encoding="utf-8")
