"""Writes the tasks to disk in the layouts of VQAv2, NLVR2, Flickr30K (Karpathy's JSON) and CoOp's data sets.

Each writer fills the folder that it is given and yields after every chunk of items; `write` sees to the folder.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...io.atomic import new_folder
from ..pictures import to_images
from .captions import captions_of
from .classes import CLASSES, class_name, draw_classes
from .draw import CHUNK, drawn_chunks, split_seed
from .pairs import statement_with_pairs
from .questions import answer_kind, people_answer, questions_of

Sizes = dict[str, int]  # items of train, val, test
CLASSIFICATION_NAME = "DrawnShapes"
QUESTIONS_PER_PICTURE = 4
LICENSE = "Apache-2.0; drawn by apt_diffusion.miniature.tasks"


def write(
    task: str, folder: Path, sizes: Sizes, seed: int, progress: Callable[[int], Any] = lambda items: None
) -> None:
    """Writes a task to a new folder: to a temporary name first, so that an interrupted run leaves nothing half done.

    Args:
        task: one of `WRITERS`.
        folder: must not exist yet, or be empty.
        sizes: items of `train`, `val` and `test`.
        seed: of the training data; validation and test never change.
        progress: called with the number of items of each chunk.

    Raises:
        FileExistsError: the folder has something in it.
        ValueError: a split without items.
    """
    folder = Path(folder)
    if (folder.is_dir() and any(folder.iterdir())) or folder.is_file():
        raise FileExistsError(f"{folder} is not empty: name a new folder, or remove it first.")
    if wrong := [f"{split} {size}" for split, size in sizes.items() if size < 1]:
        raise ValueError(f"Every split needs at least one item, got {', '.join(wrong)}.")
    with new_folder(folder) as temporary:
        for items in WRITERS[task](temporary, sizes, seed):
            progress(items)


def save_json(values: Any, file: Path) -> None:
    """Writes JSON, and the folder for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


def save_jpeg(image: Image.Image, file: Path) -> None:
    """Writes a JPEG in high quality."""
    image.save(file, quality=95, subsampling=0)  # full colour resolution: colours are what is asked for


# VQAv2


def write_vqa(folder: Path, sizes: Sizes, seed: int) -> Iterator[int]:
    """Questions and annotations (ten answers each) of train2014 and val2014, questions alone of test-dev2015."""
    for split, subset, questions_name in (
        ("train", "train2014", "train2014"),
        ("val", "val2014", "val2014"),
        ("test", "test2015", "test-dev2015"),
    ):
        questions, annotations = [], []
        (folder / subset).mkdir()
        image_id = 0
        for pictures, images, rng in drawn_chunks("vqa", split, sizes[split], seed):
            for picture, image in zip(pictures, images, strict=True):
                image_id += 1
                save_jpeg(image, folder / subset / f"COCO_{subset}_{image_id:012d}.jpg")
                for number, asked in enumerate(questions_of(picture, rng, QUESTIONS_PER_PICTURE)):
                    ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
                    questions.append({**ids, "question": asked.text})
                    annotations.append({**ids, **_annotation(asked, rng)})
            yield len(pictures)
        header = {"info": {"description": "drawn questions"}, "license": {"name": LICENSE}, "data_type": "mscoco"}
        header["data_subtype"] = subset if split != "test" else questions_name
        save_json(
            {**header, "task_type": "Open-Ended", "questions": questions},
            folder / f"v2_OpenEnded_mscoco_{questions_name}_questions.json",
        )
        if split != "test":
            save_json({**header, "annotations": annotations}, folder / f"v2_mscoco_{subset}_annotations.json")


def _annotation(asked, rng) -> dict[str, Any]:
    answers = people_answer(asked.answer, rng)
    return {
        "question_type": asked.opening,
        "answer_type": answer_kind(asked.answer),
        "multiple_choice_answer": Counter(answers).most_common(1)[0][0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": index + 1}
            for index, answer in enumerate(answers)
        ],
    }


# NLVR2


