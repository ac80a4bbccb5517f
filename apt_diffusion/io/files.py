"""Finding, reading and writing adapter files, on disk and on the hub; errors name cause and remedy."""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from ..config import APTConfig
from ..words import LONGEST_WORD, MOST_WORDS, AdapterWords
from .atomic import replacing
from .former import current_header, current_names, method_in_header
from .names import WORDS_KEY, is_adapter_tensor, split_component

WEIGHTS_NAME = "pytorch_apt_weights.safetensors"


@dataclass
class AdapterFile:
    """What was read: a name for messages, the tensors, the header's strings."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    word_rows: dict[str, Tensor] = field(default_factory=dict)  # embeddings of new words, by component

    @property
    def all_tensors(self) -> dict[str, Tensor]:
        """What a file holds: the tensors, and the embeddings of new words."""
        return self.tensors | {f"{part}.{WORDS_KEY}": rows for part, rows in self.word_rows.items()}

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.all_tensors.values())

    @property
    def words(self) -> list[str]:
        """The new words that the adapter brings."""
        try:
            words = json.loads(self.metadata.get("apt_words", "[]"))
        except ValueError as error:
            raise ValueError(f"{self.name} has a header that cannot be used: {error}") from error
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{self.name} has a header that cannot be used: apt_words is no list of words.")
        if len(words) > MOST_WORDS or any(len(word) > LONGEST_WORD for word in words):
            raise ValueError(
                f"{self.name} has a header that cannot be used: apt_words has more than {MOST_WORDS} words, or one of "
                f"more than {LONGEST_WORD} characters."
            )
        return words

    @property
    def new_words(self) -> AdapterWords:
        """`words` with their embeddings; none of either in most files."""
        return AdapterWords(tuple(self.words), self.word_rows)

    @property
    def configs(self) -> dict[str, APTConfig] | None:
        """`APTConfig` per component, `None` without a header."""
        if "apt_config" not in self.metadata:
            return None
        try:
            configs = json.loads(self.metadata["apt_config"])
            return {part: APTConfig.from_dict(values) for part, values in configs.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.name} has a header that cannot be used: {error}") from error

    @property
    def places(self) -> dict[str, int]:
        """How many adapters the file was written with, per component; empty for files that do not say so."""
        try:
            places = json.loads(self.metadata.get("apt_places", "{}"))
            return {part: int(count) for part, count in places.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.name} has a header that cannot be used: {error}") from error

    @property
    def families(self) -> dict[str, list[str]]:
        """`families_of` the adapted models, per component; empty for files that do not say so."""
        try:
            families = json.loads(self.metadata.get("apt_families", "{}"))
            return {part: [str(name) for name in names] for part, names in families.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.name} has a header that cannot be used: {error}") from error

    @property
    def made_for(self) -> str:
        """A sentence for messages."""
        base = self.metadata.get("base_model")
        return f"It was made for the base model {base!r}." if base else "It does not say which base model it is for."


def read_adapter_file(file: Path, with_words: bool = False) -> AdapterFile:
    """Reads a safetensors file whole; `ValueError` where it is no APT adapter.

    Args:
        file: where it is.
        with_words: whether the caller can use new words; else a file that brings some is refused.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            metadata = content.metadata() or {}
            keys = list(content.keys())
            _check_is_apt(str(file), keys, metadata)
            tensors = current_names({key: content.get_tensor(key) for key in keys})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors ({error}): it is cut off, damaged or of another format. Copy or "
            "download it again; pickled files (.bin, .pt, .ckpt) are never loaded."
        ) from error
    rows = {split_component(key)[0]: tensors.pop(key) for key in list(tensors) if key.endswith(f".{WORDS_KEY}")}
    found = AdapterFile(str(file), tensors, current_header(str(file), tensors, metadata), rows)
    if bool(found.words) != bool(rows):
        raise ValueError(f"{file} is damaged: it has new words without embeddings, or the other way round.")
    if rows and not with_words:
        raise ValueError(
            f"{file} brings new words ({', '.join(found.words[:4])}), which only tokenizers can learn: use it with "
            "load_apt_weights on a pipeline, apt-diffusion generate, the studio or the server."
        )
    return found


