"""The embedded models and the drawn world that most of them know; see docs/miniature.md and docs/emoji.md."""

from pathlib import Path

FOLDER = Path(__file__).parent
STABLE_DIFFUSION = FOLDER / "stable_diffusion"
STABLE_DIFFUSION_3 = FOLDER / "stable_diffusion_3"
MODELS = {
    "miniature": STABLE_DIFFUSION,
    "miniature-sd3": STABLE_DIFFUSION_3,
    "miniature-emoji": FOLDER / "emoji" / "stable_diffusion",
    "miniature-clip": FOLDER / "clip",
    "miniature-vilt": FOLDER / "vilt",
    "miniature-meter": FOLDER / "meter",
}
# Those that draw: with 15 steps and a guidance of 3.
TEXT_TO_IMAGE = ("miniature", "miniature-sd3", "miniature-emoji")


def resolve_model(name_or_path: str) -> str:
    """The name of an embedded model (see `MODELS`) becomes its folder; anything else comes back unchanged."""
    return str(MODELS.get(name_or_path, name_or_path))
