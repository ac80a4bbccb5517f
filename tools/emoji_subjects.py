#!/usr/bin/env python
"""Draws the training pictures of the things that the emoji model never saw.

python tools/emoji_subjects.py --sprites runs/emoji/sprites.npz    # into apt_diffusion/miniature/emoji/things
"""

import argparse
from pathlib import Path

import torch
from emoji_scenes import COLORS, LAYOUTS, Scenes, World

from apt_diffusion.miniature.emoji.subjects import GROUNDS, PROMPT, SUBJECTS, THINGS
from apt_diffusion.miniature.pictures import to_images


def main(argv: list[str] | None = None) -> None:
    """Writes five pictures of each thing, each with its caption in a `.txt` file of the same name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, default=Path("runs/emoji/sprites.npz"))
    parser.add_argument("--output_dir", type=Path, default=THINGS)
    args = parser.parse_args(argv)
    world = World(args.sprites)
    count = len(GROUNDS)
    ground = torch.tensor([[list(COLORS).index(name), -1] for name in GROUNDS])
    for seed, (name, style) in enumerate(SUBJECTS.items()):
        folder = args.output_dir / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        scenes = Scenes(
            layout=torch.full((count,), LAYOUTS.index("large")),
            concept=torch.full((count, 2), world.names.index(name)),
            style=torch.full((count, 2), world.styles.index(style)),
            pattern=torch.zeros(count, dtype=torch.long),
            ground=ground,
        )
        pictures = to_images(world.render(scenes, torch.Generator().manual_seed(seed)))
        for index, (color, picture) in enumerate(zip(GROUNDS, pictures, strict=True)):
            picture.save(folder / f"{index}-{color}.png")
            caption = f"{PROMPT.replace('a ', 'a large ', 1)} on a {color} background\n"
            (folder / f"{index}-{color}.txt").write_text(caption)


if __name__ == "__main__":
    main()
