"""A train step in micro-batches: the cuts of its passes over the network and over the embeddings.

Rules: every input has one row an example, so a micro-batch is some rows of each. The gradients of the
micro-batches add up to those of the mean loss of the whole batch, to rounding:

- classification: the gradients of each micro-batch's share of the mean.
- contrastive: GradCache (Gao et al., arXiv 2101.06983). `EmbedCut` gives the embeddings of all, `PairsCut`
  the loss of all pairs with its gradients by the embeddings and by the loss's own parameters, and
  `GradientsCut` computes a micro-batch once more: a function whose gradients are those of the loss.

Next: `export/step.py`, which differentiates them; `edge_client/engines/micro_batches.py`, the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor
from torch.nn import Parameter

from export.stage import TrainCut
from wire.manifest import TensorSpec

SHARE = "batch.share"  # input, float32 [b]: one over the size of the whole batch


def _of_loss(name: str) -> bool:
    """Whether a train step's parameter is used by the contrastive loss, and not by the embeddings."""
    return name.startswith("head.") and not name.startswith("head.projections.")


class EmbedCut(TrainCut):
    """A stage's inputs -> its embeddings, float32 [b, E] of each modality."""

    def __init__(self, train: TrainCut) -> None:
        super().__init__(train.sections, train.head, train.inputs)
        self.outputs = tuple(f"{name}.embedding" for name in self.sections)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """`values`: as in `TrainCut`."""
        return tuple(self.embeddings(dict(zip(self.inputs, values, strict=True))).values())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """All but those of the loss."""
        named = super().named_parameters(prefix, recurse, remove_duplicate)
        return ((name, value) for name, value in named if not _of_loss(name))


class PairsCut(TrainCut):
    """The embeddings of the whole batch -> the loss, float32 []."""

    def __init__(self, train: TrainCut) -> None:
        embedded = TensorSpec((train.head.embedding,), "float32")
        inputs = {f"{name}.embedding": embedded for name in train.sections}
        super().__init__(train.sections, train.head, inputs)

    def forward(self, *values: Tensor) -> Tensor:
        """One embedding per modality."""
        return self.head.loss(dict(zip(self.sections, values, strict=True)))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Those of the loss."""
        named = super().named_parameters(prefix, recurse, remove_duplicate)
        return ((name, value) for name, value in named if _of_loss(name))


class GradientsCut(TrainCut):
    """A micro-batch and `given`, which comes last among the inputs -> float32 [], to be differentiated.

    given: for classification `SHARE`; then the value is the micro-batch's part of the mean loss. For a
    contrastive loss its gradients by the embeddings, and by its own parameters, an equal part an example.
    """

    def __init__(self, train: TrainCut) -> None:
        if train.head.task == "contrastive":
            embedded = TensorSpec((train.head.embedding,), "float32")
            self.given = {f"{name}.gradient": embedded for name in train.sections}
            self.given |= {
                f"{name}.gradient": TensorSpec(tuple(value.shape), "float32")
                for name, value in PairsCut(train).named_parameters()
            }
        else:
            self.given = {SHARE: TensorSpec((), "float32")}
        super().__init__(train.sections, train.head, train.inputs | self.given, train.alignment)

    def forward(self, *values: Tensor) -> Tensor:
        """`values`: as in `TrainCut`, then those of `given`."""
        batch = dict(zip(self.inputs, values, strict=True))
        embeddings = self.embeddings(batch)
        if SHARE in batch:
            return self.loss(embeddings, batch) * batch[SHARE].sum()
        total: Tensor | None = None
        for name in self.given:
            of = name.removesuffix(".gradient")
            value = embeddings[of] if of in embeddings else attrgetter(of)(self)
            product = (value * batch[name]).sum()
            total = product if total is None else total + product
        assert total is not None
        return total


@dataclass(frozen=True)
class Passes:
    """What a train step in micro-batches of at most `size` examples is made of.

    embed, pairs: of a contrastive loss.
    """

    size: int
    gradients: GradientsCut
    embed: EmbedCut | None
    pairs: PairsCut | None


def passes(train: TrainCut, size: int) -> Passes:
    """The cuts of the passes of `train`'s step."""
    contrastive = train.head.task == "contrastive"
    return Passes(
        size,
        GradientsCut(train),
        EmbedCut(train) if contrastive else None,
        PairsCut(train) if contrastive else None,
    )
