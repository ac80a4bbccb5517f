"""One picture: the stock pipeline's own call, in a thread of its own, whose models run elsewhere.

The pipeline's text and image models are wrapped: what a row's thread calls is handed to the engine's thread, which
may join it with the calls of other rows. So every row has its own scheduler, timestep, seed, size and guidance, and a
picture is the one that the pipeline draws alone, up to the kernels' rounding in larger batches.
"""

import copy
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn

from ..architectures import DENOISERS
from ..pipelines.samplers import make_sampler
from ..processor import Sample
from ..words import AdapterWords
from .batches import Arguments, arguments_of
from .requests import ImageRequest, Ticket
from .vocabulary import Vocabulary

MAX_IMAGE_PIXELS = 2**26

_here = threading.local()


@dataclass
class ModelCall:
    """One call of a model by a row, and its result."""

    row: "Row"
    part: str
    function: Callable[..., Any]
    arguments: Arguments
    finished: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None

    @property
    def is_denoising(self) -> bool:
        """Whether it may share a pass with others."""
        return self.part in DENOISERS


class Row:
    """One picture that is being drawn.

    Args:
        number: rows of a pass stand in this order.
        ticket: whose picture.
        sample: its adapters, by their names on the pipeline.
        easel: draws it.
    """

    def __init__(self, number: int, ticket: Ticket, sample: Sample, easel: "Easel") -> None:
        self.number = number
        self.ticket = ticket
        self.sample = sample
        self.easel = easel
        self.held: list[Any] = []  # versions of adapters, to release at the end
        self.words: list[AdapterWords] = []  # that its prompts may have
        self.expected = True  # its next call is to come soon

    def draw(self, hand_over: Callable[[ModelCall], Any]) -> Image.Image:
        """The picture. `hand_over` runs a call of a model and returns its result."""
        _here.row, _here.hand_over = self, hand_over
        try:
            return self.easel.draw(self.ticket, self.words)
        finally:
            del _here.row, _here.hand_over


