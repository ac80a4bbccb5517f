#!/usr/bin/env python
"""Teach CLIP to classify from few pictures with APT in both towers, or with a method that it is compared with.

    python -m apt_diffusion.miniature.tasks classification --output_dir data/classes
    accelerate launch train/train_apt_clip.py --model_name_or_path miniature-clip --data_dir data/classes \\
        --output_dir out/clip --seeds 1 2 3

The whole run stands here, from the shots to the mean over seeds; see docs/vision_language.md.
"""

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from transformers import CLIPModel

from apt_diffusion.baselines import find_method_file, method_in, save_method
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
from apt_diffusion.io.public_names import public_name
from apt_diffusion.models.clip_classifier import ClipClassifier, add_linear_classifier
from apt_diffusion.training.checkpoints import find_checkpoint
from apt_diffusion.training.methods import trained_parameters
from apt_diffusion.training.metrics import RESULTS_NAME, write_json
from apt_diffusion.training.processes import leave
from apt_diffusion.training.run_config import RunArguments
from apt_diffusion.training.session import Session
from apt_diffusion.training.vision_language.clip_arguments import RECIPES, parse_args
from apt_diffusion.training.vision_language.method import attach, set_training_mode, trained_source
from apt_diffusion.training.vision_language.models import BaseModel, find_base
from apt_diffusion.training.vision_language.optimizer import make_clip_optimizer
from apt_diffusion.training.vision_language.predict import evaluating, predict
from apt_diffusion.training.vision_language.results import card, loading_code, write_results

