"""The method of a run: attached anew, or with the weights of an adapter or a checkpoint."""

from pathlib import Path

import torch
from torch import nn

from ...models.vilt import use_official_dropout
from ..methods import attach_method, check_same_method, load_trained, method_config
from ..session import Session


def trained_source(session: Session) -> str | Path | None:
    """Where the weights that the run begins with are: the checkpoint's folder, or `--adapter`."""
    return session.resumed.folder if session.resumed else session.args.adapter


def attach(session: Session, model: nn.Module) -> None:
    """The method of the flags, with the weights of `--adapter` or of the checkpoint where there are some.

    Raises:
        FileNotFoundError, ValueError: for weights that are not there, do not fit, or are of another method.
    """
    args, config, source = session.args, method_config(session.args), trained_source(session)
    torch.manual_seed(session.seed)
    if source is not None:
        load_trained(model, source)
        if not args.eval_only:
            check_same_method(model, config, source)
    elif args.eval_only:
        model.requires_grad_(False)  # evaluated as it is: the outputs of its encoders may be kept
    else:
        attach_method(model, config)
    if args.freeze_scale:
        for name, parameter in model.named_parameters():
            if name.endswith(".log_scale"):
                parameter.requires_grad_(False)
    if model.config.model_type == "vilt":
        use_official_dropout(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def set_training_mode(model: nn.Module) -> None:
    """Training mode, except for METER's frozen encoders: without dropout their outputs can be cached."""
    model.train()
    for encoder in (getattr(model.base_model, name, None) for name in ("text_model", "vision_model")):
        if encoder is not None and not any(parameter.requires_grad for parameter in encoder.parameters()):
            encoder.eval()
