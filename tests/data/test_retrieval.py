"""Image-text retrieval: data in the official layout, the objective, scores of all pairs, recall by brute force."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import meter_config
from PIL import Image
from support.families import make_vilt

from apt_diffusion import add_apt
from apt_diffusion.data.nlvr2 import OFFICIAL_PROMPT
from apt_diffusion.data.retrieval import (
    RetrievalData,
    RetrievalSplit,
    find_karpathy,
    read_hub,
    read_karpathy,
)
from apt_diffusion.data.sources import read_source
from apt_diffusion.models import retrieval as ours


def write_karpathy(folder, splits="aabbc", filepath=None):
    """Five pictures, three captions each; a: train, b: restval, c: test."""
    names = {"a": "train", "b": "restval", "c": "test"}
    pictures = folder / "images" / (filepath or "")
    pictures.mkdir(parents=True)
    rows = []
    for index, split in enumerate(splits):
        Image.new("RGB", (24, 20), (40 * index, 0, 0)).save(pictures / f"{index}.jpg")
        sentences = [{"raw": f" caption {index} {word}"} for word in ("one", "two", "two")]
        row = {"filename": f"{index}.jpg", "split": names[split], "sentences": sentences}
        rows.append(row | ({"filepath": filepath} if filepath else {}))
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"images": rows, "dataset": "coco"}))
    return file, folder / "images"


@pytest.mark.parametrize("filepath", [None, "val2014"])
def test_karpathys_layout(tmp_path, filepath):
    file, images = write_karpathy(tmp_path, filepath=filepath)
    split = read_karpathy(file, images, ("train", "restval"))
    assert len(split.images) == 4
    assert split.captions[:3] == ["caption 0 one", "caption 0 two", "caption 1 one"]  # repeated ones count once
    assert split.image_of == [0, 0, 1, 1, 2, 2, 3, 3]
    assert split.captions_of(2) == ["caption 2 one", "caption 2 two"]
    assert np.asarray(read_source(split.images[3]))[0, 0, 0] == pytest.approx(120, abs=3)
    assert read_karpathy(file, images, ("test",)).captions_of(0) == ["caption 4 one", "caption 4 two"]


def test_pictures_of_coco_may_lie_in_one_folder(tmp_path):
    file, images = write_karpathy(tmp_path, filepath="val2014")
    for path in (images / "val2014").iterdir():
        path.rename(images / path.name)
    assert read_karpathy(file, images, ("test",)).images == [images / "4.jpg"]


def test_the_folder_of_a_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset_flickr30k\.json or dataset_coco\.json"):
        find_karpathy(tmp_path)
    file, images = write_karpathy(tmp_path)
    assert find_karpathy(tmp_path) == (file, images)
    assert find_karpathy(tmp_path, tmp_path / "elsewhere")[1] == tmp_path / "elsewhere"
    images.rename(tmp_path / "train2014")
    assert find_karpathy(tmp_path)[1] == tmp_path  # COCO
    (tmp_path / "dataset_flickr30k.json").write_text("{}")
    with pytest.raises(ValueError, match="several data sets"):
        find_karpathy(tmp_path)


def test_missing_pictures_are_counted_and_named(tmp_path):
    file, images = write_karpathy(tmp_path)
    for index in (0, 1, 2, 3):
        (images / f"{index}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"4 of 4 pictures are missing: .*0\.jpg, .*1\.jpg, .*2\.jpg, \.\.\."):
        read_karpathy(file, images, ("train", "restval"))
    read_karpathy(file, images, ("test",))  # the others are not looked for


def test_annotations_that_cannot_be_used(tmp_path):
    file, images = write_karpathy(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.json"):
        read_karpathy(tmp_path / "nothing.json", images, ("test",))
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_karpathy(file, tmp_path / "nowhere", ("test",))
    with pytest.raises(ValueError, match=r"none of the splits \['val'\].*\['restval', 'test', 'train'\]"):
        read_karpathy(file, images, ("val",))
    content = json.loads(file.read_text())
    content["images"][4]["sentences"] = []
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"4\.jpg .* has no caption"):
        read_karpathy(file, images, ("test",))
    content["images"][4]["filename"] = "../../secret.jpg"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="leads out of"):
        read_karpathy(file, images, ("test",))
    file.write_text(json.dumps([{"question_id": 1}]))
    with pytest.raises(ValueError, match="has not the format"):
        read_karpathy(file, images, ("test",))
    file.write_text('{"images": [')
    with pytest.raises(ValueError, match="is not JSON"):
        read_karpathy(file, images, ("test",))


@pytest.fixture
def hub_folder(tmp_path):
    """A data set as it lies on the hub: one split, Karpathy's as a column (nlphuji/flickr30k)."""
    import datasets

    rows = {
        "image": [Image.new("L", (8, 8), 50 * index) for index in range(4)],
        "caption": [[f"picture {index}", "the same", "the same"] for index in range(4)],
        "split": ["train", "train", "val", "test"],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.List(datasets.Value("string")),
            "split": datasets.Value("string"),
        }
    )
    folder = tmp_path / "hub"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "test.parquet")
    return str(folder)