def read_adapter_dict(tensors: dict[str, Tensor]) -> AdapterFile:
    """Tensors by key as if they came from a file without a header; `TypeError` and `ValueError` where they cannot."""
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"An adapter is a dict of tensors by name, got {key!r}: {type(value).__name__}.")
    _check_is_apt("the given dict", list(tensors), {})
    return AdapterFile("the given dict", current_names(tensors), {})


def _check_is_apt(name: str, keys: list[str], metadata: dict[str, str]) -> None:
    method = method_in_header(name, metadata)
    if method != "apt":
        raise ValueError(
            f"{name} holds the method {method!r}, not APT: load it with `apt_diffusion.baselines.load_method`."
        )
    if any(map(is_adapter_tensor, keys)):
        return
    if any("lora" in key.lower() for key in keys):
        raise ValueError(f"{name} is a LoRA file, not an APT adapter: load it with `load_lora_weights`.")
    raise ValueError(f"{name} is not an APT adapter: none of its {len(keys)} tensors belongs to one.")


def resolve_adapter_file(
    path_or_repo_id: str | Path, weight_name: str | None = None, subfolder: str | None = None, **hub: Any
) -> Path:
    """The adapter's file on disk, downloaded from the hub where the name is no path.

    Raises:
        FileNotFoundError: with what was looked for, and where.
        TypeError: for what is neither a name nor a path.
        ValueError: for a name that leads out of the folder given.
    """
    if not isinstance(path_or_repo_id, str | Path):
        raise TypeError(
            f"Expected a folder, a file, a hub repository or a dict, got {type(path_or_repo_id).__name__}."
        )
    weight_name = weight_name or WEIGHTS_NAME
    for what, name in {"weight_name": weight_name, "subfolder": subfolder}.items():
        _check_inside(what, name)
    path = Path(path_or_repo_id).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path / (subfolder or ""), weight_name)
    return _from_hub(str(path_or_repo_id), weight_name, subfolder, **hub)


def _check_inside(what: str, name: str | Path | None) -> None:
    if name is not None and not isinstance(name, str | Path):
        raise TypeError(f"{what} must be a name, got {name!r}.")
    parts = PurePosixPath(str(name or "").replace("\\", "/"))
    if parts.is_absolute() or any(part == ".." or ":" in part for part in parts.parts):
        raise ValueError(f"{str(name)!r} leads out of the folder given.")


def _in_folder(folder: Path, weight_name: str) -> Path:
    file = folder / weight_name
    if not file.is_file():
        inside = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"There is no {weight_name} in {folder} (found: {inside}).")
    return file


def _from_hub(repo_id: str, weight_name: str, subfolder: str | None, **hub: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where = f"{repo_id!r} is neither a file nor a folder here"
    try:
        return Path(hf_hub_download(repo_id, weight_name, subfolder=subfolder, **hub))
    except HFValidationError as error:
        raise FileNotFoundError(f"{where}, and no valid hub repository name either.") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{where}, the hub cannot be reached (or is switched off), and {weight_name} is not in the local cache."
        ) from error
    except (HfHubHTTPError, EntryNotFoundError) as error:
        raise FileNotFoundError(f"{where}, and the hub has no {weight_name} to give: {error}") from error


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all tensors as a safetensors file has them behind its header, in ModelSpec's form `0x...`."""
    from safetensors.torch import save

    content = save(tensors)
    return f"0x{hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], 'little') :]).hexdigest()}"


def _sort_header(file: Path) -> None:
    """Puts the header's strings in order: safetensors' own changes from file to file, and no two would be equal."""
    with file.open("r+b") as content:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        # As safetensors writes it, so that it is as long as before.
        written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(written) <= length:
            content.seek(8)
            content.write(written.ljust(length))


def write_safetensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> Path:
    """Writes to a temporary name in the same folder and renames: the file is whole or not there."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + 2**16
    free = shutil.disk_usage(file.parent).free
    if free < needed:
        raise OSError(f"No space for {file}: it needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free.")
    wrong = {key: value for key, value in metadata.items() if not isinstance(key, str) or not isinstance(value, str)}
    if wrong:
        raise ValueError(f"The header of {file} holds strings only, got {wrong}.")
    try:
        with replacing(file) as temporary:
            save_file(tensors, temporary, metadata=metadata)
            _sort_header(temporary)
    except SafetensorError as error:
        raise OSError(f"{file} could not be written: {error}") from error
    return file
