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
import json
import re
import shutil
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..io.atomic import new_folder
from ..io.files import WEIGHTS_NAME, AdapterFile
from ..serving.store import AdapterStore

VISITORS = ".visitors"
GONE = "This adapter is not there any more: choose another one."
EXAMPLES = Path(__file__).parent / "examples"
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
                adapter's name: where it lies is nobody's business.
        """
        if not self.file.is_file():
            raise ValueError(GONE)
        try:
            return dataclasses.replace(self.store.get(self.name), name=self.name)
        except ValueError as error:
            raise ValueError(str(error).replace(str(self.file), self.name)) from error

    @property
    def is_own(self) -> bool:
        """Whether it is the visitor's, not a published one."""
        return self.key.startswith("own/")

    @property
    def label(self) -> str:
        """The name in lists, with its kind."""
        kind = {"own": " (yours)", "example": " (example)", "public": ""}
        return self.name + kind[self.key.split("/")[0]]

    @property
    def prompt(self) -> str:
        """The prompt that asks for what it has learnt, where that is known."""
        return self.metadata.get("instance_prompt", "")

    @property
    def card(self) -> str:
        """Its model card as Markdown, without front matter and pictures; a line where it has none."""
        file = self.file.parent / "README.md"
        if self.file.name != WEIGHTS_NAME or not file.is_file():
            base = self.metadata.get("base_model", "not known")
            return f"**{self.name}** has no model card. Base model: `{base}`."
        text = file.read_text(encoding="utf-8", errors="replace")
        for path, instead in self._paths().items():
            text = text.replace(path, instead)
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
        return re.sub(r"!\[[^\]]*\]\([^)]*\)\n?", "", text).strip()

    def _paths(self) -> dict[str, str]:
        """Paths on this computer that the trainer wrote down, and what visitors read instead."""
        try:
            training = json.loads(self.metadata.get("training", "{}"))
        except ValueError:
            return {}
        instead = {
            "output_dir": download_name(self.name), "instance_data_dir": "pictures",
            "class_data_dir": "class-pictures", "data_dir": "data",
        }  # fmt: skip
        return {training[key]: word for key, word in instead.items() if training.get(key)}


def download_name(name: str) -> str:
    """The name of the file that a visitor downloads."""
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
        """Where all work of a visitor is; `ValueError` for what is no visitor's identity."""
        if not re.fullmatch(r"[0-9a-f]{32}", visitor):
            raise ValueError("This is no visitor of the studio.")
        return self.folder / VISITORS / visitor

    def own_folder(self, visitor: str) -> Path:
        """Where the visitor's adapters are."""
        return self.visitor_folder(visitor) / "adapters"

    def visible(self, visitor: str, kind: str = "stable_diffusion") -> list[Adapter]:
        """The visitor's own adapters, then the published ones; those that cannot be read are left out."""
        folder = self.own_folder(visitor)
        # Whose adapters are read for each use: there may be many visitors.
        own = _adapters_in(AdapterStore(folder, max_bytes=0), "own") if folder.is_dir() else []
        seen = [*own, *_adapters_in(self.public, "public"), *self.examples]
        return [adapter for adapter in seen if adapter.kind == kind]

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
        own = self.get(visitor, key)
        if not own.is_own:
            raise ValueError(f"{own.name} is published already.")
        taken = {adapter.name for adapter in _adapters_in(self.public, "public")}
        name = _free(own.name, lambda name: name in taken or (self.folder / name).exists())
        with new_folder(self.folder / name) as unfinished:  # nobody sees half an adapter
            for file in (own.file, own.file.parent / "README.md", own.file.parent / "loss.png"):
                if file.is_file():
                    shutil.copyfile(file, unfinished / file.name)
            samples = own.file.parent / "samples"
            if samples.is_dir():
                shutil.copytree(samples, unfinished / "samples")
        return self.get(visitor, f"public/{name}")


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
    if first in ("unet", "text_encoder", "text_encoder_2"):
        return "stable_diffusion"
    return first if first in ("vilt", "meter") else "clip"
