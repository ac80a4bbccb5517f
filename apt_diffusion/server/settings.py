"""What the owner of a server decides."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """Plain values only, so that a file for a cluster can hold them.

    Args:
        model: an embedded model's name, a folder, a hub id, or one file of a base.
        base_config: hub id or folder with the configuration of a base in one file.
        adapters: the folder of adapters.
        keys: file of API keys (`keys.py`); without one, everybody who reaches the port may do everything.
        device, dtype: of the model; `None`: cuda in half precision where there is one, else the CPU.
        max_batch_size, max_queue, max_device_bytes, max_pixels: of the engine; see `serving.engine.Engine`.
        num_inference_steps, guidance_scale: where a request names none. `None`: the model's own.
        max_images: of one request.
        max_steps: denoising steps of one picture.
        timeout_s: seconds that a request may take in all; one may ask for less.
        max_picture_bytes: of a picture to start from, as a file.
        max_adapter_bytes: of an adapter that is uploaded.
        log_prompts: whether the log has prompts.
        embed_settings: whether pictures carry their prompts and settings.
        c2pa_certificate, c2pa_key, c2pa_algorithm: sign pictures; see `signing.py`.
    """

    model: str = "miniature-emoji"
    base_config: str | None = None
    adapters: str = "adapters"
    keys: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_batch_size: int = 8
    max_queue: int = 64
    max_device_bytes: int = 2**30
    max_pixels: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    max_images: int = 8
    max_steps: int = 100
    timeout_s: float = 300.0
    max_picture_bytes: int = 20 * 2**20
    max_adapter_bytes: int = 128 * 2**20
    log_prompts: bool = False
    embed_settings: bool = True
    c2pa_certificate: str | None = None
    c2pa_key: str | None = None
    c2pa_algorithm: str = "es256"
