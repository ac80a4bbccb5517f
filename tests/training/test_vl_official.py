"""The trainers on checkpoints of the official code, and where they follow its recipes."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import make_tokenizer
from PIL import Image
from support.official_helpers import make_meter_state, make_vilt_state
from support.vl_helpers import card_code, make_vqa_folder, results, train, weights

import apt_diffusion as apt
from apt_diffusion.convert.conversion import convert
from apt_diffusion.data import vqa, vqa_answers
from apt_diffusion.data.nlvr2 import OFFICIAL_PROMPT
from apt_diffusion.data.processors import load_processor
from apt_diffusion.models import meter
from apt_diffusion.models.vilt import add_classifier_token, use_text_epsilon

STATES = {"vilt": make_vilt_state, "meter": make_meter_state}
MODELS = {"vilt": transformers.ViltForQuestionAnswering, "meter": meter.MeterForQuestionAnswering}
WORDS = ("red", "green", "blue", "one", "two", "cat", "dog")  # as many as the small official heads have outputs
SIZES = {"num_prompts": 5, "rank": 2, "image_size": 24, "min_answer_count": 3}


@pytest.fixture(scope="module")
def seven_answers(tmp_path_factory):
    """VQAv2's layout with seven answers, each the most common one of three questions of train and val."""
    folder = make_vqa_folder(tmp_path_factory.mktemp("data") / "vqa", train=14, val=7, test=2)
    for split in ("train", "val"):
        file = folder / f"v2_mscoco_{split}2014_annotations.json"
        content = json.loads(file.read_text())
        for index, entry in enumerate(content["annotations"]):
            answer = WORDS[index % 7]
            entry["multiple_choice_answer"] = answer
            entry["answers"] = [{"answer": word, "answer_id": 1} for word in [answer] * 8 + ["red", "cat"]]
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module", params=["vilt", "meter"])
def converted(request, tmp_path_factory):
    """`(type of model, official tensors, folder)`: an official checkpoint with APT for VQA, converted."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(folder / "words")
    tokenizer.cls_token = tokenizer.bos_token
    tokenizer.save_pretrained(folder / "words")
    state = STATES[kind]("vqa", apt=True)
    for key in list(state):  # the tokenizer has more words than the small official models
        if key.endswith("word_embeddings.weight"):
            generator = torch.Generator().manual_seed(1)
            state[key] = torch.randn(len(tokenizer), state[key].shape[1], generator=generator) * 0.5
        if key.endswith("embeddings.position_embeddings.weight"):
            state[key] = torch.randn(40, state[key].shape[1], generator=torch.Generator().manual_seed(2)) * 0.5
        if key.endswith("position_ids"):
            state[key] = torch.arange(40)[None]
    torch.save({"state_dict": state}, folder / "official.ckpt")
    convert(folder / "official.ckpt", folder / "converted", tokenizer=folder / "words", image_size=24)
    return kind, state, folder / "converted"


def load_converted(kind, folder):
    """As a user does, without the trainer."""
    model = MODELS[kind].from_pretrained(folder)
    if kind == "vilt":
        add_classifier_token(model)
        use_text_epsilon(model, model.config.text_layer_norm_eps)
    apt.load_apt_weights(model, folder)
    return model.eval()


def test_a_converted_checkpoint_is_evaluated(converted, seven_answers, vqa_dir, tmp_path):
    """Its file has no answers: they are the vocabulary of train and val, in the official order."""
    kind, _, folder = converted
    data = shutil.copytree(seven_answers, tmp_path / "data")
    shutil.rmtree(data / "train2014")  # the annotations are enough
    out = train("vqa", folder, data, tmp_path / "out", eval_only=True, adapter=folder, **SIZES)
    answers = json.loads((out / "answers.json").read_text())
    assert answers == ["red", "green", "blue", "1", "2", "cat", "dog"] or answers == [
        vqa_answers.normalize_answer(word) for word in WORDS
    ]
    model, processor = load_converted(kind, folder), load_processor(kind, folder, 24)
    scores = []
    for question in vqa.load_questions(data, "val"):
        inputs = processor(Image.open(question.picture), question.text, return_tensors="pt")
        with torch.no_grad():
            answer = answers[int(model(**inputs).logits.argmax())]
        scores.append(vqa_answers.vqa_accuracy([question], [answer])["accuracy"])
    assert results(out)["metrics"]["accuracy"] == pytest.approx(np.mean(scores)) and results(out)["method"] == "apt"
    with pytest.raises(ValueError, match=r"chooses among 7 answers without saying which, .* a vocabulary of 3: give"):
        train("vqa", folder, vqa_dir, tmp_path / "x", eval_only=True, adapter=folder, **SIZES)


def test_training_goes_on_from_a_converted_checkpoint(converted, seven_answers, tmp_path):
    kind, state, folder = converted
    flags = {"adapter": folder, "max_train_steps": 1, "weight_decay": 0.0, "hidden_dropout_prob": 0.0}
    still = train("vqa", folder, seven_answers, tmp_path / "still", learning_rate=1e-12, **flags, **SIZES)
    tensors = weights(still)
    table = next(key for key in tensors if key.endswith("token_type_embeddings.weight") and "text" not in key)
    torch.testing.assert_close(tensors[table], state["token_type_embeddings.weight"])
    assert any(key.endswith("classifier_token") for key in tensors)
    segments = [key for key in tensors if "text_embeddings.token_type_embeddings" in key]
    assert len(segments) == (kind == "vilt")  # trained officially in ViLT, and not in METER
    moved = train("vqa", folder, seven_answers, tmp_path / "moved", learning_rate=1e-2, **flags, **SIZES)
    changed = {key for key, value in weights(moved).items() if not torch.equal(value, tensors[key])}
    assert {table, *segments} <= changed
    again = train(
        "vqa", folder, seven_answers, tmp_path / "again", eval_only=True, adapter=moved, **SIZES
    )  # its classifier token is found in the file
    assert results(again)["metrics"] == results(moved)["metrics"]


def test_a_tuned_official_model_without_an_adapter_is_evaluated(seven_answers, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "words")
    tokenizer.cls_token = tokenizer.bos_token
    tokenizer.save_pretrained(tmp_path / "words")
    state = make_meter_state("vqa")
    state["text_transformer.embeddings.word_embeddings.weight"] = torch.randn(len(tokenizer), 192)
    state["text_transformer.embeddings.position_embeddings.weight"] = torch.randn(40, 192)
    torch.save({"state_dict": state}, tmp_path / "official.ckpt")
    convert(tmp_path / "official.ckpt", tmp_path / "model", tokenizer=tmp_path / "words", image_size=24)
    out = train("vqa", tmp_path / "model", seven_answers, tmp_path / "out", eval_only=True, **SIZES)
    assert results(out)["method"] is None and len(json.loads((out / "answers.json").read_text())) == 7


# Recipes


@pytest.mark.parametrize("kind", ["vilt", "meter"])
def test_the_dropout_flag_is_the_official_drop_rate(tiny_vl, vqa_dir, tmp_path, kind):
    """METER's sets the attention's, too; ViLT's attention has none."""
    import train_apt_vqa

    from apt_diffusion.training.vision_language.models import find_base, load_model

    flags = ["--model_name_or_path", tiny_vl[kind], "--data_dir", vqa_dir, "--output_dir", tmp_path]
    args = train_apt_vqa.parse_args([*map(str, flags), "--hidden_dropout_prob", "0.3"])
    base = find_base(args, train_apt_vqa.RECIPES, num_processes=1)
    model = load_model(args, base, 0, train_apt_vqa.MODELS[kind], num_labels=3)
    assert model.config.hidden_dropout_prob == 0.3
    assert model.config.attention_probs_dropout_prob == (0.3 if kind == "meter" else 0.0)
    if kind == "meter":
        layers = [*model.meter.cross_modal_text_layers, *model.meter.cross_modal_image_layers]
        assert all(layer.attention.dropout_prob == layer.crossattention.dropout_prob == 0.3 for layer in layers)
        assert all(layer.dropout.p == 0.3 for layer in layers)


