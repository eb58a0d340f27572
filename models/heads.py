"""Heads: features of every modality -> the loss. They fit every depth, so each stage's cut is a model.

Rules: plain operations with gradients in ONNX Runtime Training only. Per modality a head normalises,
pools over the (unmasked) tokens and projects to one shared embedding width. What only one modality uses
lies in `ModuleDict`s under its name, so a head can do without some of them (`part`), and a group is trained
by those who have it. A batch of one example has a contrastive loss of zero.

Next: `models/model.py`, which joins encoders and a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from wire.errors import UserError
from wire.manifest import Task

MAX_LOG_SCALE = math.log(100.0)  # CLIP's upper bound of 1 / temperature
INITIAL_LOG_SCALE = math.log(1 / 0.07)


class Projection(nn.Module):
    """Final norm, mean over tokens, projection: float32 [B, T, width] -> float32 [B, embedding]."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embedding, bias=False)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: float32 [B, T]; masked tokens do not count. No token at all pools to zero."""
        x = self.norm(features)
        if mask is None:
            pooled = x.mean(dim=1)
        else:
            count = mask.sum(dim=1, keepdim=True).clamp(min=1.0)
            pooled = (x * mask[:, :, None]).sum(dim=1) / count
        projected: Tensor = self.project(pooled)
        return projected


class Head(nn.Module):
    """What both heads share: one projection per modality, under the modality's name.

    widths: modality -> the width of its features. least: modalities without which there is no loss.
    """

    task: Task
    least = 1

    def __init__(self, widths: Mapping[str, int], embedding: int) -> None:
        super().__init__()
        self.modalities = tuple(widths)
        self.embedding = embedding
        self.projections = nn.ModuleDict(
            {name: Projection(width, embedding) for name, width in widths.items()}
        )

    def part(self, modalities: Collection[str]) -> Head:
        """The head of these modalities only; it shares its parameters with this one."""
        part = copy.copy(self)
        part._modules = dict(self._modules)
        part.modalities = tuple(name for name in self.modalities if name in modalities)
        for name, module in self._modules.items():
            if isinstance(module, nn.ModuleDict):
                kept = {modality: module[modality] for modality in part.modalities}
                part._modules[name] = nn.ModuleDict(kept)
        return part

    def embed(self, modality: str, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features float32 [B, T, width] -> embedding float32 [B, embedding]."""
        embedded: Tensor = self.projections[modality](features, mask)
        return embedded

    def loss(self, embeddings: Mapping[str, Tensor], label: Tensor | None = None, /) -> Tensor:
        """The mean loss of a batch, float32 []."""
        raise NotImplementedError


class ContrastiveHead(Head):
    """Symmetric InfoNCE with a learned temperature (CLIP, arXiv 2103.00020), mean over modality pairs."""

    task: Task = "contrastive"
    least = 2

    def __init__(self, widths: Mapping[str, int], embedding: int) -> None:
        super().__init__(widths, embedding)
        if len(widths) < 2:
            raise UserError("a contrastive head pairs modalities and has only one", "add a second encoder")
        self.log_scale = nn.Parameter(torch.tensor([INITIAL_LOG_SCALE]))

    def embed(self, modality: str, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """As in `Head`, and of length 1."""
        x = super().embed(modality, features, mask)
        return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) + 1e-12)

    def loss(self, embeddings: Mapping[str, Tensor], _label: Tensor | None = None, /) -> Tensor:
        """Row i of each modality belongs together; there is no label."""
        scale = torch.exp(MAX_LOG_SCALE - torch.relu(MAX_LOG_SCALE - self.log_scale))
        pairs = list(combinations(self.modalities, 2))
        losses = [self._pair(scale, embeddings[a], embeddings[b]) for a, b in pairs]
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    def _pair(self, scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
        logits = (scale * a) @ b.transpose(0, 1)
        matching = (scale * a * b).sum(dim=1).mean()
        # The reduced axis is kept: ONNX Runtime's gradient of logsumexp is broken without it.
        rows = torch.logsumexp(logits, dim=1, keepdim=True).mean()
        columns = torch.logsumexp(logits, dim=0, keepdim=True).mean()
        return 0.5 * (rows + columns) - matching


class ClassificationHead(Head):
    """One hidden layer over the modalities' embeddings together, cross-entropy.

    The hidden layer is a sum of one linear map a modality, which is one map of them side by side; one that
    is missing adds nothing.
    """

    task: Task = "classification"

    def __init__(self, widths: Mapping[str, int], embedding: int, classes: int) -> None:
        super().__init__(widths, embedding)
        if classes < 2:
            raise UserError(
                f"a classification model of {classes} classes", "set the option classes to 2 or more"
            )
        self.classes = classes
        self.fuse = nn.ModuleDict({name: nn.Linear(embedding, embedding, bias=False) for name in widths})
        self.bias = nn.Parameter(torch.zeros(embedding))
        self.classify = nn.Linear(embedding, classes)

    def logits(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Embeddings float32 [B, embedding] of every modality -> float32 [B, classes]."""
        hidden = self.bias
        for name in self.modalities:
            hidden = hidden + self.fuse[name](embeddings[name])
        logits: Tensor = self.classify(nn.functional.gelu(hidden))
        return logits

    def loss(self, embeddings: Mapping[str, Tensor], label: Tensor | None = None, /) -> Tensor:
        """`label`: int64 [B], index of the class."""
        assert label is not None
        logits = self.logits(embeddings)
        chosen = logits.gather(1, label[:, None])
        return (torch.logsumexp(logits, dim=1, keepdim=True) - chosen).mean()


def make_head(task: Task, widths: Mapping[str, int], embedding: int, classes: int) -> Head:
    """The head of a task. classes: of classification. Raises `UserError` for a task that is none."""
    if task == "contrastive":
        return ContrastiveHead(widths, embedding)
    if task == "classification":
        return ClassificationHead(widths, embedding, classes)
    raise UserError(f"there is no task {task!r}", "choose contrastive or classification")
