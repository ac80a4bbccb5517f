#!/usr/bin/env python
"""Teach ViLT or METER to find pictures by captions and captions by pictures (Flickr30K, COCO) with APT, or a method
that it is compared with.

    python -m apt_diffusion.miniature.tasks retrieval --output_dir data/flickr30k
    accelerate launch train/train_apt_retrieval.py --model_name_or_path miniature-vilt \\
        --data_dir data/flickr30k --output_dir out/retrieval --max_train_steps 150 \\
        --init identity --hidden_dropout_prob 0 --no-augment --max_evaluation_images 100

The whole run stands here, from the captions to recall; see docs/vision_language.md.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViltForImageAndTextRetrieval

from apt_diffusion.baselines import save_method
from apt_diffusion.data.image_text import Batch, Example
from apt_diffusion.data.nlvr2 import OFFICIAL_PROMPT
from apt_diffusion.data.retrieval import (
    EVALUATION_SPLITS,
    TRAIN_SPLITS,
    RetrievalData,
    RetrievalInputs,
    RetrievalSplit,
    find_karpathy,
    first_images,
    read_hub,
    read_karpathy,
)
from apt_diffusion.models.meter import MeterForImageAndTextRetrieval
from apt_diffusion.models.retrieval import (
    MATCHING_HEAD_NAME,
    RANKS,
    RankingObjective,
    load_matching_head,
    recall,
)
from apt_diffusion.training import run_config
from apt_diffusion.training.methods import trained_parameters
from apt_diffusion.training.processes import leave
from apt_diffusion.training.run_config import RunArguments
from apt_diffusion.training.session import Session
from apt_diffusion.training.vision_language.arguments import (
    HelpFormatter,
    add_shared_flags,
    check_shared,
    positive_int,
)
from apt_diffusion.training.vision_language.inputs import make_inputs
from apt_diffusion.training.vision_language.method import attach, set_training_mode, trained_source
from apt_diffusion.training.vision_language.models import (
    BaseModel,
    find_base,
    load_model,
    take_over_classifier_token,
)
from apt_diffusion.training.vision_language.optimizer import make_optimizer
from apt_diffusion.training.vision_language.predict import evaluating
from apt_diffusion.training.vision_language.recipes import MINIATURE, SOURCE, Recipe
from apt_diffusion.training.vision_language.results import card, loading_code, write_results
from apt_diffusion.training.vision_language.scoring import score_split

RECIPES = {
    "vilt": Recipe(
        5e-4, 1e-4, head_lr_multiplier=1, total_batch_size=256, max_text_length=40, image_size=384
    ),
    "meter": Recipe(
        5e-5, 5e-6, head_lr_multiplier=1, total_batch_size=512, max_text_length=40, image_size=384,
        cross_modal_lr_multiplier=5,
    ),
    "miniature": replace(MINIATURE, head_lr_multiplier=1, total_batch_size=8),
}  # fmt: skip
MODELS = {"vilt": ViltForImageAndTextRetrieval, "meter": MeterForImageAndTextRetrieval}
USAGE = """
from {module} import {model_class}
{import_line}
from apt_diffusion.data.processors import load_processor
from apt_diffusion.miniature import resolve_model