class Easel:
    """The pipelines of one model, as rows use them.

    Args:
        pipeline: a diffusers pipeline that draws from a prompt. Its models are wrapped until `close`.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.text_to_image = _stock(pipeline)
        self.image_to_image = _image_to_image(self.text_to_image)
        self.denoiser = next(
            getattr(pipeline, part) for part in DENOISERS if getattr(pipeline, part, None) is not None
        )
        of_transformer = getattr(pipeline, "unet", None) is None
        patch = max(2, getattr(self.denoiser.config, "patch_size", None) or 1) if of_transformer else 1
        self.stride = pipeline.vae_scale_factor * patch
        self.size = _sample_size(self.denoiser) * pipeline.vae_scale_factor
        self._vae_dtype = pipeline.vae.dtype
        self._wrapped: list[tuple[nn.Module, str]] = []
        self.vocabulary = Vocabulary(pipeline)
        for view in filter(None, (self.text_to_image, self.image_to_image)):
            view.set_progress_bar_config(disable=True)
            vars(view).update(self.vocabulary.tokenizers)
        if pipeline.vae.dtype == torch.float16 and getattr(pipeline.vae.config, "force_upcast", False):
            pipeline.vae.to(torch.float32)  # once for all: rows must not change it under each other
        for part, model in pipeline.components.items():
            if isinstance(model, nn.Module):
                self._wrap(part, model, "forward")
                for name in ("encode", "decode") if part == "vae" else ():
                    self._wrap(part, model, name)

    def close(self) -> None:
        """The pipeline as it was."""
        for model, name in self._wrapped:
            vars(model).pop(name, None)
        self.vocabulary.close()
        if self.pipeline.vae.dtype != self._vae_dtype:
            self.pipeline.vae.to(self._vae_dtype)

    def size_of(self, request: ImageRequest) -> tuple[int, int]:
        """Width and height of the picture in pixels."""
        if request.image is None:
            return request.width or self.size, request.height or self.size
        width, height = (max(self.stride, side // self.stride * self.stride) for side in request.image.size)
        return request.width or width, request.height or height

    def check(self, request: ImageRequest, max_pixels: int) -> None:
        """`ValueError` for what this model cannot draw."""
        width, height = self.size_of(request)
        if width % self.stride or height % self.stride:
            raise ValueError(f"Width and height must be multiples of {self.stride} here, got {width} x {height}.")
        if width * height > max_pixels:
            raise ValueError(
                f"A picture of {width} x {height} has more than the {max_pixels} pixels that are drawn at once here."
            )
        if request.image is not None and math.prod(request.image.size) > MAX_IMAGE_PIXELS:
            raise ValueError(f"The picture to start from has more than {MAX_IMAGE_PIXELS} pixels; make it smaller.")
        _check_steps(make_sampler(self.pipeline.scheduler, request.scheduler or ""), request.num_inference_steps or 1)
        if request.image is not None and self.image_to_image is None:
            raise ValueError(f"{type(self.text_to_image).__name__} cannot start from a picture.")
        template = self.text_to_image if request.image is None else self.image_to_image
        known = _parameters(template)
        unknown = [name for name in ("negative_prompt", "guidance_scale") if getattr(request, name) is not None]
        unknown = [name for name in unknown if name not in known]
        if unknown:
            raise ValueError(f"{type(template).__name__} has no {' and no '.join(unknown)}.")

    def draw(self, ticket: Ticket, words: Sequence[AdapterWords]) -> Image.Image:
        """The picture of one request, by the stock pipeline.

        Args:
            ticket: the request's.
            words: new ones of its adapters, which its prompts may have.
        """
        request = ticket.request
        template = self.text_to_image if request.image is None else self.image_to_image
        pipeline = copy.copy(template)
        vars(pipeline)["scheduler"] = self._scheduler(request)
        vars(pipeline).update(self.vocabulary.taught(words, (request.prompt, request.negative_prompt)))
        settings: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
        }
        size = self.size_of(request)
        known = _parameters(template)
        if "width" in known:
            settings |= {"width": size[0], "height": size[1]}
        if request.image is not None:
            settings |= {"image": ImageOps.fit(request.image.convert("RGB"), size), "strength": request.strength}
        if request.seed is not None:
            settings["generator"] = torch.Generator().manual_seed(request.seed)
        settings = {key: value for key, value in settings.items() if value is not None}
        if "callback_on_step_end" in known:
            settings["callback_on_step_end"] = _Watcher(self, ticket)
        return pipeline(**settings).images[0]

    def _scheduler(self, request: ImageRequest) -> Any:
        if request.scheduler:
            return make_sampler(self.pipeline.scheduler, request.scheduler)
        return copy.deepcopy(self.pipeline.scheduler)

    def _wrap(self, part: str, model: nn.Module, name: str) -> None:
        original = getattr(model, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            row = getattr(_here, "row", None)
            if row is None:
                return original(*args, **kwargs)
            arguments = arguments_of(original, args, kwargs)
            if part == "vae":  # of another precision than the latents, where it was upcast
                arguments = {
                    key: value.to(model.dtype) if isinstance(value, torch.Tensor) else value
                    for key, value in arguments.items()
                }
            return _here.hand_over(ModelCall(row, part, original, arguments))

        setattr(model, name, call)
        self._wrapped.append((model, name))


class _Watcher:
    """Sees each denoising step of a picture: shows previews, and stops what nobody wants any more."""

    def __init__(self, easel: Easel, ticket: Ticket) -> None:
        self.easel = easel
        self.ticket = ticket

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
        self.ticket.check()
        steps, previews = pipeline.num_timesteps, self.ticket.request.num_previews
        if self.ticket.on_preview is None or not previews or step + 1 >= steps:
            return {}
        if step % math.ceil(steps / (previews + 1)) or (step == 0 and previews < steps - 1):
            return {}
        latents = tensors["latents"]
        if latents.ndim == 4:  # packed latents of some transformers have no shape of their own
            self.ticket.on_preview(step + 1, steps, self._picture(pipeline, latents))
        return {}

    @torch.no_grad()
    def _picture(self, pipeline: Any, latents: torch.Tensor) -> Image.Image:
        config = pipeline.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        decoded = pipeline.vae.decode(latents, return_dict=False)[0]
        return pipeline.image_processor.postprocess(decoded.float(), output_type="pil")[0]


def _check_steps(scheduler: Any, steps: int) -> None:
    """`ValueError` for so many steps that the first would be at a timestep which the model does not have."""
    config = scheduler.config
    if config.get("timestep_spacing") == "leading":  # each timestep is moved up by the offset
        most = config.num_train_timesteps - config.get("steps_offset", 0)
        if steps > most:
            raise ValueError(f"This model draws in at most {most} steps with this sampler, got {steps}.")


def _parameters(pipeline: Any) -> set[str]:
    """Names of the arguments of a pipeline's call."""
    return set(inspect.signature(type(pipeline).__call__).parameters)


def _stock(pipeline: Any) -> Any:
    """A view of the same components in the stock class, which leaves the adapters to the engine."""
    view = copy.copy(pipeline)
    if hasattr(type(pipeline), "stock_class"):
        view.__class__ = type(pipeline).stock_class()
    return view


def _image_to_image(pipeline: Any) -> Any:
    """Its sibling that starts from a picture, or `None`."""
    from diffusers import AutoPipelineForImage2Image

    try:
        return AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError:
        return None


def _sample_size(denoiser: Any) -> int:
    size = getattr(denoiser.config, "sample_size", None)
    return size if isinstance(size, int) else 128  # families without one draw 1024 pixels from 128 latents
