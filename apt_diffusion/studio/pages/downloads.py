"""Files that the pages hand to Gradio: copies for download, behind names that nobody can guess, and examples."""

from pathlib import Path

from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from ..library import Adapter, download_name


def offer(adapter: Adapter) -> str:
    """A copy of the adapter's file under its own name. Gradio deletes it when it is old."""
    return save_bytes_to_cache(adapter.file.read_bytes(), download_name(adapter.name), get_upload_folder())


def examples_folder() -> Path:
    """Beside Gradio's own folder, in which it deletes what is old."""
    return Path(get_upload_folder()).with_name("apt-examples")
