"""Latents and text embeddings on disk, shared between runs (`--cache_encoder_outputs`), as METER's trainers have it.

A file's name is a hash of everything that its tensors depend on: the picture's content and view, or the prompt; the
encoders' files, their settings and precision, the device, and the libraries' versions. So nothing is ever out of date,
and a run with the cache is a run without, bit for bit.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...data.fingerprint import hash_file
from ...data.pictures import View
from ...data.reading import PictureFile
from ...io.atomic import replacing
from ...version import __version__
from .stable_diffusion import Embeddings, StableDiffusionBase

logger = logging.getLogger(__name__)

LIMIT = 16 * 2**30  # bytes of a folder; 60,000 pictures at 512 x 512
UNFINISHED = 3600  # seconds after which a file that was not renamed has been left behind
KINDS = ("latents", "texts")  # subfolders
ENTRY = re.compile(r"[0-9a-f]{32}\.safetensors")
LEFTOVER = re.compile(r"\..+\.tmp\.safetensors")  # of `replacing`
LIBRARIES = ("torch", "diffusers", "transformers", "pillow", "numpy")
CONFIGS = ("model_index.json", "unet/config.json", "transformer/config.json", "config.json")
PLAIN = (str, int, float, bool, tuple, list, type(None))


class EncoderOutputs:
    """Tensors by what they depend on, one safetensors file each. Several runs and processes may use one folder.

    Args:
        folder: is made where it is missing.
        of_latents: what all latents depend on beside picture and view, for `json`.
        of_texts: what all embeddings depend on beside the prompt.
        limit: bytes; `trim` removes what was not used for longest.

    Attributes:
        found, computed: how many tensors came from the folder, and from the encoders.
    """

    def __init__(self, folder: str | Path, of_latents: Any, of_texts: Any, limit: int = LIMIT) -> None:
        self.folder = Path(folder)
        self.of_latents, self.of_texts = of_latents, of_texts
        self.limit = limit
        self.found = self.computed = 0
        self._used: set[Path] = set()
        self._contents: dict[PictureFile, str] = {}
        self._writes = True

    def latents(self, view: View, compute: Callable[[], Tensor]) -> Tensor:
        """Of a view of a picture, on the CPU."""
        if view.path not in self._contents:
            self._contents[view.path] = hash_file(view.path)
        place = [view.width, view.height, view.left, view.top, view.flipped]
        key = [self.of_latents, self._contents[view.path], place]
        return self._get("latents", key, lambda: {"latents": compute()})["latents"]

    def embeddings(self, prompt: str, compute: Callable[[], Embeddings]) -> Embeddings:
        """Of a prompt, on the CPU."""
        return self._get("texts", [self.of_texts, prompt], compute)

    def _get(self, kind: str, key: Any, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        file = self.folder / kind / f"{name}.safetensors"
        self._used.add(file)
        tensors = _read(file)
        if tensors is not None:
            self.found += 1
            return tensors
        tensors = {part: tensor.cpu().contiguous() for part, tensor in compute().items()}
        self.computed += 1
        if self._writes:
            self._write(file, tensors)
        return tensors

    def _write(self, file: Path, tensors: dict[str, Tensor]) -> None:
        try:
            with replacing(file) as temporary:
                save_file(tensors, temporary, {"sum": _checksum(tensors)})
        except (OSError, SafetensorError) as error:
            self._writes = False
            logger.warning("%s takes no more encoder outputs (%s): the run goes on without.", self.folder, error)

    def trim(self) -> None:
        """Says what was found, and removes files that were not used for longest, above the limit, none of this run."""
        logger.info("Encoder outputs in %s: %d found, %d computed.", self.folder, self.found, self.computed)
        sizes = {}
        for file in (file for kind in KINDS for file in (self.folder / kind).glob("*.safetensors")):
            try:
                status = file.stat()
            except FileNotFoundError:  # another run has removed it
                continue
            # The folder may hold models of the user's, too.
            if ENTRY.fullmatch(file.name):
                sizes[file] = (status.st_mtime, status.st_size)
            elif LEFTOVER.fullmatch(file.name) and status.st_mtime < time.time() - UNFINISHED:
                file.unlink(missing_ok=True)
        total = sum(size for _, size in sizes.values())
        for file in sorted(sizes.keys() - self._used, key=lambda file: sizes[file]):
            if total <= self.limit:
                break
            file.unlink(missing_ok=True)
            total -= sizes[file][1]


def _read(file: Path) -> dict[str, Tensor] | None:
    """A file's tensors; `None` where it is missing, or damaged, which is said."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            # Not mapped from the file, which another run may remove.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            whole = (opened.metadata() or {}).get("sum") == _checksum(tensors)
        if whole:
            os.utime(file)
            return tensors
    except (SafetensorError, OSError, ValueError):
        pass
    logger.warning("%s is damaged: it is computed anew.", file)
    return None


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def open_outputs(
    args: argparse.Namespace, base: StableDiffusionBase, device: torch.device, dtype: torch.dtype
) -> EncoderOutputs | None:
    """The folder of `--cache_encoder_outputs`, or `None` where it is not given.

    Args:
        args: the script's flags.
        base: whose encoders they are.
        device, dtype: where and in what the text encoders compute; the VAE is in float32.
    """
    if args.cache_encoder_outputs is None:
        return None
    vae = (base.path, "vae*") if base.other_vae is None else (base.other_vae, "*")
    tokenizer = None if args.tokenizer_name is None else files_of(args.tokenizer_name, "*", args.revision)
    texts = [files_of(base.path, pattern, args.revision) for pattern in ("text_encoder*/*", "tokenizer*/*")]
    settings = {name: value for name, value in vars(base).items() if isinstance(value, PLAIN)}
    shared = [type(base).__name__, args.variant, str(device), platform.machine(), __version__]
    shared += [version(library) for library in LIBRARIES]
    if device.type == "cuda":
        shared += [torch.cuda.get_device_name(device), args.allow_tf32]
    return EncoderOutputs(
        args.cache_encoder_outputs,
        [*shared, files_of(vae[0], vae[1], args.revision), args.image_interpolation_mode],
        [*shared, texts, tokenizer, str(dtype), settings, args.tokenizer_max_length,
         args.text_encoder_use_attention_mask],
    )  # fmt: skip


def files_of(name_or_path: str, pattern: str, revision: str | None = None) -> list[Any]:
    """What a model's files are, without reading them: of a folder their sizes and times, else the hub's commit.

    Raises:
        ValueError: for a model of the hub whose commit is not known here.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        found = []
        for path in sorted(folder.glob(pattern)):
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                status = file.stat()
                found.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
        return found
    for config in CONFIGS:
        cached = try_to_load_from_cache(name_or_path, config, revision=revision)
        if isinstance(cached, str):
            return [name_or_path, Path(cached).relative_to(Path(cached).parents[config.count("/") + 1]).parts[0]]
    raise ValueError(
        f"--cache_encoder_outputs cannot tell which commit of {name_or_path} this is: download it to a folder, or "
        "leave the flag out."
    )


def check_folder(folder: str) -> None:
    """`ValueError` where the folder cannot be one."""
    if not folder.strip():
        raise ValueError("--cache_encoder_outputs names a folder, but is empty.")
    path = Path(folder)
    if any(place.exists() and not place.is_dir() for place in (path, *path.parents)):
        raise ValueError(f"--cache_encoder_outputs names a folder, but {folder} is a file, or is in one.")
