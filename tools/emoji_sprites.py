#!/usr/bin/env python
"""Pictures of several hundred things in three artists' styles, from packages of the npm registry.

    python tools/emoji_sprites.py --output runs/emoji/sprites.npz

Needs `npm` and `pip install resvg-py`. The packages are fetched by name and version, checked against the checksums
below, and drawn at 64 x 64. Nothing of this is needed to use the model.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

SIDE = 64  # of a sprite, in pixels; its longer side fills it
DRAWN = 512  # the icons are drawn this large, then reduced
CONCEPTS_FILE = Path(__file__).with_name("emoji_concepts.tsv")


@dataclass(frozen=True)
class Package:
    """An icon package, with the licence that its own `info.json` must declare."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def archive(self) -> str:
        """Name of the file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
    ),
}


def read_concepts(file: Path = CONCEPTS_FILE) -> dict[str, str]:
    """`{name in a caption: icon of every package}`."""
    rows = file.read_text(encoding="utf-8").splitlines()[1:]
    return dict(row.split("\t") for row in rows)


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, downloaded unless it lies there.

    Raises:
        RuntimeError: `npm` is missing or cannot reach its registry, or the archive is not the one expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / package.archive
    if not archive.is_file():
        wanted = f"{package.name}@{package.version}"
        try:
            subprocess.run(
                ["npm", "pack", wanted, "--pack-destination", str(folder)],
                check=True,
                capture_output=True,
                text=True,
                timeout=300,
            )
        except FileNotFoundError:
            raise RuntimeError(f"`npm` fetches {wanted}, and is not installed. Install Node.js.") from None
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = (getattr(error, "stderr", "") or "no answer in 300 seconds").strip().splitlines()
            raise RuntimeError(
                f"`npm pack {wanted}` failed: {said[-1] if said else error}. It needs a network; "
                f"or put {package.archive} into {folder} by hand."
            ) from None
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise RuntimeError(f"{archive} has the checksum {found}, not {package.sha256}. Delete it and start again.")
    return archive


def read_icons(archive: Path, package: Package) -> dict:
    """The package's `icons.json`, once its licence is seen to be the one expected."""
    with tarfile.open(archive) as files:

        def read(member: str) -> dict:
            return json.load(files.extractfile(f"package/{member}"))

        licence = read("info.json")["license"]["spdx"]
        if licence != package.licence:
            raise RuntimeError(f"{package.name} declares the licence {licence}, not {package.licence}.")
        return read("icons.json")


def draw_icon(icons: dict, name: str) -> np.ndarray:
    """One icon `(64, 64, 4)` in bytes, trimmed to what is seen of it and centred."""
    import resvg_py

    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
        f'width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    picture = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN))).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    sprite = Image.new("RGBA", (SIDE, SIDE))
    sprite.paste(reduce_picture(picture, size), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(sprite)


def reduce_picture(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Pillow weights colours by their opacity only in premultiplied form."""
    return picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def main(argv: list[str] | None = None) -> None:
    """Fetches the packages and writes the sprites."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/sprites.npz"))
    parser.add_argument("--archives", type=Path, default=Path("runs/emoji/npm"), help="where the packages are kept")
    args = parser.parse_args(argv)
    concepts = read_concepts()
    icons = {style: read_icons(fetch(package, args.archives), package) for style, package in PACKAGES.items()}
    sprites = np.zeros((len(concepts), len(PACKAGES), SIDE, SIDE, 4), np.uint8)
    for row, icon in enumerate(tqdm(concepts.values(), desc="icons")):
        for column, style in enumerate(PACKAGES):
            sprites[row, column] = draw_icon(icons[style], icon)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output, sprites=sprites, names=list(concepts), styles=list(PACKAGES))
    print(f"{args.output}: {len(concepts)} things in {len(PACKAGES)} styles")


if __name__ == "__main__":
    main()
