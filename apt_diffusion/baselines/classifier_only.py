"""The baseline without an adapter: only the task heads, which every method trains, are trained."""

from torch import nn

from .registry import Method
from .settings import MODEL_CLASSES


class ClassifierOnly(Method):
    """Adds nothing: what the heads alone reach is what every method has to beat."""

    label = "classifier only"
    model_classes = MODEL_CLASSES

    def attach(self, model: nn.Module) -> list[str]:
        """No module is touched."""
        return []
