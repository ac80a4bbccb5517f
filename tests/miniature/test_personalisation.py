"""The comparison of methods that teach a thing: every method trains what it says, and a run can be repeated."""

import argparse
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import personalisation

    return personalisation


@pytest.fixture
def methods(script):
    """What is compared; `script` makes it importable."""
    import _methods

    return _methods


@pytest.fixture
def args(script, tmp_path) -> argparse.Namespace:
    """Of two steps on a shape, with five class pictures."""
    flags = "--world shapes --things tree --steps 2 --batch_size 1 --images 1 --mixed_precision bf16"
    args = script.parse_args([*flags.split(), "--output_dir", str(tmp_path)])
    script.WORLDS["shapes"].save("parcel", tmp_path / "class")
    script.prepare(args)
    return args


def test_what_is_taught_shows_in_half_precision_too(script, methods, args, monkeypatch):
    """The base model's pictures change: weights that were cast once are not used again after a step."""
    for name, method in {
        "lora": methods.lora(3e-2, 4),
        "cross-attention": methods.Method(3e-3, "cross-attention"),
        "apt": methods.apt(3e-2, 20),
    }.items():
        monkeypatch.setitem(methods.METHODS, name, method)
        result = script.run((name, "tree", 0), args)
        assert result["drift"] > 1e-3, name
        assert result["parameters"] > 1000 and set(script.WORLDS["shapes"].columns) < set(result)
    table = script.format_table([result, result | {"seed": 1}], script.WORLDS["shapes"].columns)
    assert table.splitlines()[-1].startswith(f"| apt | {result['parameters']:,} |")
    assert f"| {result['drift']:.2f} ± 0.00 |" in table


def test_inversion_learns_the_words_alone(script, methods, args):
    pipeline = script.load_pipeline("miniature", "cpu")
    before = {key: value.clone() for key, value in pipeline.text_encoder.state_dict().items()}
    lesson = script.Lesson(
        pipeline, script.WORLDS["shapes"].family, Path(args.output_dir) / "tree", Path(args.output_dir) / "class", 5
    )
    cost = script.learn(pipeline, methods.Method(1e-1, "inversion"), "sks glyph", lesson, args, 0)
    embedding = pipeline.text_encoder.get_input_embeddings()
    assert cost["parameters"] == 2 * embedding.rows.shape[1] and not embedding.rows.equal(
        embedding.embedding.weight[embedding.tokens]
    )
    kept = next(value for key, value in before.items() if key.endswith("token_embedding.weight"))
    assert torch.equal(embedding.embedding.weight, kept)
    ids = pipeline.tokenizer("a sks glyph on a red background", return_tensors="pt").input_ids
    states, plain = embedding(ids), embedding.embedding(ids)
    assert ((states - plain).abs().amax(2) > 0)[0].tolist() == [token in embedding.tokens for token in ids[0]]


def test_memory_of_a_step_is_what_autograd_keeps(script):
    """A product of a batch with a weight keeps the batch, and not the weight."""
    linear = torch.nn.Linear(8, 4, bias=False)
    family = argparse.Namespace(parts=("unet",))
    states = torch.randn(16, 8, requires_grad=True)
    meter = script.ActivationMeter(argparse.Namespace(unet=linear), family)
    with meter:
        linear(states)
    assert meter.bytes == 16 * 8 * 4


def test_parts_of_an_adapter_can_have_rates_of_their_own(script, methods):
    pipeline = script.load_pipeline("miniature", "cpu")
    method = methods.apt(1e-2, 4, {"rates": {"scale and gate": 0.5}})
    slow = {
        p for name, p in method.add(pipeline, script.WORLDS["shapes"].family, "") if "scale" in name or "gate" in name
    }
    pipeline = script.load_pipeline("miniature", "cpu")
    groups = {g["lr"]: g["params"] for g in method.attach(pipeline, script.WORLDS["shapes"].family, "")}
    assert groups.keys() == {1e-2, 5e-3}
    assert len(groups[5e-3]) == len(slow) > 0 and {p.numel() for p in groups[5e-3]} == {1}


def test_what_class_pictures_hold_on_to_is_the_base_models_prediction(script, methods, args, monkeypatch):
    """An adapter that changes nothing yet then has no gradient from class pictures."""
    for keeps, changed in ((True, False), (False, True)):
        pipeline = script.load_pipeline("miniature", "cpu")
        folder = Path(args.output_dir)
        lesson = script.Lesson(pipeline, script.WORLDS["shapes"].family, folder / "tree", folder / "class", 5)
        monkeypatch.setattr(args, "batch_size", 0)  # pictures of the thing
        monkeypatch.setattr(lesson, "batch", lambda generator, size, own=lesson.batch: own(generator, 1))
        script.learn(pipeline, methods.apt(1e-2, 4, {"keeps_predictions": keeps}), "sks glyph", lesson, args, 0)
        gates = [p for name, p in pipeline.unet.named_parameters() if name.endswith(".gate")]
        assert any(gate.item() != 0 for gate in gates) == changed


def test_things_and_numbers_of_pictures_are_checked(script, capsys):
    for flags, words in (
        (["--things", "mushroom"], "no such thing: mushroom; there are teddy bear"),
        (["--pictures", "6"], "--pictures must be from 1 to 5, not 6"),
    ):
        with pytest.raises(SystemExit):
            script.parse_args(flags)
        assert words in capsys.readouterr().err
