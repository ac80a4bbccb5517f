"""Tiny ViLT and METER folders, tiny data sets in the official layouts, trainers run inside the test process."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import NO_DROPOUT, make_tokenizer, meter_config
from PIL import Image
from safetensors.torch import load_file

TRAIN = Path(__file__).parents[2] / "train"
sys.path.insert(0, str(TRAIN))

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230)}
VOCAB = 514


# Models


def make_vilt_folder(folder: Path) -> Path:
    from transformers import ViltConfig, ViltImageProcessorPil, ViltModel, ViltProcessor

    torch.manual_seed(0)
    config = ViltConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=32, patch_size=16, max_position_embeddings=40, **NO_DROPOUT,
    )  # fmt: skip
    ViltModel(config).save_pretrained(folder)
    image_processor = ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=16)
    tokenizer = make_tokenizer(folder)
    tokenizer.cls_token = tokenizer.bos_token  # as BERT's
    ViltProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def make_meter_folder(folder: Path) -> Path:
    from transformers import CLIPImageProcessorPil

    from apt_diffusion.models.meter import MeterModel, MeterProcessor

    torch.manual_seed(0)
    config = meter_config()
    config.text_config.vocab_size, config.text_config.hidden_size = VOCAB, config.hidden_size
    config.text_config.num_attention_heads = 4
    MeterModel(config).save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = make_tokenizer(folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.text_config.pad_token_id)  # RoBERTa's is 1
    MeterProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def make_clip_folder(folder: Path) -> Path:
    from support.families import make_clip
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    torch.manual_seed(0)
    make_clip().save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor, make_tokenizer(folder)).save_pretrained(folder)
    return folder


MODELS = {"vilt": make_vilt_folder, "meter": make_meter_folder}


# Data


def picture(color: str, seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    return Image.fromarray((np.array(COLORS[color]) + noise).clip(0, 255).astype(np.uint8))


def make_vqa_folder(folder: Path, train: int = 12, val: int = 6, test: int = 3) -> Path:
    """Which colour? With ten answers of which some are wrong; plus one question that nobody could answer well."""
    question_id = 0
    for subset, pictures, count in (
        ("train2014", "train2014", train), ("val2014", "val2014", val), ("test-dev2015", "test2015", test),
    ):  # fmt: skip
        (folder / pictures).mkdir(parents=True)
        questions, annotations = [], []
        for index in range(count):
            color = list(COLORS)[index % 3]
            picture(color, index, (24, 16) if index % 2 else (16, 20)).save(
                folder / pictures / f"COCO_{pictures}_{index:012d}.jpg", quality=95
            )
            others = ["yellow"] * (index % 4)
            answers = [color] * (10 - len(others)) + others
            if index == 4:
                color, answers = "mauve", [f"shade {number}" for number in range(10)]
            question_id += 1
            ids = {"image_id": index, "question_id": question_id}
            questions.append({**ids, "question": f"what color {index % 2}"})
            annotations.append(
                {
                    **ids, "question_type": "what", "answer_type": ("other", "number")[index % 2],
                    "multiple_choice_answer": color,
                    "answers": [{"answer": a, "answer_id": n + 1} for n, a in enumerate(answers)],
                }
            )  # fmt: skip
        (folder / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(json.dumps({"questions": questions}))
        if pictures != "test2015":
            (folder / f"v2_mscoco_{subset}_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def make_nlvr2_folder(folder: Path, train: int = 12, dev: int = 6, test: int = 6) -> Path:
    """Do both pictures have the same colour?"""
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", train), ("dev", dev), ("test1", test)):
        lines = []
        for index in range(count):
            same = index % 2 == 0
            line = {
                "sentence": f"the color is the same {index // 2 % 2}", "identifier": f"{split}-{index // 4}-{index}-0",
                "label": str(same),
            }  # fmt: skip
            where = folder / split
            if split == "train":
                line["directory"] = index % 2
                where = folder / "images" / "train" / str(index % 2)
            where.mkdir(parents=True, exist_ok=True)
            left = list(COLORS)[index % 3]
            right = left if same else list(COLORS)[(index + 1) % 3]
            for side, color in enumerate((left, right)):
                picture(color, 10 * index + side).save(where / f"{split}-{index // 4}-{index}-img{side}.png")
            lines.append(json.dumps(line))
        (folder / "data" / f"{split}.json").write_text("\n".join(lines) + "\n")
    return folder


def make_retrieval_folder(folder: Path, train: int = 8, test: int = 4) -> Path:
    """Flickr30K's layout: coloured pictures, two captions each."""
    (folder / "flickr30k-images").mkdir(parents=True)
    images = []
    for split, count in (("train", train), ("test", test)):
        for index in range(count):
            color, name = list(COLORS)[index % 3], f"{split}{index}.jpg"
            size = (24, 16) if index % 2 else (16, 20)
            picture(color, index, size).save(folder / "flickr30k-images" / name, quality=95)
            sentences = [{"raw": f"{color} {split} {index} {word}"} for word in ("a", "b")]
            images.append({"filename": name, "split": split, "sentences": sentences})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    return folder


