#!/usr/bin/env python
"""Teach CLIP to classify from few pictures with APT in both towers, or with a method that it is compared with.

    python -m apt_diffusion.miniature.tasks classification --output_dir data/classes
    accelerate launch train/train_apt_clip.py --model_name_or_path miniature-clip --data_dir data/classes \\
        --output_dir out/clip --seeds 1 2 3

Here are data, model, loss and metrics of the task. Its flags stand in `clip_arguments.py`, the loop in
`vl_trainer.py`; see docs/vision_language.md.
"""

import argparse
import copy
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from transformers import CLIPModel

from apt_diffusion.baselines import method_in
from apt_diffusion.data.classification import (
    Item,
    Labelled,
    class_group,
    few_shot,
    harmonic_mean,
    read_data_set,
    read_hub,
    template_of,
)
from apt_diffusion.data.crops import ClipPictures, TrainingPictures
from apt_diffusion.data.image_text import Batch
from apt_diffusion.data.processors import load_processor
from apt_diffusion.models.clip_classifier import ClipClassifier, add_linear_classifier
from apt_diffusion.training.methods import find_trained
from apt_diffusion.training.metrics import RESULTS_NAME, write_json
from apt_diffusion.training.vision_language.clip_arguments import RECIPES, make_optimizer, parse_args
from apt_diffusion.training.vision_language.predict import predict
from apt_diffusion.training.vision_language.results import loading_code
from apt_diffusion.training.vision_language.trainer import Run, Task, attach, run_task, start

GROUPS = {"base_to_new": ("base", "new"), "few_shot": ("all",)}
USAGE = """
from transformers import CLIPModel
{import_line}
from apt_diffusion.models.clip_classifier import ClipClassifier
from apt_diffusion.data.processors import load_processor
from apt_diffusion.miniature import resolve_model

base = resolve_model({{base_model!r}})
model = CLIPModel.from_pretrained(base).eval()
processor = load_processor("clip", base)
classifier = ClipClassifier(model, processor.tokenizer, {names}, {template})
{load}
pixels = processor.image_processor(picture, return_tensors="pt").pixel_values
print(classifier.class_names[classifier(pixels).argmax()])  # texts are encoded once; any class names will do
"""


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the metrics; of several seeds their means."""
    args = parse_args(__doc__.split("\n\n")[0], argv)
    data = load(args)
    if len(args.seeds) == 1:
        return run_seed(args, argv, data, args.seeds[0], Path(args.output_dir))
    metrics = {}
    for seed in args.seeds:
        metrics[seed] = run_seed(args, argv, data, seed, Path(args.output_dir, f"seed-{seed}"))
        AcceleratorState._reset_state(reset_partial_state=True)  # the end of a run closed the process group
    return summarise(args, metrics)


def load(args: argparse.Namespace) -> Labelled:
    if args.dataset_name is not None:
        return read_hub(args.dataset_name, args.data_set, args.image_column, args.label_column)
    return read_data_set(args.data_dir, args.data_set)


def run_seed(
    all_args: argparse.Namespace, argv: list[str] | None, data: Labelled, seed: int, output_dir: Path
) -> dict[str, float]:
    """Trains and evaluates with one seed."""
    args = copy.copy(all_args)
    args.seed, args.output_dir = seed, str(output_dir)
    if args.adapter is not None and Path(args.adapter, f"seed-{seed}").is_dir():
        args.adapter = str(Path(args.adapter, f"seed-{seed}"))
    run = start(args, "train_apt_clip", argv, {"clip": RECIPES[args.protocol]})
    shots = few_shot(data, args.num_shots, seed)
    groups = {name: class_group(shots, name) for name in GROUPS[args.protocol]}
    training = next(iter(groups.values()))
    model = CLIPModel.from_pretrained(run.model_path, revision=args.revision, dtype=torch.float32)
    processor = load_processor("clip", run.model_path, args.image_size, revision=args.revision)
    template = args.template or template_of(args.data_set)
    classifier = ClipClassifier(model, processor.tokenizer, training.class_names, template, args.text_batch_size)
    if method_to_train(run) == "classifier_only":
        add_linear_classifier(classifier.eval())
    attach(run, model)
    pictures = ClipPictures(processor.image_processor)

    def evaluate(classifier: nn.Module) -> dict[str, float]:
        found = {}
        for name, group in groups.items():
            classifier.set_classes(group.class_names)
            found["accuracy" if name == "all" else f"{name}_accuracy"] = accuracy(
                run, classifier, group.test, pictures
            )
        classifier.set_classes(training.class_names)
        if training.val:
            found["val_accuracy"] = accuracy(run, classifier, training.val, pictures)
        return with_harmonic_mean(found)

    return run_task(
        run,
        Task(
            model,
            TrainingPictures(training.train, seed, args.augment),
            pictures,
            loss,
            evaluate,
            plotted=["accuracy"] if args.protocol == "few_shot" else ["base_accuracy", "new_accuracy"],
            summary=f"CLIP, trained with `{args.method}` to tell {len(training.class_names)} classes apart from "
            f"{len(training.train)} pictures, at most {args.num_shots} of each (protocol `{args.protocol}`).",
            usage=usage(run, training.class_names, template),
            tags=["zero-shot-image-classification", "clip"],
            network=classifier,
            evaluates_epochs=False,
            make_optimizer=lambda parameters, steps: make_optimizer(args, parameters, steps),
        ),
    )


def method_to_train(run: Run) -> str | None:
    """That of the weights which are loaded, else the one that the flags ask for; `None` for the model as it is."""
    source = run.resumed.folder if run.resumed else run.args.adapter
    if source is not None:
        return method_in(find_trained(source))
    return None if run.args.eval_only else run.args.method


def loss(classifier: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy over the classes that are trained on."""
    return F.cross_entropy(classifier(batch["pixel_values"]), batch["labels"])


