"""Floating point operations of a client over a whole run, from `lamina plan`'s count of the same stages.

Rules: what a client does is examples x epochs x rounds of each stage's train step, and the frozen prefix:
with every step, or its newest segment once when a stage begins. Micro-batches of a contrastive model
compute the embeddings twice.

Next: `export/costs.py`, which counts.
"""

from __future__ import annotations

from scale import Scale


def client_flops(
    scale: Scale, schedule: str, examples: float, *, cached: bool, micro_batch_size: int = 0
) -> dict[str, float]:
    """train, prefix (with every step), cache (once a stage), total: of one client.

    examples: of a client, perhaps a mean. micro_batch_size: 0 for none.
    """
    from export.costs import Setting, schedule_cost
    from export.observe import skeleton
    from export.schedules import SCHEDULES

    model = skeleton(scale.model, scale.model_options())
    plan = SCHEDULES[schedule](model.depths, scale.rounds_of(schedule))
    setting = Setting("onnx", scale.batch_size, scale.local_epochs)
    stages = schedule_cost(model, plan, setting, [micro_batch_size] * len(plan.stages)).stages
    passes = [stage.rounds * scale.local_epochs * examples for stage in stages]
    train = sum(stage.train_flops * times for stage, times in zip(stages, passes, strict=True))
    prefix = sum(stage.prefix_flops * times for stage, times in zip(stages, passes, strict=True))
    cache = sum(stage.segment_flops * examples for stage in stages)
    prefix, cache = (0.0, cache) if cached else (prefix, 0.0)
    return {"train": train, "prefix": prefix, "cache": cache, "total": train + prefix + cache}
