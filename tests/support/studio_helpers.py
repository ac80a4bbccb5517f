"""What the tests of the studio share: adapters and pictures on disk."""

import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from conftest import randomize
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train" / "train_apt_sd.py"
ANNA, BERT = "a" * 32, "b" * 32  # visitors


def make_adapter(model: Path, folder: Path, seed: int = 1, **metadata: str) -> Path:
    """An adapter that acts, as a trainer would leave it."""
    from apt_diffusion import APTConfig, StableDiffusionAPTPipeline, add_apt, save_apt_weights

    pipe = StableDiffusionAPTPipeline.from_pretrained(model)
    add_apt(pipe, APTConfig(num_prompts=4))
    randomize(pipe.unet, seed)
    randomize(pipe.text_encoder, seed)
    save_apt_weights(pipe, folder, metadata={"instance_prompt": "a sks glyph", **metadata})
    (folder / "README.md").write_text(
        "---\ntags: []\n---\n\n# A card\n\n![samples](samples/step-000002.png)\n\nText.\n"
    )
    return folder


def make_looking_adapter(kind: str, folder: Path, **metadata: str) -> Path:
    """An adapter for the embedded CLIP, or with `answers` for the embedded ViLT."""
    from transformers import CLIPModel, ViltForQuestionAnswering

    from apt_diffusion import APTConfig, add_apt, save_apt_weights
    from apt_diffusion.miniature import resolve_model

    base = resolve_model(f"miniature-{kind}")
    if kind == "clip":
        model, heads = CLIPModel.from_pretrained(base), None
    else:
        count = len(json.loads(metadata["answers"]))
        model = ViltForQuestionAnswering.from_pretrained(base, num_labels=count, ignore_mismatched_sizes=True)
        heads = ["classifier"]
    add_apt(model, APTConfig(num_prompts=4, modules_to_save=heads))
    randomize(model)
    save_apt_weights(model, folder, metadata={"base_model": f"miniature-{kind}", **metadata})
    return folder


def copy_adapter(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def picture(path: Path, width: int = 48, height: int = 40, seed: int = 0, **settings) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **settings)
    return path


def cut_off(path: Path) -> Path:
    """A picture of which only the beginning arrived."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "PNG")
    path.write_bytes(stream.getvalue()[:80])
    return path


def bomb(path: Path, side: int = 60_000) -> Path:
    """A small PNG that says that it is huge, as decompression bombs do."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)))
    return path


def disguised(path: Path) -> Path:
    path.write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    return path