def make_classes_folder(folder: Path) -> Path:
    """CoOp's layout: three colours, wide and tall. Three base classes, three new ones."""
    rows: dict[str, list] = {"train": [], "val": [], "test": []}
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for label in range(6):
            for index in range(count):
                path = f"{split}/{label}-{index}.png"
                (folder / "images" / split).mkdir(parents=True, exist_ok=True)
                size = (24, 16) if label < 3 else (16, 40)
                picture(list(COLORS)[label % 3], 10 * label + index, size).save(folder / "images" / path)
                rows[split].append([path, label, f"{list(COLORS)[label % 3]}_{'wide' if label < 3 else 'tall'}"])
    (folder / "split_zhou_Colors.json").write_text(json.dumps(rows))
    return folder


# Running


def own_size(model) -> int | None:
    """Shorter side of the pictures that a folder's processor makes; recipes have 384 pixels, too many for tests."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (Path(model) / name).is_file():
            content = json.loads((Path(model) / name).read_text())
            return content.get("image_processor", content)["size"]["shortest_edge"]
    return None


def words(model, data, output, **flags) -> list[str]:
    """A command line of tiny sizes; `True` is a bare flag, `None` leaves one out."""
    defaults = {
        "model_name_or_path": model, "data_dir": data, "output_dir": output, "num_prompts": 4, "rank": 2,
        "bottleneck": 3, "train_batch_size": 2, "gradient_accumulation_steps": 1, "max_train_steps": 2,
        "eval_batch_size": 4, "learning_rate": 1e-2, "seed": 0, "report_to": "none", "image_size": own_size(model),
    }  # fmt: skip
    result = []
    for name, value in (defaults | flags).items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [value]
        result += [f"--{name}"] + ([] if value is True else [str(v) for v in values])
    return result


def train(script: str, model, data, output, **flags) -> Path:
    """Runs `main` of `train_apt_<script>.py`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    importlib.import_module(f"train_apt_{script}").main(words(model, data, output, **flags))
    return Path(output)


def results(folder) -> dict:
    return json.loads((Path(folder) / "results.json").read_text())


def weights(folder) -> dict[str, torch.Tensor]:
    (file,) = (path for path in Path(folder).glob("pytorch_*_weights.safetensors"))
    return load_file(file)


def assert_same_weights(first, second) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), f"{key} differs by {(a[key] - b[key]).abs().max():.2e}"


def rows(folder, name: str = "losses.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def card_code(folder, model) -> str:
    """The Python of a run's card, with the real folders in place of the placeholders."""
    code = (Path(folder) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for place in (Path(folder), Path(model)):
        assert f"'path/to/{place.name}'" in code
        code = code.replace(f"'path/to/{place.name}'", repr(str(place)))
    return code
