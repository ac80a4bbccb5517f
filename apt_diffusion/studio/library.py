"""The adapters that a visitor sees: the published ones, which everybody sees, and the visitor's own.

    examples/name/...                                  of this package: so that there is something to try at first
    DIR/name/pytorch_apt_weights.safetensors           published: a trainer's output folder
    DIR/name.safetensors                               published: a file
    DIR/.visitors/<visitor>/adapters/<name>/...        one visitor's own
    DIR/.visitors/<visitor>/trainings/<name>/...       pictures and log of its training, see `training`

Keys (`example/name`, `public/name`, `own/name`) come from the browser: they are looked up in what the visitor sees,
and never joined to a path.
"""

import dataclasses
import re
import shutil
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..io.atomic import new_folder, remove_folder
from ..io.files import WEIGHTS_NAME, AdapterFile, write_safetensors
from ..serving.store import AdapterStore
from .sharing import known_paths, public_metadata, without_paths

VISITORS = ".visitors"
GONE = "This adapter is not there any more: choose another one."
EXAMPLES = Path(__file__).parent / "examples"
OWNER = ".owner"  # beside a published adapter: who may take it back
MAX_OWN = 20  # adapters of one visitor
MAX_CARD = 20_000  # characters
MAX_SAMPLES = 12
_SLUG = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Adapter:
    """One adapter on disk."""

    key: str
    name: str  # also the file's name when it is downloaded
    file: Path
    kind: str  # the model it is for: "stable_diffusion", "vilt", "meter" or "clip"
    metadata: dict[str, str]
    store: AdapterStore = field(repr=False, compare=False)

    def load(self) -> AdapterFile:
        """Its tensors, for `load_apt_weights`; published ones that are in use stay in memory.

        Raises:
            ValueError: for a file that is damaged or gone. Here and in the errors of `load_apt_weights` it has the
                adapter's name: local paths are never shown.
        """
        if not self.file.is_file():
            raise ValueError(GONE)
        try:
            return dataclasses.replace(self.store.get(self.name), name=self.name)
        except ValueError as error:
            raise ValueError(str(error).replace(str(self.file), self.name)) from error

    @property
    def has_card(self) -> bool:
        """Whether a trainer has left a card beside it."""
        return self.file.name == WEIGHTS_NAME and (self.file.parent / "README.md").is_file()

    @property
    def is_own(self) -> bool:
        """Whether it is the visitor's own, and not published."""
        return self.key.startswith("own/")

    @property
    def label(self) -> str:
        """Its name, and whose it is."""
        kind = {"own": " (yours)", "example": " (example)", "public": ""}
        return self.name + kind[self.key.split("/")[0]]

    @property
    def prompt(self) -> str:
        """The prompt that asks for what it has learnt, where that is known."""
        return self.metadata.get("instance_prompt", "")

    @property
    def card(self) -> str:
        """Its model card as Markdown, without front matter; a line where it has none."""
        file = self.file.parent / "README.md"
        if self.file.name != WEIGHTS_NAME or not file.is_file():
            base = Path(self.metadata.get("base_model", "not known")).name
            return f"{self.name} has no model card. Base model: {base}."
        text = file.read_text(encoding="utf-8", errors="replace")[:MAX_CARD]
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).strip()
        return without_paths(text, known_paths(self.metadata, self.name))

    @property
    def samples(self) -> list[Path]:
        """Pictures that it has drawn, the newest first."""
        folder = self.file.parent / "samples"
        if self.file.name != WEIGHTS_NAME or not folder.is_dir() or folder.is_symlink():
            return []
        # A hidden one is being written by a training.
        return sorted((file for file in folder.glob("[!.]*.png") if not file.is_symlink()), reverse=True)[:MAX_SAMPLES]

    def published_by(self, visitor: str) -> bool:
        """Whether this visitor has published it."""
        owner = self.file.parent / OWNER
        return self.key.startswith("public/") and owner.is_file() and owner.read_text().strip() == visitor

    def as_download(self) -> bytes:
        """The file without what it says of this computer.

        Raises:
            ValueError: as `load`.
        """
        from safetensors.torch import save

        whole = self.load()
        return save(whole.all_tensors, metadata=public_metadata(whole.metadata, self.name))


