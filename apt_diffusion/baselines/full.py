"""Full tuning: every parameter of the model is trained and stored."""

from torch import nn

from .registry import Method
from .settings import MODEL_CLASSES


class FullTuning(Method):
    """Adds nothing; `freeze_for_method` freezes nothing."""

    label = "full tuning"
    model_classes = MODEL_CLASSES
    trains_base = True
    learning_rates = (1e-4, 5e-4)

    def attach(self, model: nn.Module) -> list[str]:
        """No module is touched."""
        return []