base = resolve_model({{base_model!r}})
model = {model_class}.from_pretrained(base{settings}).eval()
{load}
inputs = load_processor({kind!r}, base{size})(picture, "{prefix}two dogs in the snow", return_tensors="pt")
print(model(**inputs).logits)  # how well they fit: to be compared with other pictures and captions
"""


def parse_args(argv: list[str] | None = None) -> RunArguments:
    """The flags, checked as far as they can be without data and model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    add_shared_flags(parser, RECIPES)
    # A picture is read with 16 captions: the released scripts take 4 pictures (ViLT) or 2 (METER) at a time.
    parser.set_defaults(train_batch_size=4)
    add = parser.add_argument_group("retrieval").add_argument
    add("--data_dir", help="Folder with Karpathy's dataset_flickr30k.json or dataset_coco.json.")
    add("--image_dir", help="Folder of the pictures, if it is not in --data_dir: COCO's has train2014 and val2014.")
    add("--dataset_name", help="In place of --data_dir: a data set of the hub, a row for each picture or caption.")
    add("--image_column", default="image", help="With --dataset_name: column of the pictures.")
    add("--caption_column", default="caption", help="With --dataset_name: column of the captions.")
    add(
        "--train_splits",
        nargs="+",
        default=list(TRAIN_SPLITS),
        choices=[*TRAIN_SPLITS, "val"],
        help="Karpathy's splits to train on; COCO has `restval`. Published Flickr30K results train on `val`, too.",
    )
    add(
        "--evaluation_splits",
        nargs="+",
        default=["test"],
        choices=EVALUATION_SPLITS,
        help="What recall is measured on; of several each with its name before the metrics'.",
    )
    add(
        "--max_evaluation_images",
        type=positive_int,
        help="Measure recall among the first so many pictures. All if not set: the 1,000 pictures and 5,000 captions "
        "of Flickr30K are 5 million passes through the model. Fewer pictures are easier to tell apart.",
    )
    add("--num_false_captions", type=positive_int, default=15, help=f"Per picture of training; 15 in {SOURCE}.")
    add(
        "--matching_loss_weight",
        type=float,
        default=0.0,
        help="Weight of the loss of the pre-trained matching head, which stays frozen and must lie beside the model "
        "(matching_head.safetensors, from the conversion of an official checkpoint). Both official configs say 0.5; "
        "ViLT's code leaves the loss out.",
    )
    add(
        "--official_matching_loss",
        action="store_true",
        help="As the released code for METER does: add that loss whole, whatever its config says.",
    )
    add(
        "--official_false_captions",
        action="store_true",
        help="As the released code does: draw false captions from all, the picture's own included.",
    )
    add(
        "--official_prefix",
        action="store_true",
        help=f"As the released code for ViLT does: put {OFFICIAL_PROMPT!r} before every caption but the false ones of "
        "training. The true one can then be told by it: training looks better than it is.",
    )
    args = run_config.parse_args(parser, argv)
    if (args.data_dir is None) == (args.dataset_name is None):
        parser.error("give --data_dir or --dataset_name")
    if args.official_matching_loss:
        if args.matching_loss_weight not in (0.0, 1.0):
            parser.error("--official_matching_loss means a --matching_loss_weight of 1")
        args.matching_loss_weight = 1.0
    if args.matching_loss_weight < 0:
        parser.error("--matching_loss_weight must not be negative")
    check_shared(args)
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains and evaluates, or only evaluates. Returns the metrics."""
    args = parse_args(argv)
    with Session.start(args, "train_apt_retrieval") as session:
        base = find_base(args, RECIPES, session.accelerator.num_processes)
        matching_head = find_matching_head(args, base)

        prefix = OFFICIAL_PROMPT if args.official_prefix else ""
        tested = {
            split: first_images(load(args, (split,)), args.max_evaluation_images) for split in args.evaluation_splits
        }
        training = RetrievalSplit.empty() if args.eval_only else load(args, args.train_splits)
        examples = None if args.eval_only else make_examples(args, session.seed, training)
        session.open_output()

        take_over_classifier_token(args, trained_source(session))
        model = load_model(args, base, session.seed, MODELS[base.model_type])
        attach(session, model)
        objective = RankingObjective(model, matching_head, args.matching_loss_weight)
        every = [pairs(training, ""), *(pairs(split, prefix) for split in (training, *tested.values()))]
        inputs = make_inputs(session, base, model, torch.tensor, every)

        def evaluate(network: nn.Module) -> dict[str, float]:
            metrics = {}
            with evaluating(session, network, model) as inner:
                for name, split in tested.items():
                    found = recall(score_split(session, inner.model, inputs, split, prefix), split.image_of)
                    metrics |= {mark(args, name) + metric: value for metric, value in found.items()}
            return metrics

        def save(folder: Path) -> None:
            save_method(model, folder, session.header(base_model=base.name, task=session.script))

        if args.eval_only:
            network = session.accelerator.prepare_model(objective, evaluation_mode=True)
        else:
            # Scoring all pairs takes longer than many epochs: only where the flags ask for it.
            every_steps = args.evaluation_steps
            session.plan(len(examples), lambda step: every_steps is not None and step % every_steps == 0)
            parameters = trained_parameters(model)
            network = session.prepare({"network": objective}, parameters, *make_optimizer(args, parameters))["network"]
            set_training_mode(model)
            collate = RetrievalInputs(inputs, with_matched=matching_head is not None)
            if session.evaluation_due:  # the run that is resumed was stopped before it
                session.log(evaluate(network))
            for batch in session.batches(session.loader(examples, collate)):
                with session.step():
                    session.backward(loss(network, batch))
                if session.checkpoint_due:
                    session.save_checkpoint(save)
                if session.evaluation_due:
                    session.log(evaluate(network))

        metrics = evaluate(network)
        if not args.eval_only:
            session.log(metrics)
            session.finish(save, make_card(session, base, model, metrics, training, list(tested.values())[-1]))
        write_results(session, model, metrics)
        session.upload()
    return metrics


def loss(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the true caption among the false ones, and what `RankingObjective` adds."""
    matched = {name.removeprefix("matched."): batch.pop(name) for name in list(batch) if name.startswith("matched.")}
    is_match = batch.pop("is_match", None)
    images = {name: batch.pop(name) for name in ("pixel_values", "pixel_mask", "image_embeds") if name in batch}
    return network(images, batch, matched or None, is_match)


