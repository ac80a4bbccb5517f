"""Files that the pages hand to Gradio: copies behind names that nobody can guess, and examples."""

from pathlib import Path

from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder


def copy_of(file: Path, name: str) -> str:
    """A copy of a file among the uploads, under another name. It is deleted when it is old."""
    return save_bytes_to_cache(file.read_bytes(), name, get_upload_folder())


def examples_folder() -> Path:
    """Beside Gradio's own folder, in which what is old is deleted."""
    return Path(get_upload_folder()).with_name("apt-examples")
