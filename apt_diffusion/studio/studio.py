"""All that the pages share: one model, one library of adapters, one set of training jobs."""

from pathlib import Path
from typing import Any

from ..io.atomic import new_folder
from ..miniature.personalise import class_captions, save_class_pictures
from .generation import MAX_ADAPTERS, Order, Painter
from .library import Library
from .training import CLASS_PICTURES, Trainings
from .understanding import Reader


class Studio:
    """See the module.

    Args:
        model: the name of an embedded one, a folder or a hub id.
        adapters: the folder of adapters, where visitors' work is kept, too.
        script: the trainer, `train_apt_sd.py`.
        max_train_steps: what a visitor may ask for.
    """

    def __init__(self, model: str, adapters: str | Path, script: Path, max_train_steps: int = 2000) -> None:
        self.library = Library(adapters, model)
        self.painter = Painter(model)
        self.reader = Reader()
        # Its words are few: pictures of many captions keep it from forgetting, not those of one class prompt.
        own_class = self._class_pictures if self.painter.embedded else None
        sampling = {
            "num_inference_steps": self.painter.default_steps,
            "guidance_scale": self.painter.default_guidance,
        }
        self.trainings = Trainings(script, model, self.library, sampling, max_train_steps, own_class)

    def order(self, visitor: str, keys: list[str], weights: list[float], **settings: Any) -> Order:
        """An order of this visitor, who sees the adapters that it names; `ValueError` for any other."""
        if len(keys) > MAX_ADAPTERS:
            raise ValueError(f"At most {MAX_ADAPTERS} adapters can be mixed.")
        adapters = tuple((self.library.get(visitor, key), weight) for key, weight in zip(keys, weights, strict=False))
        return Order(adapters=adapters, **settings)

    def _class_pictures(self) -> Path:
        folder = self.library.folder / ".class-pictures"
        with self.painter.lock:
            if not folder.is_dir():
                captions = class_captions(self.painter.model, CLASS_PICTURES)
                with new_folder(folder) as unfinished:
                    save_class_pictures(self.painter.pipe, unfinished, captions)
        return folder
