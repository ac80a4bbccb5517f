#!/usr/bin/env python
"""Teach ViLT or METER to find pictures by captions and captions by pictures (Flickr30K, COCO) with APT, or a method
that it is compared with.

    python -m apt_diffusion.miniature.tasks retrieval --output_dir data/flickr30k
    accelerate launch train/train_apt_retrieval.py --model_name_or_path miniature-vilt \\
        --data_dir data/flickr30k --output_dir out/retrieval --max_train_steps 150 \\
        --init identity --hidden_dropout_prob 0 --no-augment --max_evaluation_images 100

Here are data, model, loss and metrics of the task. The flags that all tasks share, and the loop, stand in
`vl_arguments.py` and `vl_trainer.py`; see docs/vision_language.md.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViltForImageAndTextRetrieval

from apt_diffusion.data.image_text import Batch, Example, ModelInputs
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
    score_all_pairs,
)
from apt_diffusion.training.loading import make_loader
from apt_diffusion.training.vision_language.arguments import (
    MINIATURE,
    SOURCE,
    HelpFormatter,
    Recipe,
    add_shared_flags,
    check_shared,
    positive_int,
)
from apt_diffusion.training.vision_language.models import load_model, make_inputs
from apt_diffusion.training.vision_language.predict import gather_by_index, to_device
from apt_diffusion.training.vision_language.results import loading_code
from apt_diffusion.training.vision_language.trainer import Run, Task, attach, run_task, start

RECIPES = {
    "vilt": Recipe(5e-4, 1e-4, head_lr_multiplier=1, total_batch_size=256, max_text_length=40),
    "meter": Recipe(
        5e-5, 5e-6, head_lr_multiplier=1, total_batch_size=512, max_text_length=40, cross_modal_lr_multiplier=5
    ),
    "miniature": replace(MINIATURE, head_lr_multiplier=1, total_batch_size=8),
}
MODELS = {"vilt": ViltForImageAndTextRetrieval, "meter": MeterForImageAndTextRetrieval}
IMAGES_PER_BATCH = 16  # that evaluation encodes together
USAGE = """
from {module} import {model_class}
{import_line}
from apt_diffusion.data.processors import load_processor
from apt_diffusion.miniature import resolve_model

base = resolve_model({{base_model!r}})
model = {model_class}.from_pretrained(base).eval()
{load}
inputs = load_processor({kind!r}, base)(picture, "two dogs in the snow", return_tensors="pt")
print(model(**inputs).logits)  # how well they fit: to be compared with other pictures and captions
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    add_shared_flags(parser, RECIPES)
    # A picture is read with 16 captions: the released scripts take 4 pictures (ViLT) or 2 (METER) at a time.
    parser.set_defaults(train_batch_size=4)
    add = parser.add_argument_group("retrieval").add_argument
    add("--data_dir", help="Folder with Karpathy's dataset_flickr30k.json or dataset_coco.json.")
    add("--image_dir", help="Folder of the pictures, if it is not in --data_dir: COCO's has train2014 and val2014.")
    add("--dataset_name", help="In place of --data_dir: a data set of the hub, one row per picture.")
    add("--image_column", default="image", help="With --dataset_name: column of the pictures.")
    add("--caption_column", default="caption", help="With --dataset_name: column of the lists of captions.")
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
    args = parser.parse_args(argv)
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
    args = parse_args(argv)
    run = start(args, "train_apt_retrieval", argv, RECIPES)
    tested = {
        split: first_images(load(args, (split,)), args.max_evaluation_images) for split in args.evaluation_splits
    }
    training = RetrievalSplit.empty() if args.eval_only else load(args, args.train_splits)
    examples = [] if args.eval_only else make_examples(run, training)
    head = find_matching_head(run)
    model = load_model(run, MODELS[run.model_type])
    attach(run, model)
    prefix = OFFICIAL_PROMPT if args.official_prefix else ""
    every = [pairs(training, ""), *(pairs(split, prefix) for split in (training, *tested.values()))]
    inputs = make_inputs(run, model, torch.tensor, every)

    def evaluate(network: nn.Module) -> dict[str, float]:
        found = {}
        for name, split in tested.items():
            mark = f"{name}_" if len(tested) > 1 else ""
            metrics = recall(score_split(run, network.model, inputs, split, prefix), split.image_of)
            found |= {mark + metric: value for metric, value in metrics.items()}
        return found

    last, mark = list(tested.values())[-1], f"{args.evaluation_splits[-1]}_" if len(tested) > 1 else ""
    return run_task(
        run,
        Task(
            model,
            examples,
            RetrievalInputs(inputs, with_matched=head is not None),
            loss,
            evaluate,
            plotted=[f"{mark}{way}_recall@{k}" for way in ("text", "image") for k in RANKS[:2]],
            summary=f"{type(model).__name__} for image-text retrieval, trained with `{args.method}` on "
            f"{len(training.images)} pictures with {len(training.captions)} captions. Recall is measured among "
            f"{len(last.images)} pictures with {len(last.captions)} captions ({args.evaluation_splits[-1]}).",
            usage=usage(run, model),
            tags=["image-text-retrieval", run.model_type],
            evaluates_epochs=False,  # scoring all pairs takes longer than many epochs
            network=RankingObjective(model, head, args.matching_loss_weight),
        ),
    )


