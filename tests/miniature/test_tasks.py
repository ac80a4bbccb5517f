"""The drawn tasks: what they say is true, in layouts that readers of the real data sets know."""

import json
from collections import Counter, defaultdict
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from support.scene_reader import answer, facts, holds, holds_for_pair, stands

from apt_diffusion.miniature.tasks import __main__ as command
from apt_diffusion.miniature.tasks.captions import captions_of, describe
from apt_diffusion.miniature.tasks.classes import CLASSES, NUM_BASE, class_name, draw_classes
from apt_diffusion.miniature.tasks.draw import task_scenes
from apt_diffusion.miniature.tasks.files import WRITERS, write
from apt_diffusion.miniature.tasks.pairs import statement_with_pairs
from apt_diffusion.miniature.tasks.picture import read_picture
from apt_diffusion.miniature.tasks.questions import KINDS, people_answer, questions_of
from apt_diffusion.miniature.tasks.similar import GROUP, similar_scenes
from apt_diffusion.miniature.vision_language import (
    WORDS,
    make_bert_tokenizer,
    make_clip_tokenizer,
    make_roberta_tokenizer,
)
from apt_diffusion.miniature.world import COLORS, RGB

SIZES = {"train": 120, "val": 30, "test": 60}


@pytest.fixture(scope="module")
def scenes():
    return task_scenes(600, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pictures(scenes):
    return [read_picture(scenes, index) for index in range(len(scenes))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every task on disk."""
    root = tmp_path_factory.mktemp("tasks")
    for task in WRITERS:
        write(task, root / task, SIZES, seed=0)
    return root


def test_answers_are_right_balanced_and_of_every_kind(scenes, pictures):
    rng = Random(0)
    kinds, given = Counter(), defaultdict(Counter)
    for index, picture in enumerate(pictures):
        asked = questions_of(picture, rng)
        assert len({question.text for question in asked}) == 4
        for question in asked:
            assert question.answer == answer(question.text, facts(scenes, index)), (question, picture)
            assert question.text.startswith(question.opening)
            kinds[question.kind] += 1
            given[question.opening][question.answer] += 1
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 200
    for opening in ("is the", "is there", "are the"):  # the words of a question do not give its answer
        share = given[opening]["yes"] / given[opening].total()
        assert 0.4 < share < 0.6, (opening, share)
    assert set(given["how many"]) == {"0", "1", "2"} and min(given["how many"].values()) > 40


def test_what_pretraining_says_is_true_of_the_pictures_that_its_claim_fits(scenes, pictures):
    rng = Random(0)
    fits = 0
    for index, picture in enumerate(pictures):
        text, claim = describe(picture, rng, sentences=0.5)
        assert claim.holds(picture) and holds(text, facts(scenes, index)), text
        for other in rng.sample(range(len(pictures)), 5):
            assert claim.holds(pictures[other]) == holds(text, facts(scenes, other)), (text, pictures[other])
            fits += claim.holds(pictures[other])
    assert fits > 100  # short sentences are true of others, too


def test_statements_are_true_of_one_pair_and_false_of_the_other(scenes, pictures):
    rng = Random(0)
    kinds = Counter()
    for _ in range(400):
        statement, right, wrong = statement_with_pairs(pictures, rng)
        for pair, label in ((right, True), (wrong, False)):
            left, other = (facts(scenes, index) for index in pair)
            assert holds_for_pair(statement.text, left, other) is label, (statement.text, left, other)
        assert len(set(right) & set(wrong)) == 1  # one picture is in both
        kinds[statement.kind] += 1
    assert len(kinds) == 6 and min(kinds.values()) > 20


def test_captions_differ_and_name_all_that_is_shown(scenes, pictures):
    prepositions = {"on its left": "left of", "on its right": "right of", "over it": "above", "under it": "below"}
    for index, picture in enumerate(pictures):
        captions = captions_of(picture)
        assert len(set(captions)) == 5
        seen = facts(scenes, index)
        words = {thing[part] for thing in seen["things"] for part in ("color", "shape")} | set(seen["ground"])
        assert all(words <= set(caption.replace(",", "").split()) for caption in captions)
        assert holds(captions[0], seen)
        assert holds(captions[1].split(" we see ")[1], seen)
        if len(seen["things"]) == 2:  # "... with a B that has a A under it"
            place = next((p for p in prepositions if captions[4].endswith(p)), None)
            relation = prepositions.get(place, "inside")
            assert captions[4].endswith(place or "within it") and stands(*seen["things"], relation)


def test_similar_scenes_differ_in_one_part():
    scenes = similar_scenes(400, torch.Generator().manual_seed(0))
    pictures = [read_picture(scenes, index) for index in range(400)]
    differences = Counter()
    for start in range(0, 400, GROUP):
        base = facts(scenes, start)
        for member in (1, 2):
            other = facts(scenes, start + member)
            background = (base["pattern"], base["ground"]) != (other["pattern"], other["ground"])
            things = base["things"] != other["things"]
            differences[background + things] += 1
        assert pictures[start] != pictures[start + 3]
    assert differences[2] < differences[1]  # a mixture that the world does not draw is replaced


def test_people_mostly_agree():
    rng = Random(0)
    answers = [people_answer("2", rng) for _ in range(300)]
    assert all(len(ten) == 10 for ten in answers)
    share = sum(ten.count("2") + ten.count("two") for ten in answers) / 3000
    assert 0.93 < share < 0.99 and {"two", "0", "1"} <= {a for ten in answers for a in ten}


def test_every_word_of_the_tasks_is_one_token(pictures):
    rng = Random(0)
    texts = [text for p in pictures[:200] for text in (*captions_of(p), *(q.text for q in questions_of(p, rng)))]
    texts += [statement_with_pairs(pictures, rng)[0].text for _ in range(200)]
    texts += [f"a photo of a {class_name(label)}." for label in range(len(CLASSES))]
    words = {word.strip(",?.") for text in texts for word in text.split()}
    assert words <= set(WORDS)
    for tokenizer in (make_clip_tokenizer(), make_bert_tokenizer(), make_roberta_tokenizer()):
        for word in words:
            assert len(tokenizer(f"a {word}").input_ids) == 4, (type(tokenizer).__name__, word)
        assert max(map(len, tokenizer(texts).input_ids)) <= tokenizer.model_max_length
        strange = tokenizer("zebra xyz!").input_ids
        assert tokenizer.unk_token_id not in strange or tokenizer.unk_token == "<|endoftext|>"


def test_classes_base_and_new_have_nothing_but_textures_in_common():
    base, new = CLASSES[:NUM_BASE], CLASSES[NUM_BASE:]
    assert len(set(CLASSES)) == 24 and len(base) == len(new) == 12
    assert not {c[1:] for c in base} & {c[1:] for c in new} and {c[0] for c in base} == {c[0] for c in new}
    images = (draw_classes(torch.arange(24).repeat(20), torch.Generator().manual_seed(0)) + 1) / 2
    for label, (texture, color, shape) in enumerate(CLASSES):
        if shape == "moon":  # it is not in the middle
            continue
        rgb = RGB[COLORS.index(color)]
        # Four pixels that meet where four tiles do: the middle, its neighbours to the right and below.
        middle, right, below = (
            images[label::24, :, y, x] @ rgb / rgb.square().sum() > 0.7 for y, x in ((31, 31), (31, 32), (32, 31))
        )
        assert (middle | right).all(), class_name(label)
        assert ((middle != right) == (texture != "")).all() and ((middle != below) == (texture == "checkered")).all()


def test_vqa_layout(folders):
    folder = folders / "vqa"
    for subset, name, count in (
        ("train2014",) * 2 + (120,),
        ("val2014",) * 2 + (30,),
        ("test2015", "test-dev2015", 60),
    ):
        questions = json.loads((folder / f"v2_OpenEnded_mscoco_{name}_questions.json").read_text())["questions"]
        assert len(questions) == 4 * count == len({question["question_id"] for question in questions})
        images = {question["image_id"] for question in questions}
        files = {f"COCO_{subset}_{image:012d}.jpg" for image in images}
        assert files == {file.name for file in (folder / subset).iterdir()} and len(files) == count
        annotations = folder / f"v2_mscoco_{subset}_annotations.json"
        if subset == "test2015":
            assert not annotations.exists()
            continue
        annotations = json.loads(annotations.read_text())["annotations"]
        assert [a["question_id"] for a in annotations] == [question["question_id"] for question in questions]
        for annotation in annotations:
            answers = [answer["answer"] for answer in annotation["answers"]]
            assert len(answers) == 10 and annotation["multiple_choice_answer"] in answers
            assert annotation["answer_type"] in ("yes/no", "number", "other")


def test_nlvr2_layout(folders):
    folder = folders / "nlvr2"
    for name, count in (("train", 120), ("dev", 30), ("test1", 60)):
        lines = [json.loads(line) for line in (folder / "data" / f"{name}.json").read_text().splitlines()]
        assert len(lines) == count == len({line["identifier"] for line in lines})
        labels = defaultdict(list)
        for line in lines:
            split, set_id, pair, sentence = line["identifier"].split("-")
            where = folder / "images" / "train" / str(line["directory"]) if name == "train" else folder / name
            for side in (0, 1):
                assert Image.open(where / f"{split}-{set_id}-{pair}-img{side}.png").size == (64, 64)
            labels[line["sentence"], set_id].append(line["label"])
            assert (split, sentence) == (name, "0")
        assert all(sorted(pair) == ["False", "True"] for pair in labels.values())


def test_retrieval_layout(folders):
    folder = folders / "retrieval"
    content = json.loads((folder / "dataset_flickr30k.json").read_text())
    images = content["images"]
    assert Counter(image["split"] for image in images) == SIZES and content["dataset"] == "flickr30k"
    assert {image["filename"] for image in images} == {file.name for file in (folder / "flickr30k-images").iterdir()}
    for image in images:
        assert len({sentence["raw"] for sentence in image["sentences"]}) == 5
        assert [sentence["sentid"] for sentence in image["sentences"]] == image["sentids"]
        assert all(sentence["imgid"] == image["imgid"] for sentence in image["sentences"])


def test_classification_layout(folders):
    folder = folders / "classification"
    listing = json.loads((folder / "split_zhou_DrawnShapes.json").read_text())
    assert {split: len(items) for split, items in listing.items()} == SIZES
    for split, items in listing.items():
        for path, label, name in items:
            assert (folder / path).is_file() and name == class_name(label)
            assert path.split("/")[:2] == [split, name.replace(" ", "_")]
        assert max(Counter(label for _, label, _ in items).values()) <= len(items) // 24 + 1


def test_seeds_decide_training_data_only_and_sizes_do_not_reach_back(folders, tmp_path):
    write("vqa", tmp_path / "again", SIZES, seed=0)
    write("vqa", tmp_path / "other", {**SIZES, "val": 10}, seed=1)
    train, val = "v2_OpenEnded_mscoco_train2014_questions.json", "v2_OpenEnded_mscoco_val2014_questions.json"
    read = {where: [json.loads((where / name).read_text())["questions"] for name in (train, val)]
            for where in (folders / "vqa", tmp_path / "again", tmp_path / "other")}  # fmt: skip
    first, again, other = read.values()
    assert first == again and first[0] != other[0]
    assert other[1] == first[1][:40]
    picture = "val2014/COCO_val2014_000000000007.jpg"
    pixels = [np.asarray(Image.open(where / picture)) for where in read]
    assert (pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all()


def test_command_line_writes_or_says_why_not(tmp_path, capsys):
    arguments = ["nlvr2", "--output_dir", str(tmp_path / "data"), "--train", "4", "--val", "2", "--test", "2"]
    command.main(arguments)
    assert "train 4, val 2, test 2 statements" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not empty"):
        command.main(arguments)
    with pytest.raises(SystemExit, match="train 0"):
        command.main(["vqa", "--output_dir", str(tmp_path / "none"), "--train", "0"])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def stop(items: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("retrieval", tmp_path / "data", SIZES, 0, stop)
    assert not list(tmp_path.iterdir())
