"""The train step as standard ONNX operators: what is in the file, and every operation's gradient."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from small_models import small
from torch import nn

from export.aten_onnx import FORMS
from export.engines import EngineFiles, Settings
from export.onnx_step import train_step
from export.parity import relative_l2
from export.schedules import layerwise
from export.stage import Cut, cut_stages
from export.step import loss_and_gradients
from wire.errors import UserError
from wire.manifest import AdamW, TensorSpec

RATE = 1e-2
STEPS = 3
NUMBERS = itertools.count()


class Loss(Cut):
    """Any function of some inputs as a cut: the mean square of what it gives is the loss."""

    outputs = ("loss",)

    def __init__(self, body, **inputs):
        super().__init__()
        self.body = body
        self.inputs = {name: TensorSpec(shape, dtype) for name, (shape, dtype) in inputs.items()}

    def forward(self, *values):
        result = self.body(*values)
        return (result * result).mean()


def step_of(cut, optimizer=None):
    """Under a name of its own, so that nothing is taken for what an earlier test has made."""
    structure = repr(next(NUMBERS)).encode()
    return train_step(cut, loss_and_gradients(cut, structure), optimizer or AdamW())


def small_step(task="contrastive", stage=0, optimizer=None):
    model = small(task)
    return step_of(cut_stages(model, layerwise(model.depths).stages)[stage].train, optimizer)


def after_steps(model, cut, batches):
    """Losses and parameters as ONNX Runtime makes them."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    state = {name: value.detach().numpy() for name, value in cut.named_parameters()}
    for name in list(state):
        state |= {f"{name}.{moment}": np.zeros_like(state[name]) for moment in ("exp_sum", "exp_sum_sq")}
    losses = []
    for number, batch in enumerate(batches, 1):
        scalars = {"step": np.array(number, np.float32), "learning_rate": np.array(RATE, np.float32)}
        values = session.run(None, state | scalars | batch)
        found = dict(zip([output.name for output in session.get_outputs()], values, strict=True))
        losses.append(float(found.pop("loss")))
        state = {name.removesuffix(".next"): value for name, value in found.items()}
    return losses, state


def assert_follows_torch(cut, seed=0):
    generator = np.random.default_rng(seed)
    batches = [
        {
            name: generator.integers(0, 5, (size, *spec.shape))
            if spec.dtype == "int64"
            else generator.normal(size=(size, *spec.shape)).astype(np.float32)
            for name, spec in cut.inputs.items()
        }
        for size in (4, 4, 1)[:STEPS]
    ]
    model = step_of(cut)
    onnx.checker.check_model(model, full_check=True)
    losses, state = after_steps(model, cut, batches)
    mine = copy.deepcopy(cut)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=RATE)
    for batch, got in zip(batches, losses, strict=True):
        optimizer.zero_grad()
        loss = mine(*map(torch.from_numpy, batch.values()))
        loss.backward()
        optimizer.step()
        assert got == pytest.approx(loss.item(), rel=1e-4)
    for name, value in mine.named_parameters():
        assert relative_l2(state[name], value.detach().numpy()) < 1e-4, name


class Attend(nn.Module):
    """Linear maps without bias, a norm without weights, a buffer, and a cut of the last axis."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, 8, bias=False)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.register_buffer("wave", torch.sin(torch.arange(24.0)).reshape(3, 8), persistent=False)

    def forward(self, x):
        x = self.norm(self.map(x)) + self.wave
        weights = torch.softmax(x @ x.transpose(1, 2), dim=-1)
        mixed = weights @ x
        return torch.cat(
            [mixed[..., :3].tanh(), mixed[..., 3:].sigmoid(), torch.stack([x.sum(-1)], -1)], -1
        )


class Look(nn.Module):
    """An embedding, its mean by a mask, and one row chosen for each example."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.out = nn.Linear(4, 5)

    def forward(self, ids):
        mask = (ids > 1).float()[..., None]
        mean = (self.embed(ids) * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        logits = torch.log_softmax(self.out(mean), dim=1)
        return logits.gather(1, ids[:, :1]) * (1 + mean.amax(dim=1, keepdim=True).exp())


def conv(*arguments, **options):
    kind = nn.Conv1d if options.pop("one", False) else nn.Conv2d
    return nn.Sequential(kind(*arguments, **options), nn.GELU(), kind(arguments[1], 2, 2))


CUTS = {
    "attention": lambda: Loss(Attend(), x=((3, 6), "float32")),
    "embedding": lambda: Loss(Look(), ids=((7,), "int64")),
    "stride that leaves a rest": lambda: Loss(conv(3, 4, 3, stride=2, padding=1), x=((3, 8, 9), "float32")),
    "uneven kernel": lambda: Loss(
        conv(3, 4, (3, 2), stride=(1, 3), padding=(2, 0)), x=((3, 7, 8), "float32")
    ),
    "dilation": lambda: Loss(conv(2, 4, 3, dilation=2), x=((2, 9, 8), "float32")),
    "groups": lambda: Loss(conv(6, 4, 3, groups=2, padding=1), x=((6, 5, 6), "float32")),
    "depthwise, no bias": lambda: Loss(conv(4, 4, 3, groups=4, bias=False), x=((4, 6, 6), "float32")),
    "one axis": lambda: Loss(conv(3, 4, 5, stride=2, one=True), x=((3, 20), "float32")),
    "frozen input below a convolution": lambda: Loss(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)), x=((2, 4, 4), "float32")
    ),
}


