"""Drawing: one pipeline for everybody, one drawing at a time, watched step by step."""

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..pipelines import StableDiffusionAPTPipeline
from .background import Watcher, in_background
from .embedded import EMBEDDED, Embedded
from .gates import recorded_gates, step_maps
from .library import Adapter, download_name, slug

MAX_STEPS = 100
MAX_IMAGES = 8
MAX_ADAPTERS = 4
MAX_SEED = 2**32 - 1
MAX_PROMPT = 1000  # characters
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
PREVIEWS = 12  # at most so many per picture: each costs a decoding


@dataclass(frozen=True)
class Order:
    """What to draw. Checked when it is made: every field may come from anybody.

    Raises:
        ValueError: with a sentence for the page.
    """

    prompt: str
    negative_prompt: str = ""
    adapters: tuple[tuple[Adapter, float], ...] = field(default=())
    steps: int = 25
    guidance: float = 7.5
    width: int = 512
    height: int = 512
    seed: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("Write a prompt first: what should the picture show?")
        if len(self.prompt) > MAX_PROMPT or len(self.negative_prompt) > MAX_PROMPT:
            raise ValueError(f"A prompt may have {MAX_PROMPT} characters.")
        if len(self.adapters) > MAX_ADAPTERS:
            raise ValueError(f"At most {MAX_ADAPTERS} adapters can be mixed.")
        for name, value, low, high in (
            ("number of steps", self.steps, 1, MAX_STEPS),
            ("number of pictures", self.count, 1, MAX_IMAGES),
            ("seed", self.seed, 0, MAX_SEED),
            ("guidance", self.guidance, 0, 30),
            *((f"weight of {adapter.name}", weight, -2, 2) for adapter, weight in self.adapters),
        ):
            if not low <= value <= high:
                raise ValueError(f"The {name} must be from {low} to {high}, not {value}.")

    @property
    def seeds(self) -> list[int]:
        """One per picture, so that each can be drawn again."""
        return [(self.seed + index) % (MAX_SEED + 1) for index in range(self.count)]


@dataclass(frozen=True)
class Progress:
    """How far a drawing is. `pictures` are previews until `done`, and keep their place: `adapted` or `base`."""

    part: str  # "adapted", "base" or "strength"
    step: int  # of all parts together
    steps: int
    pictures: tuple[Image.Image, ...] = ()
    strength: float = 1.0
    done: bool = False  # this part
    maps: torch.Tensor | None = None  # where the adapters acted, (steps, h, w) in [0, 1]


