"""Outputs of METER's frozen encoders, computed once and kept on disk, across epochs and runs.

Use it when only the cross-modal layers are trained and pictures are not augmented. The folder's name is a hash of
everything that the features depend on: encoder weights, config and precision, and for pictures the settings of the
image processor. A picture's key is its path, file size and modification time, a text's key its token ids.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .feature_store import FeatureStore
from .modeling_meter import MeterModel, MeterPreTrainedModel

SHARD_BYTES = 2**27
CONFIG_NOISE = ("_name_or_path", "architectures", "dtype", "transformers_version", "id2label", "label2id")


def open_rgb(path: Path) -> Image.Image:
    """A picture file in RGB."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


class EncoderCache:
    """The features of a model's encoders under `folder`; several processes may fill and read it at once.

    It does not hold the model, so it can travel to the workers of a data loader. Features are those of the encoders in
    evaluation mode: a training without the cache has the same losses only with its encoders in evaluation mode, too.

    Args:
        model: a METER model whose encoders are frozen and hold nothing but their own parameters.
        folder: parent folder of all caches; several models can share it.
        image_processor: the one that pictures go through; it must not draw at random.
        dtype: what features are kept in, the encoders' own precision if `None`; `torch.float16` needs half the space.

    Raises:
        ValueError: where the encoders are trainable or adapted, so that their output is not fixed.
    """

    def __init__(
        self,
        model: MeterPreTrainedModel,
        folder: str | Path,
        image_processor: Any,
        dtype: torch.dtype | None = None,
    ) -> None:
        meter = model.base_model
        check_encoders_are_fixed(meter)
        vision, settings = meter.config.vision_config, image_processor.to_dict()
        self.image_processor = image_processor
        self.dtype = dtype or meter.dtype
        self.pad_token_id = meter.config.text_config.pad_token_id
        self.text_width = meter.config.text_config.hidden_size
        rows, columns = (settings["crop_size"][side] // vision.patch_size for side in ("height", "width"))
        self.values_per_picture = (rows * columns + 1) * vision.hidden_size
        self.keys = {
            "images": fingerprint(meter.vision_model, str(self.dtype), json.dumps(settings, sort_keys=True)),
            "texts": fingerprint(meter.text_model, str(self.dtype)),
        }
        self.images, self.texts = (FeatureStore(Path(folder) / f"{kind}-{key}") for kind, key in self.keys.items())

    def bytes_needed(self, pictures: Iterable[Path] = (), texts: Iterable[Sequence[int]] = ()) -> int:
        """Disk space for the features of pictures, and of texts as token ids, that are not here yet."""
        words = sum(map(len, _missing(self.texts, texts, text_key).values()))
        values = len(_missing(self.images, pictures, picture_key)) * self.values_per_picture + words * self.text_width
        return values * self.dtype.itemsize

    @torch.no_grad()
    def fill_images(
        self,
        model: MeterPreTrainedModel,
        pictures: Iterable[Path],
        batch_size: int = 32,
        num_workers: int = 0,
        open_picture: Callable[[Path], Image.Image] = open_rgb,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Computes the features of the pictures that are not here yet. Stopped at any point, it goes on from there.

        Args:
            model: the one that the cache was made for.
            pictures: paths.
            batch_size: pictures at a time.
            num_workers: processes that read pictures.
            open_picture: path to RGB picture.
            share: `(index, count)` of this process, of which each computes its part. Wait for all before reading.

        Raises:
            ValueError: for a model whose encoders are not fixed.
            OSError: where the disk has no room for all of them, before the first is computed; for a picture that
                cannot be read.
        """
        missing = _missing(self.images, pictures, picture_key, share)
        self.images.check_space(len(missing) * self.values_per_picture * self.dtype.itemsize)
        reader = _Reader(self.image_processor, open_picture)
        loader = DataLoader(list(missing.items()), batch_size, num_workers=num_workers, collate_fn=reader)
        with self._filling(self.images, model) as (meter, add):
            for keys, pixels in tqdm(loader, "features of pictures", disable=not missing):
                add(keys, meter.get_image_features(pixels.to(meter.device, meter.dtype)))

    @torch.no_grad()
    def fill_texts(
        self,
        model: MeterPreTrainedModel,
        texts: Iterable[Sequence[int]],
        batch_size: int = 64,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """As `fill_images`, for texts as token ids without padding."""
        missing = _missing(self.texts, texts, text_key, share)
        self.texts.check_space(sum(map(len, missing.values())) * self.text_width * self.dtype.itemsize)
        items = sorted(missing.items(), key=lambda item: len(item[1]))
        with self._filling(self.texts, model) as (meter, add):
            for start in tqdm(range(0, len(items), batch_size), "features of texts", disable=not items):
                keys, texts = zip(*items[start : start + batch_size], strict=True)
                ids = [torch.tensor(text, device=meter.device) for text in texts]
                padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
                mask = nn.utils.rnn.pad_sequence([torch.ones_like(own) for own in ids], batch_first=True)
                features = meter.get_text_features(padded, mask)
                add(keys, [own[: len(text)] for own, text in zip(features, texts, strict=True)])

    def image_embeds(self, pictures: Sequence[Path]) -> Tensor:
        """`(B, I, d_vision)` on the CPU, for the model's `image_embeds`.

        Raises:
            ValueError: for pictures that are missing here or have changed since.
        """
        keys = [picture_key(path) for path in pictures]
        self.images.require(dict(zip(keys, pictures, strict=True)))
        return torch.stack([self.images[key] for key in keys])

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`(B, T, d_text)` on the CPU, for the model's `text_embeds`; zero at padding, which the mask hides.

        Raises:
            ValueError: for texts that are missing here.
        """
        masks = attention_mask.bool().cpu()
        texts = [row[mask].tolist() for row, mask in zip(input_ids.cpu(), masks, strict=True)]
        keys = [text_key(text) for text in texts]
        self.texts.require(dict(zip(keys, texts, strict=True)))
        embeds = torch.zeros(*masks.shape, self.text_width, dtype=self.dtype)
        for row, mask, key in zip(embeds, masks, keys, strict=True):
            row[mask] = self.texts[key]
        return embeds

    @contextlib.contextmanager
    def _filling(
        self, store: FeatureStore, model: MeterPreTrainedModel
    ) -> Iterator[tuple[MeterModel, Callable[[Sequence[str], Sequence[Tensor]], None]]]:
        """`(model with its encoders in evaluation mode, function that collects features into shards)`."""
        meter = model.base_model
        check_encoders_are_fixed(meter)
        encoders = (meter.text_model, meter.vision_model)
        modes = [encoder.training for encoder in encoders]
        shard: dict[str, Tensor] = {}

        def write() -> None:
            full = dict(shard)
            shard.clear()  # first: after an error the same shard must not be tried again
            store.add(full)

        def add(keys: Sequence[str], features: Sequence[Tensor]) -> None:
            for key, own in zip(keys, features, strict=True):
                shard[key] = own.to("cpu", self.dtype, copy=True).contiguous()
            if sum(own.nbytes for own in shard.values()) >= SHARD_BYTES:
                write()

        try:
            for encoder in encoders:
                encoder.eval()
            yield meter, add
        finally:
            for encoder, mode in zip(encoders, modes, strict=True):
                encoder.train(mode)
            write()


class _Reader:
    """Collates `(key, path)` to keys and pixels, in the loader's workers."""

    def __init__(self, image_processor: Any, open_picture: Callable[[Path], Image.Image]) -> None:
        self.image_processor = image_processor
        self.open_picture = open_picture

    def __call__(self, items: list[tuple[str, Path]]) -> tuple[list[str], Tensor]:
        pictures = [self.open_picture(path) for _, path in items]
        return [key for key, _ in items], self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]


def check_encoders_are_fixed(meter: MeterModel) -> None:
    """`ValueError` where a parameter of an encoder is trainable, or is not the encoder's own but an adapter's."""
    for encoder in (meter.text_model, meter.vision_model):
        with torch.device("meta"):
            arguments = {"add_pooling_layer": False} if encoder is meter.text_model else {}
            own = {name for name, _ in type(encoder)(encoder.config, **arguments).named_parameters()}
        for name, parameter in encoder.named_parameters():
            if name not in own or parameter.requires_grad:
                why = "is trainable" if parameter.requires_grad else "is an adapter's"
                raise ValueError(
                    f"{type(encoder).__name__}'s {name} {why}: the encoders' outputs are not fixed, so none is kept. "
                    "Freeze them, adapt the cross-modal layers only, or train without the cache."
                )


def fingerprint(encoder: nn.Module, *more: str) -> str:
    """16 hex digits of everything that an encoder's output depends on, except its input."""
    config = {key: value for key, value in encoder.config.to_dict().items() if key not in CONFIG_NOISE}
    digest = hashlib.sha256(json.dumps([config, *more], sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def picture_key(path: Path) -> str:
    """By path, size and time of change: reading pictures again is what the cache saves."""
    status = Path(path).stat()
    return _digest([str(Path(path).resolve()), status.st_size, status.st_mtime_ns])


def text_key(token_ids: Sequence[int]) -> str:
    """By the tokens alone, so that equal texts share their features."""
    return _digest([int(token) for token in token_ids])


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def _missing(
    store: FeatureStore, items: Iterable[Any], key_of: Callable[[Any], str], share: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """`{key: item}` of this process's share; by key, because the processes need not see the same shards."""
    store.refresh()
    keyed = {key_of(item): item for item in items}
    index, count = share
    return {key: item for key, item in keyed.items() if key not in store and int(key, 16) % count == index}
