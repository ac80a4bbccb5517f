"""Graphs of `torch.compile` that were made before an adapter was attached."""

import sys
from collections.abc import Sequence

import torch
from torch import nn


def forget_graphs(model: nn.Module, changed: Sequence[nn.Module]) -> None:
    """Drops the graphs that would go on without the new hooks of the `changed` modules."""
    if changed and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
