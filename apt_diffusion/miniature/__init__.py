"""The embedded models and the drawn world that they were trained on; see docs/miniature.md."""

from pathlib import Path

FOLDER = Path(__file__).parent
STABLE_DIFFUSION = FOLDER / "stable_diffusion"
MODELS = {
    "miniature": STABLE_DIFFUSION,
    "miniature-clip": FOLDER / "clip",
    "miniature-vilt": FOLDER / "vilt",
    "miniature-meter": FOLDER / "meter",
}


def resolve_model(name_or_path: str) -> str:
    """The name of an embedded model (see `MODELS`) becomes its folder; anything else comes back unchanged."""
    return str(MODELS.get(name_or_path, name_or_path))