GROUPS = {"base_to_new": ("base", "new"), "few_shot": ("all",)}
USAGE = """
from transformers import CLIPModel
{import_line}
from apt_diffusion.models.clip_classifier import ClipClassifier
from apt_diffusion.data.processors import load_processor
from apt_diffusion.miniature import resolve_model

base = resolve_model({{base_model!r}})
model = CLIPModel.from_pretrained(base).eval()
processor = load_processor("clip", base{size})
classifier = ClipClassifier(model, processor.tokenizer, {names}, {template})
{load}
pixels = processor.image_processor(picture, return_tensors="pt").pixel_values
print(classifier.class_names[classifier(pixels).argmax()])  # texts are encoded once; any class names will do
"""


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the metrics; of several seeds their means."""
    args = parse_args(__doc__.split("\n\n")[0], argv)
    check_sources(args)
    data = load(args)
    if len(args.seeds) == 1:
        return run_seed(args, data, args.seeds[0])
    metrics = {}
    for seed in args.seeds:
        metrics[seed] = run_seed(args, data, seed)
        AcceleratorState._reset_state(reset_partial_state=True)  # the end of a run closed the process group
    return summarise(args, metrics)


def load(args: argparse.Namespace) -> Labelled:
    """The data set that the flags name; for an evaluation alone its training pictures may be missing."""
    training = not args.eval_only
    if args.dataset_name is not None:
        return read_hub(args.dataset_name, args.data_set, args.image_column, args.label_column, training)
    return read_data_set(args.data_dir, args.data_set, training)


def check_sources(args: argparse.Namespace) -> None:
    """The weights that each seed begins with must be there before the first one is trained."""
    for seed in args.seeds:
        own = of_seed(args, seed)
        if own.adapter is not None:
            find_method_file(own.adapter)
        if own.resume_from_checkpoint not in (None, "latest"):
            find_checkpoint(own.output_dir, own.resume_from_checkpoint)


def of_seed(args: RunArguments, seed: int) -> RunArguments:
    """The flags of one seed: of several, each has a folder of its own, in --output_dir and in --adapter."""
    own = copy.copy(args)
    own.seed = seed
    if len(args.seeds) > 1:
        own.output_dir = str(Path(args.output_dir, f"seed-{seed}"))
    if args.adapter is not None and Path(args.adapter, f"seed-{seed}").is_dir():
        own.adapter = str(Path(args.adapter, f"seed-{seed}"))
        own.given = args.given | {"adapter": own.adapter}
    return own


def run_seed(all_args: RunArguments, data: Labelled, seed: int) -> dict[str, float]:
    """Trains and evaluates, or only evaluates, with one seed."""
    args = of_seed(all_args, seed)
    with Session.start(args, "train_apt_clip") as session:
        base = find_base(args, {"clip": RECIPES[args.protocol]}, session.accelerator.num_processes)
        shots = few_shot(data, args.num_shots, session.seed)
        groups = {name: class_group(shots, name) for name in GROUPS[args.protocol]}
        training = next(iter(groups.values()))
        session.open_output()

        model = CLIPModel.from_pretrained(base.path, revision=base.revision, dtype=torch.float32)
        processor = load_processor("clip", base.path, args.image_size, revision=base.revision)
        template = args.template or template_of(args.data_set)
        classifier = ClipClassifier(model, processor.tokenizer, training.class_names, template, args.text_batch_size)
        for group in reversed(groups.values()):  # names that the model cannot tell apart are refused now
            classifier.set_classes(group.class_names)
        if method_to_train(session) == "classifier_only":
            add_linear_classifier(classifier.eval())
        attach(session, model)
        pictures = ClipPictures(processor.image_processor)

        def accuracy(inner: ClipClassifier, items: list[Item]) -> float:
            found = predict(session, inner, [(item, None) for item in items], pictures, lambda out: out.argmax(-1))
            return (found == torch.tensor([label for _, label in items])).double().mean().item()

        def evaluate(network: nn.Module) -> dict[str, float]:
            metrics = {}
            with evaluating(session, network, model) as inner:
                for name, group in groups.items():
                    inner.set_classes(group.class_names)
                    metrics["accuracy" if name == "all" else f"{name}_accuracy"] = accuracy(inner, group.test)
                inner.set_classes(training.class_names)
                if training.val:
                    metrics["val_accuracy"] = accuracy(inner, training.val)
            return with_harmonic_mean(metrics)

        def save(folder: Path) -> None:
            save_method(model, folder, session.header(base_model=base.name, task=session.script))

        if args.eval_only:
            network = session.accelerator.prepare_model(classifier, evaluation_mode=True)
        else:
            examples = TrainingPictures(training.train, session.seed, args.augment)
            every_steps = args.evaluation_steps
            session.plan(len(examples), lambda step: every_steps is not None and step % every_steps == 0)
            parameters = trained_parameters(model)
            optimizer, schedule = make_clip_optimizer(args, parameters, session.steps_per_epoch)
            network = session.prepare({"network": classifier}, parameters, optimizer, schedule)["network"]
            set_training_mode(model)
            if session.evaluation_due:  # the run that is resumed was stopped before it
                session.log(evaluate(network))
            for batch in session.batches(session.loader(examples, pictures)):
                with session.step():
                    session.backward(loss(network, batch))
                if session.checkpoint_due:
                    session.save_checkpoint(save)
                if session.evaluation_due:
                    session.log(evaluate(network))

        metrics = evaluate(network)
        if not args.eval_only:
            session.log(metrics)
            session.finish(save, make_card(session, base, model, metrics, training, template))
        write_results(session, model, metrics)
        session.upload()
    return metrics


def method_to_train(session: Session) -> str | None:
    """The method of the weights that are loaded, else that of the flags; `None` for the model as it is."""
    source = trained_source(session)
    if source is not None:
        return method_in(find_method_file(source))
    return None if session.args.eval_only else session.args.method


def loss(classifier: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy over the classes that are trained on."""
    return F.cross_entropy(classifier(batch["pixel_values"]), batch["labels"])


def with_harmonic_mean(found: dict[str, float]) -> dict[str, float]:
    """The metrics, with the harmonic mean of base and new accuracy where both are there."""
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
        "base_model": public_name(args.model_name_or_path),
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


def make_card(
    session: Session,
    base: BaseModel,
    model: nn.Module,
    metrics: dict[str, float],
    training: Labelled,
    template: str | list[str],
) -> dict[str, Any]:
    """What the model card says of this task."""
    args = session.args
    code = loading_code(args, base, model)
    if args.method == "classifier_only":
        code["import_line"] += "\nfrom apt_diffusion.models.clip_classifier import add_linear_classifier"
        code["load"] = f"add_linear_classifier(classifier)\n{code['load']}"
    # USAGE is formatted twice: here, and with the place of the weights.
    names, shown = (repr(value).replace("{", "{{").replace("}", "}}") for value in (training.class_names, template))
    return card(
        session,
        metrics,
        plotted=["accuracy"] if args.protocol == "few_shot" else ["base_accuracy", "new_accuracy"],
        summary=f"CLIP, trained with `{args.method}` to tell {len(training.class_names)} classes apart from "
        f"{len(training.train)} pictures, at most {args.num_shots} of each (protocol `{args.protocol}`).",
        usage=USAGE.format(names=names, template=shown, **code),
        tags=["zero-shot-image-classification", "clip"],
        pipeline_tag="zero-shot-image-classification",
    )


if __name__ == "__main__":
    main()
    leave()
