"""DreamBooth data: pictures of one subject; with prior preservation also pictures of its class.

`DreamBoothData` maps a position of the endless sample stream to the inputs of a training step. The order,
cut, flip, timestep and noise of a sample depend on the seed and the position alone, see `order`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .buckets import BucketOrder, Size, nearest_bucket
from .masks import Masks
from .order import Branch, Purpose, entry_at, random_at
from .pictures import Picture, View, choose_view, cut, time_ids
from .reading import read_picture

# A view's latent distribution: mean and standard deviation, (2, c, h, w)
LatentCache = dict[View, Tensor]


@dataclass(frozen=True)
class Framing:
    """How pictures are cropped: to squares of `size`, or each to the nearest of `buckets` (heights and widths)."""

    size: int
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    stride: int = 8  # pixels per latent cell
    buckets: tuple[Size, ...] = ()

    def size_of(self, picture: Picture) -> Size:
        """Height and width of a picture once it is cropped."""
        if not self.buckets:
            return self.size, self.size
        return nearest_bucket(picture.height, picture.width, self.buckets)

    def latents_of(self, size: Size, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """`(c, h, w)` of a crop's latents, where those of a square have `latent_shape`."""
        return (latent_shape[0], size[0] // self.stride, size[1] // self.stride) if self.buckets else latent_shape


@dataclass(frozen=True)
class Sample:
    """One picture of one training step. `image` is its latent distribution where that is cached, else its pixels."""

    prompt: str
    image: Tensor  # (2, c, h, w) or (3, H, W)
    time_ids: tuple[int, ...]  # see `time_ids`; of use to SDXL alone
    timestep: int
    posterior_noise: Tensor  # (c, h, w): which latent of the distribution
    noise: Tensor  # (c, h, w)
    mask: Tensor | None = None  # (1, h, w), how much each latent cell counts; all alike if `None`
    weight: float = 1.0  # of its error


@dataclass
class Batch:
    """Samples stacked; with prior preservation the second half are those of the class."""

    prompts: list[str]
    images: Tensor  # (B, 2, c, h, w) or (B, 3, H, W)
    time_ids: Tensor  # (B, 6)
    timesteps: Tensor  # (B,)
    posterior_noise: Tensor  # (B, c, h, w)
    noise: Tensor  # (B, c, h, w)
    masks: Tensor | None = None  # (B, 1, h, w); `None` where no sample has one
    weights: Tensor | None = None  # (B,); `None` where all are 1

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU copies from without waiting."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = vars(self).items()
        return Batch(**{name: change(value) if isinstance(value, Tensor) else value for name, value in values})


def uniform_timestep(draws: np.random.Generator) -> int:
    """One of 1000, all equally likely."""
    return int(draws.integers(1000))


class DreamBoothData(Dataset):
    """position -> `[sample]`, or with class pictures `[instance sample, class sample]`.

    Args:
        instance: pictures of the subject.
        class_pictures: pictures of its class, or nothing.
        framing: how pictures are cropped; those of the class as the picture of the subject beside them.
        latent_shape: `(c, h, w)` of a square's latents.
        seed: every random choice follows from it.
        repeats: how often an epoch shows each instance picture.
        noise_offset: size of a random offset per sample and channel that is added to the noise.
        draw_timestep: the timestep of a sample, from its random numbers.
        caption_dropout: how often a sample has no caption, from 0 to 1.
        group: how many positions make a batch of all processes; with buckets they have one size.
    """

    def __init__(
        self,
        instance: list[Picture],
        class_pictures: list[Picture],
        framing: Framing,
        latent_shape: tuple[int, int, int],
        seed: int,
        repeats: int = 1,
        noise_offset: float = 0.0,
        draw_timestep: Callable[[np.random.Generator], int] = uniform_timestep,
        caption_dropout: float = 0.0,
        group: int = 1,
    ) -> None:
        self.instance = instance
        self.class_pictures = class_pictures
        self.framing = framing
        self.latent_shape = latent_shape
        self.seed = seed
        self.noise_offset = noise_offset
        self.draw_timestep = draw_timestep
        self.caption_dropout = caption_dropout
        self.cache: LatentCache | None = None
        self.masks = Masks(framing.stride)
        self.epoch_length = max(len(instance) * repeats, len(class_pictures))
        self._bucket_order: BucketOrder | None = None
        if framing.buckets:
            of_picture = [framing.size_of(picture) for picture in instance]
            entries = [of_picture[entry % len(instance)] for entry in range(self.epoch_length)]
            self._bucket_order = BucketOrder(entries, group, seed)

    @property
    def prompts(self) -> list[str]:
        """The distinct prompts, before what is random in them."""
        return list(dict.fromkeys(picture.prompt for picture in [*self.instance, *self.class_pictures]))

    def describe(self, position: int) -> str:
        """The files whose pictures stand at this position."""
        return " and ".join(str(picture.path) for picture, _ in self._choice(position))

    def views_at(self, position: int) -> list[View]:
        """The crops that a training step at this position sees."""
        choice = self._choice(position)
        size = self.framing.size_of(choice[0][0])
        return [self._view(picture, size, self._draws(position, purpose)) for picture, purpose in choice]

    def __getitem__(self, position: int) -> list[Sample]:
        choice = self._choice(position)
        size = self.framing.size_of(choice[0][0])
        return [self._sample(picture, size, position, purpose) for picture, purpose in choice]

    def _choice(self, position: int) -> list[tuple[Picture, Purpose]]:
        if self._bucket_order is None:
            entry = entry_at(self.seed, position, self.epoch_length)
        else:
            entry = self._bucket_order.entry_at(position)
        choice = [(self.instance[entry % len(self.instance)], Purpose.SAMPLE)]
        if self.class_pictures:
            choice.append((self.class_pictures[entry % len(self.class_pictures)], Purpose.PRIOR_SAMPLE))
        return choice

    def _draws(self, position: int, purpose: Purpose) -> np.random.Generator:
        return random_at(self.seed, position, purpose)

    def _view(self, picture: Picture, size: Size, draws: np.random.Generator) -> View:
        framing = self.framing
        return choose_view(
            picture,
            size,
            framing.stride,
            framing.center_crop,
            framing.random_flip,
            (draws.random(), draws.random()),
        )

    def _sample(self, picture: Picture, size: Size, position: int, purpose: Purpose) -> Sample:
        draws = self._draws(position, purpose)
        view = self._view(picture, size, draws)  # first: `views_at` makes the same two draws
        timestep = self.draw_timestep(draws)
        latent_shape = self.framing.latents_of(size, self.latent_shape)
        posterior_noise, noise = draws.standard_normal((2, *latent_shape), dtype=np.float32)
        if self.noise_offset:
            noise = noise + self.noise_offset * draws.standard_normal((self.latent_shape[0], 1, 1), dtype=np.float32)
        prompt = self.prompt_of(picture, position, purpose)
        own = picture.caption_options.dropout
        dropout = self.caption_dropout if own is None else own
        if dropout and draws.random() < dropout:
            prompt = ""
        image = self.cache[view] if self.cache is not None else self.pixels([view])[view]
        place, mask = time_ids(picture, view), self.masks(picture, view)
        noises = torch.from_numpy(posterior_noise), torch.from_numpy(noise)
        return Sample(prompt, image, place, timestep, *noises, mask, picture.weight)

    def prompt_of(self, picture: Picture, position: int, purpose: Purpose) -> str:
        """The text that a picture has at this position, unless it is dropped."""
        options = picture.caption_options
        if not options.varies:
            return picture.prompt
        return options.drawn(picture.caption, random_at(self.seed, position, purpose, Branch.CAPTION))

    def pixels(self, views: list[View]) -> dict[View, Tensor]:
        """Pixels `(3, height, width)` of several views."""
        return pixels_of(views, self.framing)


def pixels_of(views: list[View], framing: Framing) -> dict[View, Tensor]:
    """Pixels `(3, height, width)` of several views; each picture is opened once."""
    found: dict[View, Tensor] = {}
    for path, of_picture in groupby(sorted(set(views)), key=lambda view: view.path):
        image = read_picture(path)
        found |= {view: cut(image, view, framing.interpolation) for view in of_picture}
    return found


def collate(samples: list[list[Sample]]) -> Batch:
    """Stacks what `DreamBoothData` gives: first all instance samples, then all class samples."""
    flat = [sample for role in zip(*samples, strict=True) for sample in role]
    return Batch(
        [sample.prompt for sample in flat],
        torch.stack([sample.image for sample in flat]),
        torch.tensor([sample.time_ids for sample in flat]),
        torch.tensor([sample.timestep for sample in flat]),
        torch.stack([sample.posterior_noise for sample in flat]),
        torch.stack([sample.noise for sample in flat]),
        stack_masks(flat),
        None if all(sample.weight == 1 for sample in flat) else torch.tensor([sample.weight for sample in flat]),
    )


def stack_masks(samples: list[Sample]) -> Tensor | None:
    """`(B, 1, h, w)`, ones for samples without a mask; `None` where none has one."""
    if all(sample.mask is None for sample in samples):
        return None
    whole = torch.ones(1, *samples[0].noise.shape[1:])
    return torch.stack([whole if sample.mask is None else sample.mask for sample in samples])
