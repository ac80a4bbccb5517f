#!/usr/bin/env python
"""Teach ViLT or METER visual question answering (VQAv2) with APT, or with one of the methods it is compared with.

    python -m apt_diffusion.miniature.tasks vqa --output_dir data/vqa
    accelerate launch train/train_apt_vqa.py --model_name_or_path miniature-vilt --data_dir data/vqa \\
        --output_dir out/vqa --max_train_steps 150 --init identity --hidden_dropout_prob 0 --no-augment

Here are data, model, loss and metric of the task. The flags that all tasks share, and the loop, stand in
`vl_arguments.py` and `vl_trainer.py`; see docs/vision_language.md.
"""

import argparse
import json
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViltForQuestionAnswering

from apt_diffusion.data.image_text import Batch, Example, TrainingStream, unchanged
from apt_diffusion.data.vqa import (
    MIN_COUNT,
    SPLITS,
    Question,
    SoftLabels,
    load_hub_questions,
    load_questions,
    make_vocabulary,
    submission,
    training_examples,
    vqa_accuracy,
)
from apt_diffusion.models.meter import MeterForQuestionAnswering
from apt_diffusion.training.methods import answers_of, find_trained
from apt_diffusion.training.metrics import write_json
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
from apt_diffusion.training.vision_language.predict import predict
from apt_diffusion.training.vision_language.results import loading_code
from apt_diffusion.training.vision_language.trainer import Run, Task, attach, run_task, start

RECIPES = {
    "vilt": Recipe(5e-4, 1e-4, head_lr_multiplier=10, total_batch_size=256, max_text_length=40),
    "meter": Recipe(
        2.5e-5, 5e-6, head_lr_multiplier=50, total_batch_size=512, max_text_length=50, cross_modal_lr_multiplier=5
    ),
    "miniature": MINIATURE,
}
MODELS = {"vilt": ViltForQuestionAnswering, "meter": MeterForQuestionAnswering}
ANSWERS_NAME = "answers.json"
USAGE = """
import json
from {module} import {model_class}
{import_line}
from apt_diffusion.data.processors import load_processor
from apt_diffusion.miniature import resolve_model

base = resolve_model({{base_model!r}})
answers = json.load(open("answers.json"))  # beside this file
model = {model_class}.from_pretrained(base, num_labels=len(answers), ignore_mismatched_sizes=True).eval()
{load}
inputs = load_processor({kind!r}, base)(picture, "What colour is it?", return_tensors="pt")
print(answers[model(**inputs).logits.argmax()])
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    add_shared_flags(parser, RECIPES)
    add = parser.add_argument_group("VQAv2").add_argument
    add("--data_dir", help="Folder with the official question and annotation files, and COCO's picture folders.")
    add("--dataset_name", help="In place of --data_dir: a data set of the hub (question, image, answers, ...).")
    add(
        "--train_splits",
        nargs="+",
        choices=["train", "val"],
        default=["train"],
        help=f"What to train on. Published results train on train and val, and are measured on test-dev ({SOURCE}); "
        "the accuracy on val means nothing then.",
    )
    add("--predict_splits", nargs="+", choices=["test-dev", "test"], default=[], help="Write submission files.")
    add("--min_answer_count", type=positive_int, default=MIN_COUNT, help="How common an answer must be to be learnt.")
    args = parser.parse_args(argv)
    if (args.data_dir is None) == (args.dataset_name is None):
        parser.error("give --data_dir or --dataset_name")
    check_shared(args)
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    run = start(args, "train_apt_vqa", argv, RECIPES)
    evaluated = ["val", *args.predict_splits]
    questions = {split: load(args, split) for split in evaluated + ([] if args.eval_only else ["train"])}
    answers = choose_answers(run, questions)
    model = load_model(run, MODELS[run.model_type], num_labels=len(answers), **labels(answers))
    attach(run, model)

    asked = [] if args.eval_only else [q for split in args.train_splits for q in questions[split]]
    training = training_examples(asked, answers)
    unlabelled = {split: [Example(q.text, (q.picture,), ()) for q in questions[split]] for split in evaluated}
    inputs = make_inputs(run, model, SoftLabels(len(answers)), [training, *unlabelled.values()])

    def answer(model: nn.Module, split: str) -> list[str]:
        places = predict(run, model, unchanged(unlabelled[split]), inputs, lambda output: output.logits.argmax(-1))
        return [answers[place] for place in places]

    def evaluate(model: nn.Module) -> dict[str, float]:
        return vqa_accuracy(questions["val"], answer(model, "val"))

    def conclude(model: nn.Module) -> None:
        for split in args.predict_splits:
            content = submission(questions[split], answer(model, split))
            if run.accelerator.is_main_process:
                write_json(content, submission_file(run, split))

    if "val" in args.train_splits:
        run.logger.warning("The accuracy on val means nothing: it is trained on. Use --predict_splits test-dev.")
    if run.accelerator.is_main_process:
        write_json(answers, run.output_dir / ANSWERS_NAME)
    return run_task(
        run,
        Task(
            model,
            TrainingStream(training, run.seed, args.augment),
            inputs,
            loss,
            evaluate,
            plotted=["accuracy"],
            summary=f"{type(model).__name__} for visual question answering, trained with `{args.method}` on "
            f"{len(training)} questions ({' and '.join(args.train_splits)}).",
            usage=usage(run, model),
            tags=["visual-question-answering", run.model_type],
            header={"answers": json.dumps(answers, ensure_ascii=False)},
            conclude=conclude,
        ),
    )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Binary cross-entropy of every answer against its soft score: summed over answers, averaged over questions."""
    scores = batch.pop("labels")  # (B, num_answers)
    logits = model(**batch).logits
    return F.binary_cross_entropy_with_logits(logits, scores) * scores.shape[1]


def load(args: argparse.Namespace, split: str) -> list[Question]:
    if args.dataset_name is not None:
        return load_hub_questions(args.dataset_name, split)
    return load_questions(args.data_dir, split)


def choose_answers(run: Run, questions: dict[str, list[Question]]) -> list[str]:
    """Of the adapter that is loaded, else of a model that was tuned for this task, else the official vocabulary."""
    args = run.args
    source = run.resumed.folder if run.resumed else args.adapter
    stored = answers_of(find_trained(source)) if source is not None else None
    if stored is not None:
        return stored
    own = [run.config.id2label[place] for place in sorted(run.config.id2label)]
    if not own[0].startswith("LABEL_"):
        return own
    if args.eval_only:
        raise ValueError(f"{args.model_name_or_path} was not tuned to answer questions: --eval_only needs --adapter.")
    return make_vocabulary(questions["train"] + questions["val"], args.min_answer_count)


def labels(answers: list[str]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(answers)), "label2id": {answer: place for place, answer in enumerate(answers)}}


def submission_file(run: Run, split: str) -> Path:
    """Named as the evaluation server wants it."""
    return run.output_dir / f"vqa_OpenEnded_mscoco_{SPLITS[split][0]}_{run.args.method}_results.json"


def usage(run: Run, model: nn.Module) -> str:
    module = "apt_diffusion.models.meter" if run.model_type == "meter" else "transformers"
    code = loading_code(run.args.method)
    return USAGE.format(module=module, model_class=type(model).__name__, kind=run.model_type, **code)


if __name__ == "__main__":
    main()
