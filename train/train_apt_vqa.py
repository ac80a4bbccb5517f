#!/usr/bin/env python
"""Teach ViLT or METER visual question answering (VQAv2) with APT, or with one of the methods it is compared with.

    python -m apt_diffusion.miniature.tasks vqa --output_dir data/vqa
    accelerate launch train/train_apt_vqa.py --model_name_or_path miniature-vilt --data_dir data/vqa \\
        --output_dir out/vqa --max_train_steps 150 --init identity --hidden_dropout_prob 0 --no-augment

The whole run stands here, from the questions to the submission file; see docs/vision_language.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViltForQuestionAnswering

from apt_diffusion.baselines import find_method_file, save_method
from apt_diffusion.data.image_text import Batch, Example, TrainingStream, unchanged
from apt_diffusion.data.nlvr2 import OFFICIAL_PROMPT
from apt_diffusion.data.vqa import SPLITS, Question, load_hub_questions, load_questions
from apt_diffusion.data.vqa_answers import (
    MIN_COUNT,
    SoftLabels,
    check_answerable,
    make_vocabulary,
    submission,
    training_examples,
    vqa_accuracy,
)
from apt_diffusion.models.meter import MeterForQuestionAnswering
from apt_diffusion.training import run_config
from apt_diffusion.training.methods import answers_of, tensor_shapes, trained_parameters
from apt_diffusion.training.metrics import write_json
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
from apt_diffusion.training.vision_language.predict import evaluating, predict
from apt_diffusion.training.vision_language.recipes import MINIATURE, SOURCE, Recipe
from apt_diffusion.training.vision_language.results import card, loading_code, write_results

RECIPES = {
    "vilt": Recipe(
        5e-4, 1e-4, head_lr_multiplier=10, total_batch_size=256, max_text_length=40, image_size=384
    ),
    "meter": Recipe(
        2.5e-5, 5e-6, head_lr_multiplier=50, total_batch_size=512, max_text_length=50, image_size=384,
        cross_modal_lr_multiplier=5,
    ),
    "miniature": MINIATURE,
}  # fmt: skip
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
model = {model_class}.from_pretrained(base, num_labels=len(answers), ignore_mismatched_sizes=True{settings}).eval()
{load}
inputs = load_processor({kind!r}, base{size})(picture, "{prompt}What colour is it?", return_tensors="pt")
print(answers[model(**inputs).logits.argmax()])
"""


def parse_args(argv: list[str] | None = None) -> RunArguments:
    """The flags, checked as far as they can be without data and model."""
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
    add(
        "--new_vocabulary",
        action="store_true",
        help="Make the vocabulary from these data, with a new head, where the model was tuned for other answers.",
    )
    add(
        "--official_prompt",
        action="store_true",
        help=f"Put {OFFICIAL_PROMPT!r} before every question, as APT's released code for ViLT does. It costs 7 of 40 "
        "tokens; ViLT's and METER's own code do not have it.",
    )
    args = run_config.parse_args(parser, argv)
    if (args.data_dir is None) == (args.dataset_name is None):
        parser.error("give --data_dir or --dataset_name")
    if args.new_vocabulary and (args.adapter or args.eval_only):
        parser.error("--new_vocabulary makes a new head: --adapter and --eval_only need one that is trained")
    check_shared(args)
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains and evaluates, or only evaluates. Returns the metrics."""
    args = parse_args(argv)
    with Session.start(args, "train_apt_vqa") as session:
        base = find_base(args, RECIPES, session.accelerator.num_processes)

        evaluated = ["val", *args.predict_splits]
        questions = {split: load(args, split) for split in evaluated + ([] if args.eval_only else ["train"])}
        answers = choose_answers(session, base, questions)
        training = [] if args.eval_only else make_training_examples(args, questions, answers)
        check_answerable(questions["val"], answers)
        session.open_output()

        take_over_classifier_token(args, trained_source(session))
        model = load_model(
            args, base, session.seed, MODELS[base.model_type], num_labels=len(answers), **labels(answers)
        )
        attach(session, model)
        tested = {split: unlabelled(args, questions[split]) for split in evaluated}
        inputs = make_inputs(session, base, model, SoftLabels(len(answers)), [training, *tested.values()])

        def answer(network: nn.Module, split: str) -> list[str]:
            with evaluating(session, network, model) as inner:
                places = predict(session, inner, unchanged(tested[split]), inputs, lambda out: out.logits.argmax(-1))
            return [answers[place] for place in places]

        def evaluate(network: nn.Module) -> dict[str, float]:
            return vqa_accuracy(questions["val"], answer(network, "val"))

        def save(folder: Path) -> None:
            known = {"base_model": base.name, "task": session.script}
            save_method(model, folder, session.header(**known, answers=json.dumps(answers, ensure_ascii=False)))

        if session.is_main:
            write_json(answers, session.output_dir / ANSWERS_NAME)
        if args.eval_only:
            network = session.accelerator.prepare_model(model, evaluation_mode=True)
        else:
            if "val" in args.train_splits:
                session.logger.warning("The accuracy on val means nothing: it is trained on. Use --predict_splits.")
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
        for split in args.predict_splits:
            content = submission(questions[split], answer(network, split))
            if session.is_main:
                write_json(content, submission_file(session, split))
        session.upload()
    return metrics


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Binary cross-entropy of every answer against its soft score: summed over answers, averaged over questions."""
    scores = batch.pop("labels")  # (B, num_answers)
    logits = model(**batch).logits
    return F.binary_cross_entropy_with_logits(logits, scores) * scores.shape[1]


