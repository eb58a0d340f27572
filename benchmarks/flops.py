"""Floating point operations of a client over a whole run, from `lamina plan`'s count of the same stages.

Next: `export/flops.py`, which says what a client pays for.
"""

from __future__ import annotations

from scale import Scale


def client_flops(
    scale: Scale, schedule: str, examples: float, *, cached: bool, micro_batch_size: int = 0
) -> dict[str, float]:
    """train, prefix (with every step), cache (once a stage), total: of one client, in every round.

    examples: of a client, perhaps a mean. micro_batch_size: 0 for none.
    """
    from export.costs import Setting, schedule_cost
    from export.flops import Flops, flops_by_round
    from export.observe import skeleton
    from export.schedules import SCHEDULES

    model = skeleton(scale.model, scale.model_options())
    plan = SCHEDULES[schedule](model.depths, scale.rounds_of(schedule))
    setting = Setting("onnx", scale.batch_size, scale.local_epochs)
    stages = schedule_cost(model, plan, setting, [micro_batch_size] * len(plan.stages)).stages
    rounds = [number for number, stage in enumerate(stages) for _ in range(stage.rounds)]
    each = flops_by_round(stages, rounds, examples, scale.local_epochs, cached=cached)
    whole = sum(each, Flops())
    return {"train": whole.train, "prefix": whole.prefix, "cache": whole.cache, "total": whole.total}