def load(args: argparse.Namespace, splits: Sequence[str]) -> RetrievalSplit:
    """Pictures and captions of some splits, from the place that the flags name."""
    if args.dataset_name is not None:
        return read_hub(args.dataset_name, splits, args.image_column, args.caption_column)
    annotations, image_dir = find_karpathy(args.data_dir, args.image_dir)
    return read_karpathy(annotations, image_dir, splits)


def make_examples(args: argparse.Namespace, seed: int, split: RetrievalSplit) -> RetrievalData:
    """Pictures with true and false captions, by position in the stream of training."""
    return RetrievalData(
        split, seed, args.augment, args.num_false_captions, args.official_false_captions, args.official_prefix
    )


def find_matching_head(args: argparse.Namespace, base: BaseModel) -> nn.Linear | None:
    """The pre-trained head of image-text matching, where the flags ask for its loss."""
    if args.matching_loss_weight == 0 or args.eval_only:
        return None
    head = load_matching_head(base.path, revision=base.revision)
    if head is None:
        raise ValueError(
            f"--matching_loss_weight needs {MATCHING_HEAD_NAME} beside {base.name}: the conversion of an official "
            "pre-training checkpoint writes it."
        )
    return head


def pairs(split: RetrievalSplit, prefix: str) -> list[Example]:
    """Every caption with its picture: all that the model will read."""
    return [
        Example(prefix + caption, (split.images[image],), None)
        for caption, image in zip(split.captions, split.image_of, strict=True)
    ]


def mark(args: argparse.Namespace, split: str) -> str:
    """What stands before the names of a split's metrics: nothing, where there is one split only."""
    return f"{split}_" if len(args.evaluation_splits) > 1 else ""


def make_card(
    session: Session,
    base: BaseModel,
    model: nn.Module,
    metrics: dict[str, float],
    training: RetrievalSplit,
    tested: RetrievalSplit,
) -> dict[str, Any]:
    """What the model card says of this task."""
    args, last = session.args, session.args.evaluation_splits[-1]
    return card(
        session,
        metrics,
        plotted=[f"{mark(args, last)}{way}_recall@{k}" for way in ("text", "image") for k in RANKS[:2]],
        summary=f"{type(model).__name__} for image-text retrieval, trained with `{args.method}` on "
        f"{len(training.images)} pictures with {len(training.captions)} captions. Recall is measured among "
        f"{len(tested.images)} pictures with {len(tested.captions)} captions ({last}).",
        usage=USAGE.format(**loading_code(args, base, model), prefix=OFFICIAL_PROMPT if args.official_prefix else ""),
        tags=["image-text-retrieval", base.model_type],
    )


if __name__ == "__main__":
    main()
    leave()