def accuracy(run: Run, classifier: nn.Module, items: list[Item], pictures: ClipPictures) -> float:
    found = predict(run, classifier, [(item, None) for item in items], pictures, lambda logits: logits.argmax(-1))
    return (found == torch.tensor([label for _, label in items])).double().mean().item()


def with_harmonic_mean(found: dict[str, float]) -> dict[str, float]:
    if "new_accuracy" not in found:
        return found
    return found | {"harmonic_mean": harmonic_mean(found["base_accuracy"], found["new_accuracy"])}


def summarise(args: argparse.Namespace, metrics: dict[int, dict[str, float]]) -> dict[str, float]:
    """`results.json` of several seeds: means, standard deviations, and each seed's own.

    The harmonic mean is that of the mean accuracies, as in published tables.
    """
    names = list(next(iter(metrics.values())))
    values = {name: [found[name] for found in metrics.values()] for name in names}
    means = with_harmonic_mean(
        {name: statistics.mean(of_seeds) for name, of_seeds in values.items() if name != "harmonic_mean"}
    )
    spread = {name: statistics.stdev(of_seeds) for name, of_seeds in values.items()}
    content = {
        "task": "clip",
        "base_model": args.model_name_or_path,
        "method": args.method,
        "protocol": args.protocol,
        "metrics": means,
        "spread": spread,
        "seeds": metrics,
    }
    if PartialState().is_main_process:
        write_json(content, Path(args.output_dir, RESULTS_NAME))
        print("\n".join(f"{name}: {means[name]:.4f} ± {spread[name]:.4f}" for name in names))
    return means


def usage(run: Run, class_names: list[str], template: str) -> str:
    code = loading_code(run.args.method)
    if run.args.method == "classifier_only":
        code["import_line"] += "\nfrom apt_diffusion.models.clip_classifier import add_linear_classifier"
        code["load"] = f"add_linear_classifier(classifier)\n{code['load']}"
    names, template = (repr(value).replace("{", "{{").replace("}", "}}") for value in (class_names, template))
    return USAGE.format(names=names, template=template, **code)  # to be formatted once more


if __name__ == "__main__":
    main()
