"""Drawing: one pipeline for everybody, one drawing at a time, watched step by step."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps

from .. import pipelines
from ..miniature import resolve_model
from ..pipelines.samplers import make_sampler, samplers_for
from ..words import check_apart
from .background import Watcher, in_background
from .embedded import EMBEDDED, Embedded
from .gates import recorded_gates, step_maps
from .library import Adapter
from .order import Order
from .python_code import call_settings, pipeline_name
from .turns import Turns, Who

PREVIEWS = 12  # at most so many per picture: each costs a decoding
NOBODY = Who("")


@dataclass(frozen=True)
class Waiting:
    """Others use the model first.

    Args:
        ahead: how many.
        seconds: until it is one's turn, where that is known.
    """

    ahead: int
    seconds: float | None


@dataclass(frozen=True)
class Progress:
    """How far a drawing is. `pictures` are previews until `done`, and keep their place: `adapted` or `base`."""

    part: str  # "adapted" or "base"
    step: int  # of all parts together
    steps: int
    pictures: tuple[Image.Image, ...] = ()
    done: bool = False  # this part
    maps: torch.Tensor | None = None  # where the adapters acted, (steps, h, w) in [0, 1]


class Painter:
    """The diffusion model that everybody draws with.

    Args:
        model: the name of an embedded one, a folder or a hub id.
        turns: the queue for it.
    """

    def __init__(self, model: str, turns: Turns | None = None) -> None:
        self.model = model
        self.turns = Turns() if turns is None else turns  # an empty queue is false
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.float16 if self.device == "cuda" else torch.float32
        self.pipe = load_pipeline(model, self.dtype).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.stride = self.pipe.vae_scale_factor  # pixels per latent cell
        self.is_transformer = getattr(self.pipe, "unet", None) is None
        denoiser = self.pipe.transformer if self.is_transformer else self.pipe.unet
        self.size = denoiser.config.sample_size * self.stride
        self.samplers = list(samplers_for(self.pipe.scheduler))

    @property
    def embedded(self) -> Embedded | None:
        """What is known of an embedded model; `None` for any other."""
        return EMBEDDED.get(self.model)

    @property
    def default_steps(self) -> int:
        """Denoising steps that the page offers at first."""
        return self.embedded.steps if self.embedded else 25

    @property
    def default_guidance(self) -> float:
        """Guidance that the page offers at first."""
        return self.embedded.guidance_scale if self.embedded else 7.5

    def check(self, order: Order) -> None:
        """`ValueError` for a size or a sampler that this model does not have."""
        for name, value in (("width", order.width), ("height", order.height)):
            if value % 8 or not 8 <= value <= 2 * self.size:
                raise ValueError(f"The {name} must be a multiple of 8, at most {2 * self.size}; {value} is not.")
        make_sampler(self.pipe.scheduler, order.sampler)
        if self.is_transformer and any(factor != 1 for _, factor in order.blocks):
            raise ValueError("Strength by block is for models with a UNet; this one is a transformer.")

    def draw(
        self, order: Order, who: Who = NOBODY, with_base: bool = True, again: bool = False
    ) -> Iterator[Progress | Waiting]:
        """The pictures with the adapters, then those of the base model from the same noise.

        Args:
            order: what to draw.
            who: waits for the model.
            with_base: draw the base model's, too, where there are adapters.
            again: it goes on with what was begun, and is not refused for want of a place.
        """
        self.check(order)
        parts = [("adapted", order.strength), ("base", 0.0)] if order.adapters else [("base", 1.0)]
        if not with_base:
            parts = parts[:1]

        def work(watcher: Watcher) -> None:
            with self._held(watcher, order, who, again), self.adapters_in_place(order):
                for index, (part, strength) in enumerate(parts):
                    self._draw_part(watcher, order, part, strength, index, len(parts))

        return in_background(work)

    def watch(self, order: Order, who: Who = NOBODY) -> Iterator[Progress | Waiting]:
        """The first picture, and at last with it the maps of where the adapters acted in each of its steps."""
        self.check(order)
        if not order.adapters:
            raise ValueError("Choose an adapter first.")
        if self.is_transformer:
            raise ValueError("Maps are for models with a UNet; this one is a transformer.")

        def work(watcher: Watcher) -> None:
            with (
                self._held(watcher, order, who),
                self.adapters_in_place(order),
                recorded_gates(self.pipe.unet) as record,
            ):
                pictures = self._draw_part(watcher, order, "adapted", order.strength, 0, 1)
            maps = step_maps(record, (order.height // self.stride, order.width // self.stride))
            watcher.emit(Progress("adapted", order.steps, order.steps, pictures, done=True, maps=maps))

        return in_background(work)

    def try_adapter(self, adapter: Adapter, who: Who = NOBODY) -> None:
        """Attaches an adapter and takes it off again; `ValueError` where it does not fit the model."""
        with self.turns.turn(who, 1.0), self.adapters_in_place(Order("a picture", adapters=((adapter, 1.0),))):
            pass

    def _held(
        self, watcher: Watcher, order: Order, who: Who, again: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        return self.turns.turn(who, order.cost, lambda ahead, seconds: watcher.emit(Waiting(ahead, seconds)), again)

    @contextlib.contextmanager
    def adapters_in_place(self, order: Order) -> Iterator[None]:
        """The order's adapters, on the pipeline only as long as this drawing. Call it within a turn."""
        names = [f"slot{index}" for index in range(len(order.adapters))]
        files = [adapter.load() for adapter, _ in order.adapters]
        check_apart([file.new_words for file in files])
        try:
            for name, file in zip(names, files, strict=True):
                self.pipe.load_apt_weights(file, adapter_name=name)
            if names:
                self.pipe.set_apt_adapters(names, [order.weight(weight) for _, weight in order.adapters])
            yield
        finally:
            self.pipe.unload_apt_weights()

    def _pipeline_for(self, order: Order) -> Any:
        """A pipeline of the same modules, with the order's sampler, for its task."""
        components = self.pipe.components | {"scheduler": make_sampler(self.pipe.scheduler, order.sampler)}
        pipeline = getattr(pipelines, pipeline_name(type(self.pipe).__name__, order))
        unsafe = {"requires_safety_checker": False} if "safety_checker" in components else {}
        made = pipeline(**components, **unsafe)
        made.set_progress_bar_config(disable=True)
        return made

    def _draw_part(
        self, watcher: Watcher, order: Order, part: str, strength: float, index: int, parts: int
    ) -> tuple[Image.Image, ...]:
        pipe = self._pipeline_for(order)
        steps = parts * order.steps_drawn
        done = index * order.steps_drawn
        every = max(1, math.ceil(order.steps_drawn / PREVIEWS))

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
            preview = () if step % every else self._preview(tensors["latents"])
            watcher.emit(Progress(part, min(done + step + 1, steps), steps, preview))
            return {}

        images = pipe(
            **call_settings(order),
            **_start(order),
            generator=[torch.Generator().manual_seed(seed) for seed in order.seeds],
            apt_scale=strength,
            callback_on_step_end=after_step,
        ).images
        pictures = tuple(images)
        watcher.emit(Progress(part, done + order.steps_drawn, steps, pictures, done=True))
        return pictures

    @torch.no_grad()
    def _preview(self, latents: torch.Tensor) -> tuple[Image.Image, ...]:
        """What the unfinished latents look like."""
        vae = self.pipe.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        decoded = vae.decode(latents, return_dict=False)[0]
        return tuple(self.pipe.image_processor.postprocess(decoded.float(), output_type="pil"))


def load_pipeline(model: str, dtype: torch.dtype) -> Any:
    """The model's own pipeline, with adapters: Stable Diffusion, or one whose denoiser is a transformer.

    Raises:
        OSError: where it cannot be found.
        ValueError: for a pipeline that does not draw from a prompt alone.
    """
    from diffusers import DiffusionPipeline

    place = resolve_model(model)
    name = DiffusionPipeline.load_config(place)["_class_name"]
    name = name if "APT" in name else name.removesuffix("Pipeline") + "APTPipeline"
    return getattr(pipelines, name).from_pretrained(place, dtype=dtype)


def _start(order: Order) -> dict[str, Image.Image]:
    """The picture to start from, cut to the order's size, and its mask."""
    if order.picture is None:
        return {}
    size = (order.width, order.height)
    start = {"image": ImageOps.fit(order.picture, size)}
    if order.mask is not None:
        start["mask_image"] = ImageOps.fit(order.mask.convert("L"), size, Image.Resampling.NEAREST)
    return start
