"""The judge: a classifier of emoji pictures by thing, style, ground and size, trained separately from the model."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = Path(__file__).parent
JUDGE_FILE = FOLDER / "judge.safetensors"
VOCABULARY_FILE = FOLDER / "judge.json"
SIDE = 64
FEATURES = 128
LAYOUTS = ("small", "large", "beside", "above")  # the last two show two objects
# Where the objects of a layout are looked for: centres (x, y) and the side of the square, in pixels.
WINDOWS = {
    "small": (((32, 32),), 40),
    "large": (((32, 32),), 64),
    "beside": (((16, 32), (48, 32)), 36),
    "above": (((32, 16), (32, 48)), 36),
}


@dataclass(frozen=True)
class Vocabulary:
    """The labels that the judge distinguishes."""

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    patterns: tuple[str, ...]
    colors: tuple[str, ...]

    @classmethod
    def load(cls, file: Path = VOCABULARY_FILE) -> "Vocabulary":
        """From `judge.json`."""
        return cls(**{key: tuple(values) for key, values in json.loads(file.read_text(encoding="utf-8")).items()})


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(8, after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(8, after)
        self.skip = nn.Identity() if stride == 1 and before == after else nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, before, H, W)` to `(B, after, H / stride, W / stride)`."""
        inner = F.silu(self.first_norm(self.first(x)))
        return F.silu(self.skip(x) + self.second_norm(self.second(inner)))


class Judge(nn.Module):
    """Reads windows on objects and whole pictures, both `(B, 3, 64, 64)` in [-1, 1]."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        widths = (32, 48, 80, 128)
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        self.trunk = nn.Sequential(
            ResidualBlock(widths[0], widths[0], 1),
            *(ResidualBlock(before, after, 2) for before, after in itertools.pairwise(widths)),
            ResidualBlock(widths[-1], widths[-1], 1),
        )
        flat = widths[-1] * (SIDE // 16) ** 2
        self.embed = nn.Linear(flat, FEATURES)
        self.concepts = nn.Parameter(torch.randn(len(vocabulary.concepts), FEATURES) / FEATURES**0.5)
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        whole = {
            "layout": len(LAYOUTS),
            "pattern": len(vocabulary.patterns),
            "ground": len(vocabulary.colors),
            "second_ground": len(vocabulary.colors) + 1,  # the last: none is named
        }
        self.styles = nn.Linear(flat, len(vocabulary.styles))
        self.whole = nn.ModuleDict({name: nn.Linear(flat, size) for name, size in whole.items()})

    def forward(self, pictures: Tensor) -> Tensor:
        """`(B, flat)`"""
        return self.trunk(F.silu(self.stem(pictures))).flatten(1)

    def features(self, windows: Tensor) -> Tensor:
        """Unit vectors `(B, 128)` of what windows show: their products are similarities."""
        return F.normalize(self.embed(self(windows)).float(), dim=1)

    def read_windows(self, windows: Tensor) -> dict[str, Tensor]:
        """Logits of `concept` and `style`."""
        hidden = self(windows)
        features = F.normalize(self.embed(hidden).float(), dim=1)
        logits = self.log_scale.exp() * features @ F.normalize(self.concepts, dim=1).T
        return {"concept": logits, "style": self.styles(hidden)}

    def read_whole(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits of `layout`, `pattern`, `ground` and `second_ground`."""
        hidden = self(pictures)
        return {name: head(hidden) for name, head in self.whole.items()}


def look_at(pictures: Tensor, centers: Tensor, sides: Tensor) -> Tensor:
    """Square windows of pictures, at centres `(B, 2)` with sides `(B,)` in pixels, enlarged to `(B, 3, 64, 64)`."""
    axis = (torch.arange(SIDE, device=pictures.device) + 0.5) / SIDE - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = centers[:, None, None] + torch.stack([x, y], -1) * sides[:, None, None, None]
    grid = grid / (SIDE / 2) - 1
    return F.grid_sample(
        pictures, grid.to(pictures.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )


def load_judge(file: Path = JUDGE_FILE, vocabulary_file: Path = VOCABULARY_FILE) -> Judge:
    """The embedded judge, in float32."""
    from safetensors.torch import load_file

    judge = Judge(Vocabulary.load(vocabulary_file))
    judge.load_state_dict({key: value.float() for key, value in load_file(file).items()})
    return judge.eval().requires_grad_(False)