def load(args: argparse.Namespace, split: str, pictures_needed: bool = True) -> list[Question]:
    """The questions of a split, from the place that the flags name."""
    if args.dataset_name is not None:
        return load_hub_questions(args.dataset_name, split)
    return load_questions(args.data_dir, split, pictures_needed)


def choose_answers(session: Session, base: BaseModel, questions: dict[str, list[Question]]) -> list[str]:
    """The answers to choose from, in the order of the head's outputs.

    Those of the adapter that is loaded, else of a model that was tuned for this task, else the official vocabulary of
    train and val. A head of the official code says only how many answers it has: the vocabulary must have as many.
    """
    args, source = session.args, trained_source(session)
    count = None
    if source is not None:
        file = find_method_file(source)
        stored = answers_of(file)
        if stored is not None:
            return stored
        heads = [shape[0] for name, shape in tensor_shapes(file).items() if name.endswith("classifier.3.bias")]
        count = heads[0] if heads else None
    own = [base.config.id2label[place] for place in sorted(base.config.id2label)]
    if not own[0].startswith("LABEL_") and not args.new_vocabulary:
        return own
    if count is None and args.eval_only:
        if not any(name.endswith("ForQuestionAnswering") for name in base.config.architectures or ()):
            raise ValueError(f"{base.name} was not tuned to answer questions: --eval_only needs --adapter.")
        count = len(own)
    train = questions.get("train") or load(args, "train", pictures_needed=False)
    vocabulary = make_vocabulary(train + questions["val"], args.min_answer_count)
    if count not in (None, len(vocabulary)):
        raise ValueError(
            f"The head of {source or base.name} chooses among {count} answers without saying which, and train and val "
            f"have a vocabulary of {len(vocabulary)}: give the questions that it was trained on (VQAv2's have 3,129 "
            "answers), or another --min_answer_count."
        )
    return vocabulary


def labels(answers: list[str]) -> dict[str, dict]:
    """The answers as transformers' configs keep them."""
    return {"id2label": dict(enumerate(answers)), "label2id": {answer: place for place, answer in enumerate(answers)}}


def prompt(args: argparse.Namespace) -> str:
    """What stands before every question."""
    return OFFICIAL_PROMPT if args.official_prompt else ""


def make_training_examples(
    args: argparse.Namespace, questions: dict[str, list[Question]], answers: list[str]
) -> list[Example]:
    """Those questions of the splits that the vocabulary can answer."""
    asked = [question for split in args.train_splits for question in questions[split]]
    return training_examples(asked, answers, prompt(args))


def unlabelled(args: argparse.Namespace, questions: list[Question]) -> list[Example]:
    """Questions to be answered."""
    return [Example(prompt(args) + question.text, (question.picture,), ()) for question in questions]


def submission_file(session: Session, split: str) -> Path:
    """Named as the evaluation server wants it."""
    return session.output_dir / f"vqa_OpenEnded_mscoco_{SPLITS[split][0]}_{session.args.method}_results.json"


def make_card(
    session: Session, base: BaseModel, model: nn.Module, metrics: dict[str, float], num_questions: int
) -> dict[str, Any]:
    """What the model card says of this task."""
    args = session.args
    return card(
        session,
        metrics,
        plotted=["accuracy"],
        summary=f"{type(model).__name__} for visual question answering, trained with `{args.method}` on "
        f"{num_questions} questions ({' and '.join(args.train_splits)}).",
        usage=USAGE.format(**loading_code(args, base, model), prompt=prompt(args)),
        tags=["visual-question-answering", base.model_type],
        pipeline_tag="visual-question-answering",
    )


if __name__ == "__main__":
    main()
    leave()
