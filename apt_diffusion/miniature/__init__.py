"""The embedded models and the drawn world that they were trained on."""

from pathlib import Path


def resolve_model(name_or_path: str) -> str:
    """`"miniature"` becomes the folder of the embedded Stable Diffusion; anything else comes back unchanged."""
    return str(Path(__file__).parent / "stable_diffusion") if name_or_path == "miniature" else name_or_path
