"""Less memory for slower steps, under both of the names that transformers has for it."""

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Has the backward pass compute activations again instead of keeping them."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