class Painter:
    """The Stable Diffusion that everybody draws with.

    Args:
        model: the name of an embedded one, a folder or a hub id.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.float16 if self.device == "cuda" else torch.float32
        self.pipe = StableDiffusionAPTPipeline.from_pretrained(model, dtype=self.dtype).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.stride = self.pipe.vae_scale_factor  # pixels per latent cell
        self.size = self.pipe.unet.config.sample_size * self.stride
        self.lock = threading.Lock()

    @property
    def embedded(self) -> Embedded | None:
        """What is known of an embedded model; `None` for any other."""
        return EMBEDDED.get(self.model)

    @property
    def default_steps(self) -> int:
        """Denoising steps that suit the model."""
        return self.embedded.steps if self.embedded else 25

    @property
    def default_guidance(self) -> float:
        """The guidance scale that suits the model."""
        return self.embedded.guidance_scale if self.embedded else 7.5

    def check_size(self, order: Order) -> None:
        """`ValueError` for a width or height that the model cannot draw."""
        for name, value in (("width", order.width), ("height", order.height)):
            if value % 8 or not 8 <= value <= 2 * self.size:
                raise ValueError(f"The {name} must be a multiple of 8, at most {2 * self.size}; {value} is not.")

    def draw(self, order: Order) -> Iterator[Progress]:
        """The pictures with the adapters, then those of the base model from the same noise."""
        self.check_size(order)
        parts = [("adapted", 1.0), ("base", 0.0)] if order.adapters else [("base", 1.0)]

        def work(watcher: Watcher) -> None:
            with self.lock, self.adapters_in_place(order):
                for index, (part, strength) in enumerate(parts):
                    self._draw_part(watcher, order, part, strength, index, len(parts))

        return in_background(work)

    def sweep(self, order: Order) -> Iterator[Progress]:
        """One picture per strength, from the same noise: the weights of all adapters times 0 to 1.2."""
        self.check_size(order)
        if not order.adapters:
            raise ValueError("Choose an adapter first: the sweep draws it from strength 0 to 1.2.")

        def work(watcher: Watcher) -> None:
            with self.lock, self.adapters_in_place(order):
                for index, strength in enumerate(STRENGTHS):
                    self._draw_part(watcher, order, "strength", strength, index, len(STRENGTHS))

        return in_background(work)

    def watch(self, order: Order) -> Iterator[Progress]:
        """The first picture, and at last with it the maps of where the adapters acted in each of its steps."""
        self.check_size(order)
        if not order.adapters:
            raise ValueError("Choose an adapter first.")

        def work(watcher: Watcher) -> None:
            with self.lock, self.adapters_in_place(order), recorded_gates(self.pipe.unet) as record:
                picture = self._draw_part(watcher, order, "strength", 1.0, 0, 1)
            maps = step_maps(record, (order.height // self.stride, order.width // self.stride))
            watcher.emit(Progress("strength", order.steps, order.steps, picture, done=True, maps=maps))

        return in_background(work)

    @contextlib.contextmanager
    def adapters_in_place(self, order: Order) -> Iterator[None]:
        """The order's adapters, on the pipeline only as long as this drawing. Call it with the lock held."""
        names = [f"slot{index}" for index in range(len(order.adapters))]
        try:
            for name, (adapter, _) in zip(names, order.adapters, strict=True):
                self.pipe.load_apt_weights(adapter.load(), adapter_name=name)
            if names:
                self.pipe.set_apt_adapters(names, [weight for _, weight in order.adapters])
            yield
        finally:
            self.pipe.unload_apt_weights()

    def _draw_part(
        self, watcher: Watcher, order: Order, part: str, strength: float, index: int, parts: int
    ) -> tuple[Image.Image, ...]:
        steps = parts * order.steps
        done = index * order.steps
        every = max(1, math.ceil(order.steps / PREVIEWS))

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
            preview = () if part == "strength" or step % every else self._preview(tensors["latents"])
            watcher.emit(Progress(part, done + step + 1, steps, preview, strength))
            return {}

        images = self.pipe(
            **call_settings(order, sweep=part == "strength"),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds(order, part == "strength")],
            apt_scale=strength,
            callback_on_step_end=after_step,
        ).images
        pictures = tuple(images)
        watcher.emit(Progress(part, done + order.steps, steps, pictures, strength, done=True))
        return pictures

    @torch.no_grad()
    def _preview(self, latents: torch.Tensor) -> tuple[Image.Image, ...]:
        """What the unfinished latents look like."""
        vae = self.pipe.vae
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return tuple(self.pipe.image_processor.postprocess(decoded.float(), output_type="pil"))


def seeds(order: Order, sweep: bool) -> list[int]:
    """The seed of each picture; a sweep over strengths draws the first one only."""
    return order.seeds[:1] if sweep else order.seeds


def call_settings(order: Order, sweep: bool = False) -> dict[str, Any]:
    """The pipeline's arguments, as the page and `python_code` use them."""
    return {
        "prompt": order.prompt,
        "negative_prompt": order.negative_prompt or None,
        "num_inference_steps": order.steps,
        "guidance_scale": order.guidance,
        "width": order.width,
        "height": order.height,
        "num_images_per_prompt": 1 if sweep else order.count,
    }


def python_code(painter: Painter, order: Order, sweep: bool = False) -> str:
    """Python that draws the same pictures, pixel by pixel, where the adapters' files lie in the current folder."""
    place = "" if painter.device == "cpu" else f", dtype={painter.dtype}).to({painter.device!r}"
    lines = [
        "import torch",
        "from apt_diffusion import StableDiffusionAPTPipeline",
        "",
        f"pipe = StableDiffusionAPTPipeline.from_pretrained({painter.model!r}{place})",
    ]
    names = [f"{slug(adapter.name)}-{index}" for index, (adapter, _) in enumerate(order.adapters, start=1)]
    for name, (adapter, _) in zip(names, order.adapters, strict=True):
        lines.append(
            f"pipe.load_apt_weights({download_name(adapter.name)!r}, adapter_name={name!r})  # download it first"
        )
    if order.adapters:
        lines.append(f"pipe.set_apt_adapters({names!r}, {[weight for _, weight in order.adapters]!r})")
    lines += ["", f"seeds = {seeds(order, sweep)}"]
    call = [f"{key}={value!r}," for key, value in call_settings(order, sweep).items() if value is not None]
    call.append("generator=[torch.Generator().manual_seed(seed) for seed in seeds],")
    if sweep:
        lines += [f"for strength in {STRENGTHS}:", "    image = pipe("]
        lines += [f"        {line}" for line in [*call, "apt_scale=strength,"]]
        lines += ["    ).images[0]", '    image.save(f"strength-{strength}.png")']
    else:
        lines += ["images = pipe(", *(f"    {line}" for line in call), ").images"]
        lines += ["for seed, image in zip(seeds, images):", '    image.save(f"seed-{seed}.png")']
    return "\n".join(lines) + "\n"