@pytest.mark.slow  # the hub is tried several times before it is given up
def test_a_data_set_of_the_hub(hub_folder):
    split = read_hub(hub_folder, ("train", "restval"))
    assert split.captions == ["picture 0", "the same", "picture 1", "the same"]
    picture = read_source(read_hub(hub_folder, ("test",)).images[0])
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (150, 150, 150)
    with pytest.raises(ValueError, match=r"no column \['text'\]: its columns are \['image', 'caption', 'split'\]"):
        read_hub(hub_folder, ("train",), caption_column="text")
    with pytest.raises(ValueError, match=r"none of the splits \['restval'\]"):
        read_hub(hub_folder, ("restval",))
    with pytest.raises(ValueError, match="'no/such-data' cannot be loaded"):
        read_hub("no/such-data", ("train",))


def small_split(images=6, shared="the same everywhere"):
    captions = ([f"a {index}", f"b {index}", shared] for index in range(images))
    return RetrievalSplit.of(((index, texts) for index, texts in enumerate(captions)), "this test")


def test_false_captions_are_never_true_and_differ():
    split = small_split()
    data = RetrievalData(split, seed=0, num_false=9)
    seen = []
    for position in range(len(data)):
        sample, draws = data[position]
        true, *false = sample.texts
        own = split.captions_of(sample.image)
        assert true in own and not set(false) & set(own) and len(set(false)) == 9
        assert draws is None and sample.is_match == (sample.matched == sample.image)
        seen.append((sample.image, true))
    assert sorted(seen) == sorted((split.image_of[i], text) for i, text in enumerate(split.captions))  # each once
    assert [data[position][0].is_match for position in range(4)] == [True, False, True, False]  # half and half
    assert data[3] == RetrievalData(split, seed=0, num_false=9)[3] != data[4]
    assert data[3] != RetrievalData(split, seed=1, num_false=9)[3]
    counts = np.bincount([int(text[2:]) for p in range(600) for text in data[p][0].texts[1:] if text[1] == " "])
    assert counts.min() > 0.8 * counts.max()  # uniform


def test_the_official_draws_take_true_captions_for_false_ones():
    data = RetrievalData(small_split(), seed=0, num_false=9, official_false_captions=True)
    samples = [data[position][0] for position in range(40)]
    assert any(set(s.texts[1:]) & set(data.split.captions_of(s.image)) for s in samples)


def test_the_official_prefix_tells_the_true_caption():
    sample, _ = RetrievalData(small_split(), seed=0, num_false=5, official_prefix=True)[0]
    assert [text.startswith(OFFICIAL_PROMPT) for text in sample.texts] == [True] + [False] * 5
    sample, _ = RetrievalData(small_split(), seed=0, num_false=5)[0]
    assert not any(OFFICIAL_PROMPT in text for text in sample.texts)


