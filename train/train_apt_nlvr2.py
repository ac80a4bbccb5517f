#!/usr/bin/env python
"""Teach ViLT or METER to judge sentences about two photographs (NLVR2) with APT, or with a method it is compared with.

    python -m apt_diffusion.miniature.tasks nlvr2 --output_dir data/nlvr2
    accelerate launch train/train_apt_nlvr2.py --model_name_or_path miniature-meter --data_dir data/nlvr2 \\
        --output_dir out/nlvr2 --max_train_steps 150 --init identity --hidden_dropout_prob 0 --no-augment

The whole run stands here, from the statements to the results; see docs/vision_language.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViltForImagesAndTextClassification

from apt_diffusion.baselines import save_method
from apt_diffusion.data.image_text import Batch, TrainingStream, class_labels, unchanged
from apt_diffusion.data.nlvr2 import (
    OFFICIAL_PROMPT,
    Statement,
    load_hub_statements,
    load_statements,
    make_examples,
    nlvr2_accuracy,
)
from apt_diffusion.models.meter import MeterForImagesAndTextClassification
from apt_diffusion.training import run_config
from apt_diffusion.training.methods import trained_parameters
from apt_diffusion.training.processes import leave
from apt_diffusion.training.run_config import RunArguments
from apt_diffusion.training.session import Session
from apt_diffusion.training.vision_language.arguments import HelpFormatter, add_shared_flags, check_shared
from apt_diffusion.training.vision_language.inputs import make_inputs
from apt_diffusion.training.vision_language.method import attach, set_training_mode, trained_source
from apt_diffusion.training.vision_language.models import (
    BaseModel,
    find_base,
    load_model,
    take_over_classifier_token,
)
from apt_diffusion.training.vision_language.optimizer import make_optimizer
from apt_diffusion.training.vision_language.predict import evaluating, predict
from apt_diffusion.training.vision_language.recipes import MINIATURE, Recipe
from apt_diffusion.training.vision_language.results import card, loading_code, write_results

RECIPES = {
    "vilt": Recipe(
        5e-4, 1e-4, head_lr_multiplier=1, total_batch_size=128, max_text_length=40, image_size=384
    ),
    "meter": Recipe(
        1e-5, 1e-5, head_lr_multiplier=10, total_batch_size=256, max_text_length=50, image_size=288,
        cross_modal_lr_multiplier=5,
    ),
    "miniature": MINIATURE,
}  # fmt: skip
MODELS = {"vilt": ViltForImagesAndTextClassification, "meter": MeterForImagesAndTextClassification}
SPLITS = {"dev": "dev", "test1": "test_p"}  # that are evaluated: file, name of its metrics
USAGE = """
from {module} import {model_class}
{import_line}
from apt_diffusion.data.processors import load_processor
from apt_diffusion.miniature import resolve_model

