"""The embedded model `miniature` and the drawn world that it was trained on; see docs/miniature.md."""

from pathlib import Path

STABLE_DIFFUSION = Path(__file__).parent / "stable_diffusion"


def resolve_model(name_or_path: str) -> str:
    """`"miniature"` becomes the folder of the embedded Stable Diffusion; anything else comes back unchanged."""
    return str(STABLE_DIFFUSION) if name_or_path == "miniature" else name_or_path