def test_pictures_are_augmented_by_draws_of_their_own():
    data, again = (RetrievalData(small_split(), seed=0, augment=True, num_false=5) for _ in range(2))
    (sample, draws), (same, other_draws) = data[7], again[7]
    assert sample == same == RetrievalData(small_split(), seed=0, num_false=5)[7][0]
    assert draws.random() == other_draws.random() != data[8][1].random()


def test_too_few_captions_are_refused_at_once():
    with pytest.raises(ValueError, match=r"15 false captions .* there are 13 captions of 6 pictures"):
        RetrievalData(small_split(), seed=0)


# Models


def make_model(kind):
    from transformers import ViltForImageAndTextRetrieval

    from apt_diffusion.models.meter import MeterForImageAndTextRetrieval

    torch.manual_seed(0)
    if kind == "meter":
        return MeterForImageAndTextRetrieval(meter_config()).eval()
    return ViltForImageAndTextRetrieval(make_vilt().config).eval()


def inputs(kind, images=3, texts=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = {"pixel_values": torch.randn(images, 3, 16, 16, generator=generator)}
    if kind == "vilt":
        pixels["pixel_mask"] = torch.ones(images, 16, 16, dtype=torch.long)
        pixels["pixel_mask"][1, 8:] = 0  # a picture of another shape, padded
    ids = torch.randint(3, 50, (texts, 6), generator=generator)
    mask = torch.ones(texts, 6, dtype=torch.long)
    mask[1, 3:] = 0
    return pixels, {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def rows_of(batch, *indices):
    return {name: tensor[list(indices)] for name, tensor in batch.items()}


@pytest.fixture(params=["vilt", "meter"])
def kind(request):
    return request.param


def attach_acting_apt(model):
    from conftest import randomize

    add_apt(model)
    randomize(model)
    return model


@torch.no_grad()
def test_scores_of_all_pairs_are_those_of_whole_passes(kind):
    """The cached result is the uncached one, with adapters that act."""
    model = attach_acting_apt(make_model(kind))
    pixels, texts = inputs(kind)
    pairs = []
    scored = ours.score_all_pairs(
        model, iter([rows_of(pixels, 0, 1), rows_of(pixels, 2)]),
        [rows_of(texts, 0, 1, 2), rows_of(texts, 3, 4)], pairs.append,
    )  # fmt: skip
    whole = torch.tensor(
        [[model(**rows_of(pixels, i), **rows_of(texts, c)).logits.item() for c in range(5)] for i in range(3)]
    )
    assert scored.dtype == torch.float32 and pairs == [5, 5, 5]
    torch.testing.assert_close(scored, whole, rtol=1e-5, atol=1e-6)
    assert whole.std() > 1e-3  # the scores differ


def test_each_side_is_encoded_once(monkeypatch):
    model = make_model("meter")
    pixels, texts = inputs("meter")
    calls = []
    for name in ("get_image_features", "get_text_features"):
        method = getattr(model.meter, name)
        monkeypatch.setattr(model.meter, name, lambda *a, _m=method, _n=name: calls.append((_n, len(a[0]))) or _m(*a))
    ours.score_all_pairs(model, [pixels], [rows_of(texts, 0, 1, 2), rows_of(texts, 3, 4)])
    assert calls == [("get_text_features", 3), ("get_text_features", 2), ("get_image_features", 3)]


def test_ranking_loss_is_a_cross_entropy_over_whole_passes(kind):
    model = attach_acting_apt(make_model(kind))
    pixels, _ = inputs(kind, images=2)
    _, texts = inputs(kind, texts=8)  # 1 + 3 per picture
    loss = ours.RankingObjective(model)(pixels, texts)
    logits = torch.stack(
        [model(**rows_of(pixels, row // 4), **rows_of(texts, row)).logits[0, 0] for row in range(8)]
    ).view(2, 4)
    expected = (logits.logsumexp(1) - logits[:, 0]).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    trained = [p for name, p in model.named_parameters() if ".apt." in name or "rank_output.weight" in name]
    got, wanted = torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert sum(g.abs().sum() for g in got) > 0


def test_rank_output_starts_as_the_matching_heads_yes_and_shares_nothing(kind):
    model = make_model(kind)
    head = torch.nn.Linear(model.rank_output.in_features, 2)
    ours.start_from_matching_head(model, head)
    pixels, texts = inputs(kind, images=2, texts=2)
    body = model.meter if kind == "meter" else model.vilt
    torch.manual_seed(0)
    pooled = body(**pixels, **texts).pooler_output
    torch.manual_seed(0)
    torch.testing.assert_close(model(**pixels, **texts).logits[:, 0], head(pooled)[:, 1])
    before = head.weight.clone()
    with torch.no_grad():
        model.rank_output.weight.add_(1)
    assert torch.equal(head.weight, before)


def test_the_matching_loss_joins_with_its_weight(kind):
    """Whole passes of true captions with their own picture, or another, through the frozen head."""
    model = make_model(kind)
    head = torch.nn.Linear(model.rank_output.in_features, 2)
    pixels, _ = inputs(kind, images=2)
    _, texts = inputs(kind, texts=6)
    matched, _ = inputs(kind, images=2, seed=1)
    is_match = torch.tensor([1, 0])
    body = model.meter if kind == "meter" else model.vilt
    logits = head(body(**matched, **rows_of(texts, 0, 3)).pooler_output)  # the first of three is the true one
    ranking = ours.RankingObjective(model)(pixels, texts)
    for weight in (0.5, 1.0):
        loss = ours.RankingObjective(model, head, weight)(pixels, texts, matched, is_match)
        expected = ranking + weight * F.cross_entropy(logits, is_match)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert not any(parameter.requires_grad for parameter in head.parameters())


# Recall


def brute_force(scores, image_of, k):
    """By sorting every row and column; no ties."""
    rows, columns = scores.shape
    text_hits = [
        any(image_of[c] == i for c in sorted(range(columns), key=lambda c: -scores[i, c])[:k]) for i in range(rows)
    ]
    image_hits = [image_of[c] in sorted(range(rows), key=lambda i: -scores[i, c])[:k] for c in range(columns)]
    return np.mean(text_hits), np.mean(image_hits)


def test_recall_is_what_sorting_gives():
    generator = torch.Generator().manual_seed(0)
    image_of = [0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    scores = torch.randn(8, len(image_of), generator=generator)
    scores[image_of, range(len(image_of))] += 0.8
    found = ours.recall(scores, image_of, ranks=(1, 2, 5))
    assert list(found) == [f"{way}_recall@{k}" for way in ("text", "image") for k in (1, 2, 5)]
    for k in (1, 2, 5):
        expected = brute_force(scores.numpy(), image_of, k)
        assert (found[f"text_recall@{k}"], found[f"image_recall@{k}"]) == pytest.approx(expected)
    assert 0 < found["image_recall@1"] < found["image_recall@2"] < found["image_recall@5"]


def test_equal_scores_are_no_success():
    assert set(ours.recall(torch.zeros(20, 40), [i // 2 for i in range(40)]).values()) == {0.0}
    assert ours.recall(torch.zeros(20, 20).fill_diagonal_(1), range(20))["image_recall@1"] == 1


def test_a_pictures_own_captions_do_not_compete():
    scores = torch.tensor([[2.0, 2.0, 1.0], [0.0, 0.0, 3.0]])
    assert ours.recall(scores, [0, 0, 1])["text_recall@1"] == 1


def test_recall_refuses_what_it_cannot_rank():
    with pytest.raises(ValueError, match=r"\(2, 3\) do not fit 2 captions"):
        ours.recall(torch.zeros(2, 3), [0, 1])
    with pytest.raises(ValueError, match="not finite"):
        ours.recall(torch.tensor([[float("nan"), 0], [0, 1]]), [0, 1])
