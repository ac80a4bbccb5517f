#!/usr/bin/env python
"""Teach ViLT or METER to judge sentences about two photographs (NLVR2) with APT, or with a method it is compared with.

    python -m apt_diffusion.miniature.tasks nlvr2 --output_dir data/nlvr2
    accelerate launch train/train_apt_nlvr2.py --model_name_or_path miniature-meter --data_dir data/nlvr2 \\
        --output_dir out/nlvr2 --max_train_steps 150 --init identity --hidden_dropout_prob 0 --no-augment

Here are data, model, loss and metric of the task. The flags that all tasks share, and the loop, stand in
`vl_arguments.py` and `vl_trainer.py`; see docs/vision_language.md.
"""

import argparse

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViltForImagesAndTextClassification

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
from apt_diffusion.training.vision_language.arguments import (
    MINIATURE,
    HelpFormatter,
    Recipe,
    add_shared_flags,
    check_shared,
)
from apt_diffusion.training.vision_language.models import load_model, make_inputs
from apt_diffusion.training.vision_language.predict import predict
from apt_diffusion.training.vision_language.results import loading_code
from apt_diffusion.training.vision_language.trainer import Run, Task, attach, run_task, start

RECIPES = {
    "vilt": Recipe(5e-4, 1e-4, head_lr_multiplier=1, total_batch_size=128, max_text_length=40),
    "meter": Recipe(
        1e-5, 1e-5, head_lr_multiplier=10, total_batch_size=256, max_text_length=50, cross_modal_lr_multiplier=5
    ),
    "miniature": MINIATURE,
}
MODELS = {"vilt": ViltForImagesAndTextClassification, "meter": MeterForImagesAndTextClassification}
USAGE = """
from {module} import {model_class}
{import_line}
from apt_diffusion.data.processors import load_processor
from apt_diffusion.miniature import resolve_model

base = resolve_model({{base_model!r}})
model = {model_class}.from_pretrained(
    base, modality_type_vocab_size=3, num_labels=2, ignore_mismatched_sizes=True{more}
).eval()
{load}
processor = load_processor({kind!r}, base)
inputs = processor([left, right], "Both pictures show a dog.", return_tensors="pt")
pictures = {{{{name: inputs.pop(name)[None] for name in list(inputs) if name.startswith("pixel")}}}}
print("true" if model(**inputs, **pictures).logits.argmax() else "false")
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
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
    args = parser.parse_args(argv)
    if (args.data_dir is None) == (args.dataset_name is None):
        parser.error("give --data_dir or --dataset_name")
    check_shared(args)
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    run = start(args, "train_apt_nlvr2", argv, RECIPES)
    prompt = OFFICIAL_PROMPT if args.official_prompt else ""
    statements = {split: load(args, split) for split in ("dev", "test1")}
    training = [] if args.eval_only else make_examples(load(args, "train"), prompt)
    evaluated = {split: make_examples(statements[split], prompt) for split in statements}
    settings = {"num_images": 2} if run.model_type == "vilt" else {}
    model = load_model(run, MODELS[run.model_type], num_labels=2, modality_type_vocab_size=3, **settings)
    attach(run, model)
    inputs = make_inputs(run, model, class_labels, [training, *evaluated.values()])

    def evaluate(model: nn.Module) -> dict[str, float]:
        metrics = {}
        for split, name in (("dev", "dev"), ("test1", "test_p")):
            classes = predict(run, model, unchanged(evaluated[split]), inputs, lambda output: output.logits.argmax(-1))
            found = nlvr2_accuracy(statements[split], classes.tolist())
            metrics |= {f"{name}_{metric}": value for metric, value in found.items()}
        return metrics

    return run_task(
        run,
        Task(
            model,
            TrainingStream(training, run.seed, args.augment),
            inputs,
            loss,
            evaluate,
            plotted=["dev_accuracy", "test_p_accuracy"],
            summary=f"{type(model).__name__} that judges sentences about two pictures, trained with `{args.method}` "
            f"on {len(training)} of them.",
            usage=usage(run, model),
            tags=["visual-reasoning", run.model_type],
        ),
    )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of false (0) and true (1)."""
    truth = batch.pop("labels")  # (B,)
    return F.cross_entropy(model(**batch).logits, truth)


def load(args: argparse.Namespace, split: str) -> list[Statement]:
    if args.dataset_name is not None:
        return load_hub_statements(args.dataset_name, split)
    return load_statements(args.data_dir, split)


def usage(run: Run, model: nn.Module) -> str:
    meter = run.model_type == "meter"
    return USAGE.format(
        module="apt_diffusion.models.meter" if meter else "transformers",
        model_class=type(model).__name__,
        more="" if meter else ", num_images=2",
        kind=run.model_type,
        **loading_code(run.args.method),
    )


if __name__ == "__main__":
    main()
