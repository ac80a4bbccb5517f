"""The forms of OpenAI's images API, with our fields beside theirs, and the requests to the engine that they mean."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..serving.requests import MAX_ADAPTERS, MAX_PROMPT, ImageRequest
from .refusals import Refusal
from .settings import ServerSettings

BASE = "base"
MAX_SEED = 2**32 - 1
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


class GenerationForm(BaseModel):
    """Body of `POST /v1/images/generations`. Fields after `user` are this server's own: OpenAI's client sends them in
    `extra_body`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field(max_length=MAX_PROMPT, description="What to draw.")
    model: str = Field(
        BASE,
        max_length=1000,
        description="`base`, the name of an adapter, or a mix: `dog:0.8+ink:0.5`.",
    )
    n: int = Field(1, ge=1, description="Pictures; picture number i has the seed `seed + i`.")
    size: str = Field("auto", description="`512x512`, or `auto` for the model's own.")
    response_format: Literal["b64_json"] = Field("b64_json", description="Pictures are in the answer itself.")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(90, ge=0, le=100, description="Quality of JPEG and WebP.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(0, ge=0, le=3, description="Unfinished pictures in a stream.")
    user: str | None = Field(None, max_length=200, description="For the server's log.")

    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="The same seed draws the same picture.")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    scheduler: str | None = Field(None, max_length=40, description="Such as `Euler` or `DPM++ 2M`.")
    apt_scale: float = Field(1.0, ge=-100, le=100, description="Strength of the adapters: a factor on their weights.")
    timeout_s: float | None = Field(None, gt=0, description="Seconds after which the picture is of no use any more.")

    @field_validator("size")
    @classmethod
    def _is_size(cls, size: str) -> str:
        if size != "auto" and not _SIZE.fullmatch(size):
            raise ValueError("a size is written as `512x512`, or `auto`")
        return size

    def width_and_height(self) -> tuple[int | None, int | None]:
        """In pixels; `None` for the model's own."""
        match = _SIZE.fullmatch(self.size)
        return (int(match[1]), int(match[2])) if match else (None, None)


class EditForm(GenerationForm):
    """The fields of `POST /v1/images/edits`, beside the file `image`."""

    strength: float = Field(0.8, gt=0, le=1, description="How far to leave the picture that is given.")


def parse_model(text: str, known: Sequence[str]) -> dict[str, float]:
    """Adapters and weights of a form's `model`; `Refusal` for a name that there is not.

    Args:
        text: `base`, `dog`, or `dog:0.8+ink:0.5`.
        known: names of adapters.
    """
    if text == BASE:
        return {}
    if text in known:
        return {text: 1.0}
    adapters: dict[str, float] = {}
    for part in text.split("+"):
        name, colon, weight = part.rpartition(":")
        name = name if colon else part
        try:
            number = float(weight) if colon else 1.0
        except ValueError:
            number = float("nan")
        if name not in known:
            raise Refusal(404, f"There is no model {name[:100]!r}: see GET /v1/models.", "model_not_found", "model")
        if not abs(number) <= 100:
            raise Refusal(400, f"The weight in {part[:100]!r} must be a number from -100 to 100.", param="model")
        if name in adapters:
            raise Refusal(400, f"{name[:100]!r} stands twice in the model: give it one weight.", param="model")
        adapters[name] = number
    if len(adapters) > MAX_ADAPTERS:
        raise Refusal(400, f"A mix may have {MAX_ADAPTERS} adapters, this one has {len(adapters)}.", param="model")
    return adapters


def requests_of(
    form: GenerationForm,
    adapters: Mapping[str, float],
    settings: ServerSettings,
    seed: int,
    image: Image.Image | None = None,
) -> list[ImageRequest]:
    """One request per picture; `Refusal` for what this server does not draw."""
    if form.n > settings.max_images:
        raise Refusal(400, f"n may be {settings.max_images} here, got {form.n}.", param="n")
    if form.stream and form.n > 1:
        raise Refusal(400, "A stream shows one picture: n must be 1.", param="n")
    steps = form.num_inference_steps or settings.num_inference_steps
    if steps is not None and steps > settings.max_steps:
        raise Refusal(
            400, f"num_inference_steps may be {settings.max_steps} here, got {steps}.", param="num_inference_steps"
        )
    width, height = form.width_and_height()
    shared: dict[str, Any] = {
        "prompt": form.prompt,
        "negative_prompt": form.negative_prompt,
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": settings.guidance_scale if form.guidance_scale is None else form.guidance_scale,
        "scheduler": form.scheduler,
        "adapters": dict(adapters),
        "apt_scale": form.apt_scale,
        "image": image,
        "num_previews": form.partial_images if form.stream else 0,
        "deadline_s": min(form.timeout_s or settings.timeout_s, settings.timeout_s),
    }
    if isinstance(form, EditForm):
        shared["strength"] = form.strength
    try:
        return [ImageRequest(**shared, seed=(seed + index) % (MAX_SEED + 1)) for index in range(form.n)]
    except ValueError as error:
        raise Refusal(400, str(error)) from error