def write_nlvr2(folder: Path, sizes: Sizes, seed: int) -> Iterator[int]:
    """JSON lines `data/{train,dev,test1}.json`; pictures as the official archives unpack.

    `images/train/<directory>/train-<set>-<pair>-img<side>.png`, `dev/dev-...`, `test1/test1-...`. Every sentence comes
    with two pairs, one of which it describes; identifiers are `<split>-<set>-<pair>-<sentence>`.
    """
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test1")):
        lines: list[str] = []
        for pictures, images, rng in drawn_chunks("nlvr2", split, -(-sizes[split] // CHUNK) * CHUNK, seed):
            before = len(lines)
            while len(lines) < min(before + CHUNK, sizes[split]):
                statement, *pairs = statement_with_pairs(pictures, rng)
                order = rng.sample((True, False), 2)
                for number, label in enumerate(order):
                    pair = pairs[0] if label else pairs[1]
                    set_id = len(lines) // 2
                    line: dict[str, str | int] = {
                        "sentence": statement.text,
                        "identifier": f"{name}-{set_id}-{number}-0",
                        "label": str(label),
                        "synset": statement.kind,
                        "left_url": "",
                        "right_url": "",
                    }
                    where = folder / name
                    if name == "train":
                        line["directory"] = set_id % 100
                        where = folder / "images" / "train" / str(set_id % 100)
                    where.mkdir(parents=True, exist_ok=True)
                    for side, index in enumerate(pair):
                        images[index].save(where / f"{name}-{set_id}-{number}-img{side}.png")
                    lines.append(json.dumps(line))
            yield len(lines) - before
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.json").write_text("\n".join(lines) + "\n")


# Flickr30K


def write_retrieval(folder: Path, sizes: Sizes, seed: int) -> Iterator[int]:
    """Karpathy's `dataset_flickr30k.json` and `flickr30k-images/`: five captions per picture."""
    (folder / "flickr30k-images").mkdir()
    images_json: list[dict[str, Any]] = []
    for split in ("train", "val", "test"):
        for pictures, images, rng in drawn_chunks("retrieval", split, sizes[split], seed):
            for picture, image in zip(pictures, images, strict=True):
                image_id = len(images_json)
                captions = captions_of(picture)
                filename = f"{1000000000 + image_id}.jpg"
                save_jpeg(image, folder / "flickr30k-images" / filename)
                ids = [image_id * len(captions) + number for number in range(len(captions))]
                sentences = [
                    {
                        "tokens": caption.replace(",", "").split(),
                        "raw": caption,
                        "imgid": image_id,
                        "sentid": sentence_id,
                    }
                    for caption, sentence_id in zip(rng.sample(captions, len(captions)), ids, strict=True)
                ]
                images_json.append(
                    {"sentids": ids, "imgid": image_id, "sentences": sentences, "split": split, "filename": filename}
                )
            yield len(pictures)
    save_json({"images": images_json, "dataset": "flickr30k"}, folder / "dataset_flickr30k.json")


# Classification


def write_classification(folder: Path, sizes: Sizes, seed: int) -> Iterator[int]:
    """Folders `<split>/<class_name>/` of pictures, and CoOp's `split_zhou_DrawnShapes.json` with paths to them."""
    listing: dict[str, list] = {}
    for split, size in sizes.items():
        listing[split] = []
        for chunk in range(-(-size // CHUNK)):
            generator = torch.Generator().manual_seed(split_seed("classification", split, seed, chunk))
            numbers = torch.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
            images = to_images(draw_classes(numbers % len(CLASSES), generator))
            items = [(number, image) for number, image in zip(numbers.tolist(), images, strict=True) if number < size]
            for number, image in items:
                label = number % len(CLASSES)
                path = Path(split) / class_name(label).replace(" ", "_") / f"{number:05d}.jpg"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                save_jpeg(image, folder / path)
                listing[split].append([path.as_posix(), label, class_name(label)])
            yield len(items)
    save_json(listing, folder / f"split_zhou_{CLASSIFICATION_NAME}.json")


WRITERS: dict[str, Callable[[Path, Sizes, int], Iterator[int]]] = {
    "vqa": write_vqa,
    "nlvr2": write_nlvr2,
    "retrieval": write_retrieval,
    "classification": write_classification,
}