@pytest.mark.parametrize("name", CUTS)
def test_it_follows_torch(name):
    torch.manual_seed(0)
    assert_follows_torch(CUTS[name]())


@pytest.mark.parametrize("task", ["contrastive", "classification"])
@pytest.mark.parametrize("stage", [0, 2])
def test_the_file_holds_standard_operators_and_no_weights(task, stage):
    model = small_step(task, stage)
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 17)]
    assert model.ir_version <= 9  # of ONNX Runtime 1.17
    assert all(not node.domain for node in model.graph.node)
    assert max(int(np.prod(tensor.dims)) for tensor in model.graph.initializer) <= 8
    assert len(model.SerializeToString()) < 100_000


def test_no_epsilon_is_lost():
    """Where a gradient is exactly zero, the step is 0 / (0 + epsilon)."""
    model = small_step(optimizer=AdamW(eps=3e-8))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (eps,) = (name for name, value in values.items() if value.shape == () and value == 3e-8)
    (product,) = (node.output[0] for node in model.graph.node if eps in node.input)
    (floor,) = (node.output[0] for node in model.graph.node if product in node.input)
    added = [node for node in model.graph.node if node.op_type == "Add" and floor in node.input]
    parameters = [one.name for one in model.graph.output if one.name.endswith(".exp_sum.next")]
    assert len(added) == len(parameters) > 30
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    assert norms
    for node in norms:
        (epsilon,) = [one.f for one in node.attribute if one.name == "epsilon"]
        assert epsilon == pytest.approx(1e-5)


def test_updates_stand_last_and_the_first_gradient_at_the_very_end():
    """The order that makes ONNX Runtime use up each gradient at once; see the file's head."""
    model = small_step(stage=2)
    written = [node.output[0] for node in model.graph.node]
    names = [
        one.name for one in model.graph.output if one.name.endswith(".next") and "exp_sum" not in one.name
    ]
    order = sorted(names, key=written.index)
    assert written[-1] == order[-1]
    assert written.index("loss") < min(map(written.index, names))
    assert order.index("head.log_scale.next") > order.index("image.blocks.0.down.weight.next")
    assert order.index("image.blocks.0.down.weight.next") > order.index("image.blocks.0.up.weight.next")


def test_equal_structures_are_made_once():
    model = small(image_blocks=4, text_blocks=4)
    cuts = cut_stages(model, layerwise(model.depths).stages)
    makers = EngineFiles(("onnx",), Settings(AdamW(), 64, 8))
    assert makers.of_step(cuts[1].train) is makers.of_step(cuts[2].train)
    assert makers.of_step(cuts[0].train) is not makers.of_step(cuts[1].train)


def test_an_operation_without_a_form_is_named(monkeypatch):
    cut = Loss(nn.Sequential(nn.Linear(3, 3), nn.GELU()), x=((3,), "float32"))
    monkeypatch.delitem(FORMS, torch.ops.aten.gelu_backward.default)
    with pytest.raises(UserError, match=r"aten\.gelu_backward\.default, which has no ONNX form") as caught:
        step_of(cut)
    assert "--engine" in caught.value.hint


class Scaled(nn.Module):
    """Operations that keyword arguments change."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 3)

    def forward(self, x):
        return torch.add(x, self.map(x), alpha=2.0)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.GELU(approximate="tanh")), "approximate=tanh"),
        (Scaled, "alpha=2.0"),
    ],
)
def test_a_variant_of_an_operation_is_not_taken_for_the_usual_one(body, named):
    with pytest.raises(UserError, match=f"with {named}, which has no ONNX form"):
        step_of(Loss(body(), x=((3,), "float32")))


class ByHalf(nn.Module):
    """Cuts the batch."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 3)

    def forward(self, x):
        return self.map(x)[: x.shape[0] // 2]


def test_a_batch_that_is_cut_is_refused():
    with pytest.raises(UserError, match=r"number of examples|grow evenly"):
        step_of(Loss(ByHalf(), x=((3,), "float32")))


class ByCount(nn.Module):
    """Does something else for few examples."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 3)

    def forward(self, x):
        return self.map(x) * (2 if x.shape[0] == 19 else 1)


def test_a_model_that_depends_on_the_number_of_examples_is_refused():
    with pytest.raises(UserError, match="other numbers of examples"):
        step_of(Loss(ByCount(), x=((3,), "float32")))
