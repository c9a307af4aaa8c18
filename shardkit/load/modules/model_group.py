"""Models that run one by one and are placed together: they share budgets, a device map, and a
prefetch buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn


class Pipeline(Protocol):
    """What calls them, as Diffusers has it."""

    @property
    def components(self) -> Mapping[str, object]:
        """Its models, and what else it needs, by their names."""


class ModelGroup(nn.Module):
    """Models by their names. It is never called."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        """Let *models* be its children."""
        super().__init__()
        for name, model in models.items():
            self.add_module(name, model)


def called(model: nn.Module) -> list[nn.Module]:
    """What is called of *model*: it, or else the models that are together in it."""
    return list(model.children()) if isinstance(model, ModelGroup) else [model]


def models_of(model: nn.Module | Pipeline) -> list[nn.Module]:
    """*model*, or the models of a pipeline."""
    if isinstance(model, nn.Module):
        return [model]
    return [each for each in model.components.values() if isinstance(each, nn.Module)]
