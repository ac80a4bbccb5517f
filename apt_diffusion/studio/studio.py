"""All that the pages share: one model, one library of adapters, one set of training jobs, everybody's pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..io.files import read_adapter_file
from .class_pictures import draw_class_pictures
from .drawings import Drawings
from .generation import Painter, Waiting
from .library import Adapter, Library
from .limits import Limits
from .order import MAX_ADAPTERS, Order, take_tags
from .presets import Presets
from .recipe import Settings, settings_in_text, settings_of
from .training import CLASS_PICTURES, Trainings
from .turns import Turns, Who
from .understanding import EMBEDDED, Reader
from .uploads import shown

MAX_ADAPTER_BYTES = 64 * 2**20


class Studio:
    """See the module.

    Args:
        model: the name of an embedded one, a folder or a hub id.
        adapters: the folder of adapters, where visitors' work is kept, too.
        script: the trainer, `train_apt_sd.py`.
        limits: for visitors.
    """

    def __init__(self, model: str, adapters: str | Path, script: Path, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self.library = Library(adapters, model)
        self.drawings = Drawings(self.library)
        self.presets = Presets(self.library)
        self.turns = Turns(limits.queue, limits.queue_per_visitor, limits.queue_per_address)
        self.painter = Painter(model, self.turns)
        self.reader = Reader(self.turns)
        sampling = {
            "num_inference_steps": self.painter.default_steps,
            "guidance_scale": self.painter.default_guidance,
        }
        self.trainings = Trainings(
            script, model, self.library, sampling, limits.train_steps,
            self.library.folder / ".class-pictures" if self.painter.embedded else None,
            limits.trainings, limits.trainings_per_address,
        )  # fmt: skip

    @property
    def model_name(self) -> str:
        """The base model as visitors read it: without the path of a local folder."""
        name = self.painter.model
        if self.painter.embedded:
            return self.painter.embedded.title
        return Path(name).name if Path(name).is_dir() else name

    def order(self, visitor: str, keys: list[str], weights: list[float], **settings: Any) -> Order:
        """An order of this visitor, who sees the adapters that it and its prompt name; `ValueError` for any other."""
        if len(keys) > MAX_ADAPTERS:
            raise ValueError(f"At most {MAX_ADAPTERS} adapters can be mixed.")
        chosen = [(self.library.get(visitor, key), weight) for key, weight in zip(keys, weights, strict=False)]
        prompt, named = take_tags(settings.pop("prompt", ""), lambda name: self.library.by_name(visitor, name))
        by_name = {adapter.key: (adapter, weight) for adapter, weight in [*chosen, *named]}
        return Order(adapters=tuple(by_name.values()), prompt=prompt, **settings)

    def settings_of(self, order: Order) -> Settings:
        """The settings that are stored in the pictures of an order."""
        return settings_of(order, self.model_name)

    @staticmethod
    def settings_in_text(said: str) -> Settings:
        """Settings that a page has read from a picture; `ValueError` where they make no sense."""
        return settings_in_text(said)

    def check_trainable(self) -> None:
        """`ValueError` for a model of a family that the trainer does not adapt."""
        from ..training.text_to_image.bases import open_base  # seconds, and of use only to those who train

        open_base(self.painter.model)

    def draw_class_pictures(self, who: Who) -> Iterator[int | Waiting]:
        """What the trainings of an embedded model share; nothing for other models, whose trainer draws its own."""
        if self.trainings.class_pictures is not None:
            yield from draw_class_pictures(self.painter, self.trainings.class_pictures, CLASS_PICTURES, who)

    def add_adapter(self, visitor: str, file: Path, who: Who) -> Adapter:
        """Keeps an uploaded adapter file, once the model that it is for has taken it.

        Raises:
            ValueError: for a file that is too large, no adapter, or for another model. Nothing is kept then.
        """
        name = shown(file.name)
        if file.suffix != ".safetensors":
            raise ValueError(f"{name} is no .safetensors file: other formats are never loaded.")
        if file.stat().st_size > MAX_ADAPTER_BYTES:
            raise ValueError(f"{name} is too large: an adapter may have {MAX_ADAPTER_BYTES // 2**20} MB here.")
        self.library.check_room(visitor)
        try:
            tensors = read_adapter_file(file, with_words=True)
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), name)) from error
        kind = self.library.kind_of(tensors)
        base = tensors.metadata.get("base_model", "")
        if kind != "stable_diffusion" and base not in EMBEDDED:
            raise ValueError(
                f"{name} is for the model “{base[:60]}”; besides drawing, only embedded models are taken."
            )
        added = self.library.add(visitor, file.stem, tensors)
        try:
            if kind == "stable_diffusion":
                self.painter.try_adapter(added, who)
            else:
                self.reader.try_adapter(added, who)
        except BaseException:
            self.library.delete(visitor, added.key)
            raise
        return added
