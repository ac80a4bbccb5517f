"""The samplers to choose from, by the names that other tools give them."""

from typing import Any

OWN = "the model's own"
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
FLOW_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
}


def samplers_for(scheduler: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Those that suit a model: models of flow matching have samplers of their own."""
    return FLOW_SAMPLERS if type(scheduler).__name__.startswith("FlowMatch") else SAMPLERS


def make_sampler(scheduler: Any, name: str) -> Any:
    """A diffusers scheduler with the settings of the model's own one.

    Args:
        scheduler: of the pipeline.
        name: of a sampler; `""` is the pipeline's own.

    Raises:
        ValueError: for a name that is none of this model's samplers.
    """
    if not name or name == OWN:
        return scheduler
    known = samplers_for(scheduler)
    if name not in known:
        raise ValueError(f"There is no sampler “{name[:40]}” for this model: choose one of {', '.join(known)}.")
    import diffusers

    kind, settings = known[name]
    return getattr(diffusers, kind).from_config(scheduler.config, **settings)
