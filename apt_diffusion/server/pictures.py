"""Pictures as they come and go: files of strangers on the way in, marked files on the way out."""

import base64
import io

from PIL import Image, ImageOps

from ..data.reading import check_size
from ..provenance import encoded
from ..serving.requests import ImageRequest
from .forms import GenerationForm
from .refusals import Refusal
from .signing import PictureSigner

MAX_PIXELS = 2**25
_FORMATS = ("PNG", "JPEG", "WEBP")


def read_picture(data: bytes) -> Image.Image:
    """A picture to start from, as RGB, upright; its size is checked before it is decoded.

    Raises:
        Refusal: for what is no picture, or has too many pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            check_size(*image.size, MAX_PIXELS)
            return ImageOps.exif_transpose(image).convert("RGB")
    except (ValueError, Image.DecompressionBombError) as error:
        raise Refusal(400, f"The picture cannot be used: {error}", "invalid_image", "image") from error
    except Exception as error:  # Pillow's parsers raise anything from OSError to struct.error
        raise Refusal(
            400, "The file is no picture that can be read here: send a PNG, JPEG or WebP.", "invalid_image", "image"
        ) from error


def as_base64(
    picture: Image.Image, form: GenerationForm, request: ImageRequest | None, signer: PictureSigner | None = None
) -> str:
    """The picture as a file in base64, with the settings of `request` in it if that is given, and signed."""
    texts = None if request is None else {"parameters": _settings_text(form, request)}
    data = encoded(picture, form.output_format, texts, form.output_compression)
    return base64.b64encode(data if signer is None else signer.signed(data, form.output_format)).decode()


def _settings_text(form: GenerationForm, request: ImageRequest) -> str:
    """In the form that other tools write and read."""
    facts = {
        "Steps": request.num_inference_steps,
        "Sampler": request.scheduler,
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
        "APT": form.model,
        "APT scale": request.apt_scale,
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)])