base = resolve_model({{base_model!r}})
model = {model_class}.from_pretrained(
    base, modality_type_vocab_size=3, num_labels=2, ignore_mismatched_sizes=True{images}{settings}
).eval()
{load}
processor = load_processor({kind!r}, base{size})
inputs = processor([left, right], "{prompt}Both pictures show a dog.", return_tensors="pt")
pictures = {{{{name: inputs.pop(name)[None] for name in list(inputs) if name.startswith("pixel")}}}}
print("true" if model(**inputs, **pictures).logits.argmax() else "false")
"""


def parse_args(argv: list[str] | None = None) -> RunArguments:
    """The flags, checked as far as they can be without data and model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    add_shared_flags(parser, RECIPES)
    add = parser.add_argument_group("NLVR2").add_argument
    add(
        "--data_dir",
        help="Folder with train.json, dev.json, test1.json (or in data/) and the official picture folders.",
    )
    add("--dataset_name", help="In place of --data_dir: a data set of the hub (sentence, label, left_image, ...).")
    add(
        "--official_prompt",
        action="store_true",
        help=f"Put {OFFICIAL_PROMPT!r} before every sentence, as APT's released code for ViLT does. It costs 7 of 40 "
        "tokens; ViLT's and METER's own code do not have it.",
    )
    args = run_config.parse_args(parser, argv)
    if (args.data_dir is None) == (args.dataset_name is None):
        parser.error("give --data_dir or --dataset_name")
    check_shared(args)
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains and evaluates, or only evaluates. Returns the metrics."""
    args = parse_args(argv)
    with Session.start(args, "train_apt_nlvr2") as session:
        base = find_base(args, RECIPES, session.accelerator.num_processes)

        prompt = OFFICIAL_PROMPT if args.official_prompt else ""
        statements = {split: load(args, split) for split in SPLITS}
        tested = {split: make_examples(statements[split], prompt) for split in SPLITS}
        training = [] if args.eval_only else make_examples(load(args, "train"), prompt)
        session.open_output()

        take_over_classifier_token(args, trained_source(session))
        settings = {"num_images": 2} if base.model_type == "vilt" else {}
        settings |= {"num_labels": 2, "modality_type_vocab_size": 3}
        model = load_model(args, base, session.seed, MODELS[base.model_type], **settings)
        attach(session, model)
        inputs = make_inputs(session, base, model, class_labels, [training, *tested.values()])

        def evaluate(network: nn.Module) -> dict[str, float]:
            metrics = {}
            with evaluating(session, network, model) as inner:
                for split, name in SPLITS.items():
                    classes = predict(
                        session, inner, unchanged(tested[split]), inputs, lambda output: output.logits.argmax(-1)
                    )
                    found = nlvr2_accuracy(statements[split], classes.tolist())
                    metrics |= {f"{name}_{metric}": value for metric, value in found.items()}
            return metrics

        def save(folder: Path) -> None:
            save_method(model, folder, session.header(base_model=base.name, task=session.script))

        if args.eval_only:
            network = session.accelerator.prepare_model(model, evaluation_mode=True)
        else:
            examples = TrainingStream(training, session.seed, args.augment)
            session.plan(len(examples), lambda step: step % args.evaluation_steps == 0)
            args.evaluation_steps = args.evaluation_steps or session.steps_per_epoch
            parameters = trained_parameters(model)
            network = session.prepare({"model": model}, parameters, *make_optimizer(args, parameters))["model"]
            set_training_mode(model)
            if session.evaluation_due:  # the run that is resumed was stopped before it
                session.log(evaluate(network))
            for batch in session.batches(session.loader(examples, inputs)):
                with session.step():
                    session.backward(loss(network, batch))
                if session.checkpoint_due:
                    session.save_checkpoint(save)
                if session.evaluation_due:
                    session.log(evaluate(network))

        metrics = evaluate(network)
        if not args.eval_only:
            session.log(metrics)
            session.finish(save, make_card(session, base, model, metrics, len(training)))
        write_results(session, model, metrics)
        session.upload()
    return metrics


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of false (0) and true (1)."""
    truth = batch.pop("labels")  # (B,)
    return F.cross_entropy(model(**batch).logits, truth)


def load(args: argparse.Namespace, split: str) -> list[Statement]:
    """The statements of a split, from the place that the flags name."""
    if args.dataset_name is not None:
        return load_hub_statements(args.dataset_name, split)
    return load_statements(args.data_dir, split)


def make_card(
    session: Session, base: BaseModel, model: nn.Module, metrics: dict[str, float], num_statements: int
) -> dict[str, Any]:
    """What the model card says of this task."""
    args = session.args
    images = ", num_images=2" if base.model_type == "vilt" else ""
    prompt = OFFICIAL_PROMPT if args.official_prompt else ""
    return card(
        session,
        metrics,
        plotted=["dev_accuracy", "test_p_accuracy"],
        summary=f"{type(model).__name__} that judges sentences about two pictures, trained with `{args.method}` on "
        f"{num_statements} of them.",
        usage=USAGE.format(**loading_code(args, base, model), images=images, prompt=prompt),
        tags=["visual-reasoning", base.model_type],
    )


if __name__ == "__main__":
    main()
    leave()