def test_vilts_dropout_stands_where_the_official_code_has_it(tiny_vl, vqa_dir, tmp_path):
    import train_apt_vqa

    from apt_diffusion.training.session import Session
    from apt_diffusion.training.vision_language.method import attach, set_training_mode
    from apt_diffusion.training.vision_language.models import find_base, load_model

    flags = ["--model_name_or_path", tiny_vl["vilt"], "--data_dir", vqa_dir, "--output_dir", tmp_path]
    args = train_apt_vqa.parse_args([*map(str, flags), "--hidden_dropout_prob", "0.5", "--report_to", "none"])
    base = find_base(args, train_apt_vqa.RECIPES, num_processes=1)
    model = load_model(args, base, 0, train_apt_vqa.MODELS["vilt"], num_labels=3)
    with Session.start(args, "train_apt_vqa") as session:
        attach(session, model)
    set_training_mode(model)
    torch.manual_seed(0)
    corrected = model.vilt.encoder.layer[0].attention(torch.randn(2, 5, 32))[0]
    zeros = (corrected == 0).float().mean()  # half of them, for the correction comes before
    assert 0.4 < zeros < 0.6
    hidden = model.vilt.encoder.layer[0].intermediate(torch.randn(2, 50, 32))
    assert 0.4 < (hidden == 0).float().mean() < 0.6


def test_the_released_prefix_stands_before_every_question(tiny_vl, vqa_dir, tmp_path, monkeypatch):
    import train_apt_vqa

    seen = []
    original = train_apt_vqa.make_inputs

    def make_inputs(session, base, model, labels, parts):
        seen.extend(example.text for part in parts for example in part)
        return original(session, base, model, labels, parts)

    monkeypatch.setattr(train_apt_vqa, "make_inputs", make_inputs)
    flags = {"min_answer_count": 3, "max_train_steps": 1, "predict_splits": ["test-dev"]}
    out = train("vqa", tiny_vl["vilt"], vqa_dir, tmp_path / "out", official_prompt=True, **flags)
    assert seen and all(text.startswith(f"{OFFICIAL_PROMPT}what color") for text in seen)
    assert OFFICIAL_PROMPT in (out / "README.md").read_text()


def test_a_card_with_a_classifier_token_runs(tiny_vl, vqa_dir, tmp_path, monkeypatch, capsys):
    flags = {"min_answer_count": 3, "max_train_steps": 1, "use_classifier_token": True}
    for kind in ("vilt", "meter"):
        out = train("vqa", tiny_vl[kind], vqa_dir, tmp_path / kind, **flags)
        code = card_code(out, tiny_vl[kind])
        monkeypatch.chdir(out)
        names = {"picture": Image.new("RGB", (24, 16), "red")}
        capsys.readouterr()
        exec(code, names)
        assert capsys.readouterr().out.strip() in names["answers"]