def download_name(name: str) -> str:
    """The file's name on the visitor's computer."""
    return f"{name}.safetensors"


class Library:
    """The adapters of a folder and of its visitors.

    Args:
        folder: created if it is not there.
        base_model: of Stable Diffusion: the example for the embedded one is shown where it fits.
    """

    def __init__(self, folder: str | Path, base_model: str = "") -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.public = AdapterStore(self.folder)
        self.examples = [
            adapter
            for adapter in _adapters_in(AdapterStore(EXAMPLES), "example")
            if adapter.kind != "stable_diffusion" or adapter.metadata["base_model"] == base_model
        ]

    def visitor_folder(self, visitor: str) -> Path:
        """All that one visitor has; `ValueError` for what is no visitor."""
        if not re.fullmatch(r"[0-9a-f]{32}", visitor):
            raise ValueError("This is no visitor of the studio.")
        return self.folder / VISITORS / visitor

    def own_folder(self, visitor: str) -> Path:
        """A visitor's own adapters."""
        return self.visitor_folder(visitor) / "adapters"

    def visible(self, visitor: str, kind: str = "stable_diffusion") -> list[Adapter]:
        """The visitor's own adapters, then the published ones; those that cannot be read are left out."""
        return [adapter for adapter in self._seen_by(visitor) if adapter.kind == kind]

    def _seen_by(self, visitor: str) -> list[Adapter]:
        folder = self.own_folder(visitor)
        # Whose adapters are read for each use: there may be many visitors.
        own = _adapters_in(AdapterStore(folder, max_bytes=0), "own") if folder.is_dir() else []
        return [*own, *_adapters_in(self.public, "public"), *self.examples]

    def get(self, visitor: str, key: str, kind: str = "stable_diffusion") -> Adapter:
        """`ValueError` for a key that this visitor does not see."""
        for adapter in self.visible(visitor, kind):
            if adapter.key == key:
                return adapter
        raise ValueError(GONE)

    def new_name(self, visitor: str, wanted: str) -> str:
        """A free name for an own adapter, like the one wanted."""
        folder = self.own_folder(visitor)
        return _free(slug(wanted), lambda name: (folder / name).exists())

    def publish(self, visitor: str, key: str) -> Adapter:
        """Copies an own adapter, with its card and samples, to where everybody sees it."""
        own = self._own(visitor, key, "is published already.")
        taken = {adapter.name for adapter in _adapters_in(self.public, "public")}
        name = _free(own.name, lambda name: name in taken or (self.folder / name).exists())
        with new_folder(self.folder / name) as unfinished:  # nobody sees half an adapter
            (unfinished / WEIGHTS_NAME).write_bytes(own.as_download())
            (unfinished / OWNER).write_text(visitor)
            if own.has_card:
                (unfinished / "README.md").write_text(own.card, encoding="utf-8")
            for sample in own.samples:
                (unfinished / "samples").mkdir(exist_ok=True)
                shutil.copyfile(sample, unfinished / "samples" / sample.name)
        return self.get(visitor, f"public/{name}", own.kind)

    def unpublish(self, visitor: str, key: str) -> None:
        """Takes back what this visitor has published; `ValueError` for what others have."""
        adapter = self.find(visitor, key)
        if not adapter.published_by(visitor):
            raise ValueError(f"{adapter.name} was not published by you: only whoever did can take it back.")
        self.remove_public(adapter)

    def remove_public(self, adapter: Adapter) -> None:
        """Takes a published adapter away, whoever has published it; `ValueError` for any other."""
        if not adapter.key.startswith("public/"):
            raise ValueError(f"{adapter.name} is not published.")
        _remove(adapter)

    def rename(self, visitor: str, key: str, wanted: str) -> Adapter:
        """Gives an own adapter another name; returns it under the new one."""
        own = self._own(visitor, key, "is not yours: only your own adapters can be renamed.")
        if slug(wanted) == own.name:
            return own
        name = self.new_name(visitor, wanted)
        own.file.parent.rename(own.file.parent.with_name(name))
        return self.get(visitor, f"own/{name}", own.kind)

    def delete(self, visitor: str, key: str) -> None:
        """Deletes an own adapter with its card and samples."""
        _remove(self._own(visitor, key, "is not yours: only your own adapters can be deleted."))

    def add(self, visitor: str, wanted: str, tensors: AdapterFile) -> Adapter:
        """Keeps an uploaded adapter; `ValueError` where the visitor has too many."""
        self.check_room(visitor)
        name = self.new_name(visitor, wanted)
        metadata = public_metadata(tensors.metadata, name)
        write_safetensors(tensors.all_tensors, self.own_folder(visitor) / name / WEIGHTS_NAME, metadata)
        return self.find(visitor, f"own/{name}")

    def check_room(self, visitor: str) -> None:
        """`ValueError` where a visitor has as many adapters as one may have."""
        folder = self.own_folder(visitor)
        if folder.is_dir() and len(AdapterStore(folder, max_bytes=0).names()) >= MAX_OWN:
            raise ValueError(f"You have {MAX_OWN} adapters, as many as one may have here: delete one first.")

    def find(self, visitor: str, key: str) -> Adapter:
        """`get` for any kind of model."""
        for adapter in self._seen_by(visitor):
            if adapter.key == key:
                return adapter
        raise ValueError(GONE)

    def by_name(self, visitor: str, name: str, kind: str = "stable_diffusion") -> Adapter:
        """The adapter that a prompt names: the visitor's own before others of the same name."""
        for adapter in self.visible(visitor, kind):
            if adapter.name == name:
                return adapter
        raise ValueError(f"There is no adapter “{name}”, which the prompt names.")

    @staticmethod
    def kind_of(file: AdapterFile) -> str:
        """The kind of model that a file's tensors are for."""
        return _kind(next(key for key in file.tensors if ".apt." in key or ".apt_context." in key))

    def _own(self, visitor: str, key: str, otherwise: str) -> Adapter:
        adapter = self.find(visitor, key)
        if not adapter.is_own:
            raise ValueError(f"{adapter.name} {otherwise}")
        return adapter