def make_examples(run: Run, split: RetrievalSplit) -> RetrievalData:
    args = run.args
    return RetrievalData(
        split, run.seed, args.augment, args.num_false_captions, args.official_false_captions, args.official_prefix
    )


def loss(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the true caption among the false ones, and what `RankingObjective` adds."""
    matched = {name.removeprefix("matched."): batch.pop(name) for name in list(batch) if name.startswith("matched.")}
    is_match = batch.pop("is_match", None)
    images = {name: batch.pop(name) for name in ("pixel_values", "pixel_mask", "image_embeds") if name in batch}
    return network(images, batch, matched or None, is_match)


def load(args: argparse.Namespace, splits: Sequence[str]) -> RetrievalSplit:
    if args.dataset_name is not None:
        return read_hub(args.dataset_name, splits, args.image_column, args.caption_column)
    annotations, image_dir = find_karpathy(args.data_dir, args.image_dir)
    return read_karpathy(annotations, image_dir, splits)


def find_matching_head(run: Run) -> nn.Linear | None:
    """The pre-trained one, where the flags ask for its loss."""
    if run.args.matching_loss_weight == 0 or run.args.eval_only:
        return None
    head = load_matching_head(run.model_path, revision=run.args.revision)
    if head is None:
        raise ValueError(
            f"--matching_loss_weight needs {MATCHING_HEAD_NAME} beside {run.args.model_name_or_path}: the conversion "
            "of an official pre-training checkpoint writes it."
        )
    return head


def pairs(split: RetrievalSplit, prefix: str) -> list[Example]:
    """Every caption with its picture: all that the model will read."""
    return [
        Example(prefix + caption, (split.images[image],), None)
        for caption, image in zip(split.captions, split.image_of, strict=True)
    ]


def score_split(run: Run, model: nn.Module, inputs: ModelInputs, split: RetrievalSplit, prefix: str) -> Tensor:
    """Scores of all pairs `(I, C)`; the processes share the pictures."""
    accelerator, size = run.accelerator, run.args.eval_batch_size
    own = range(accelerator.process_index, len(split.images), accelerator.num_processes)
    batches = [range(len(own))[start : start + IMAGES_PER_BATCH] for start in range(0, len(own), IMAGES_PER_BATCH)]
    pictures = make_loader(
        [(split.images[image], None) for image in own], batches, inputs.pictures, run.args.dataloader_num_workers
    )
    captions = [prefix + caption for caption in split.captions]
    texts = [inputs.texts(captions[start : start + size]) for start in range(0, len(captions), size)]
    torch.manual_seed(run.seed)  # ViLT shuffles its patches
    with (
        accelerator.autocast(),
        tqdm(total=len(own) * len(captions), desc="pairs", disable=not accelerator.is_local_main_process) as bar,
    ):
        scores = score_all_pairs(
            model,
            (to_device(batch, accelerator.device) for batch in pictures),
            [to_device(batch, accelerator.device) for batch in texts],
            bar.update,
        )
    return gather_by_index(accelerator, own, scores, len(split.images))


def usage(run: Run, model: nn.Module) -> str:
    return USAGE.format(
        module="apt_diffusion.models.meter" if run.model_type == "meter" else "transformers",
        model_class=type(model).__name__,
        kind=run.model_type,
        **loading_code(run.args.method),
    )


if __name__ == "__main__":
    main()