def _remove(adapter: Adapter) -> None:
    if adapter.file.name != WEIGHTS_NAME:
        adapter.file.unlink(missing_ok=True)
        return
    remove_folder(adapter.file.parent)


def slug(text: str) -> str:
    """A name that is a harmless file name everywhere: lower case, digits and dashes, at most 40 characters."""
    return _SLUG.sub("-", text.lower()).strip("-")[:40].strip("-") or "adapter"


def _free(name: str, is_taken) -> str:
    candidates = (name if number == 1 else f"{name}-{number}" for number in range(1, 10_000))
    return next(candidate for candidate in candidates if not is_taken(candidate))


def _adapters_in(store: AdapterStore, prefix: str) -> list[Adapter]:
    found = []
    for name in store.names():
        try:
            file = store.file(name)
            stat = file.stat()
        except (ValueError, FileNotFoundError):  # gone since it was listed
            continue
        header = _read_header(file, stat.st_mtime_ns, stat.st_size)
        if header is not None:
            found.append(Adapter(f"{prefix}/{name}", name, file, *header, store))
    return found


@lru_cache(maxsize=4096)
def _read_header(file: Path, modified: int, size: int) -> tuple[str, dict[str, str]] | None:
    """`(kind, metadata)` of an adapter's file, `None` where it is none. Read anew when the file changes."""
    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            key = next((key for key in content.keys() if ".apt." in key or ".apt_context." in key), None)  # noqa: SIM118
            return None if key is None else (_kind(key), content.metadata() or {})
    except (SafetensorError, OSError):
        return None


def _kind(key: str) -> str:
    first = key.split(".")[0]
    if first in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        return "stable_diffusion"
    return first if first in ("vilt", "meter") else "clip"
