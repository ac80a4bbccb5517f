"""Conversion of official checkpoints against a plain forward pass on the official tensors themselves."""

import shutil
import sys
import types
from collections import namedtuple

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.official_helpers import (
    GRID,
    LAYERS,
    PATCH,
    PROMPTS,
    RANK,
    classify,
    inputs,
    linear,
    make_meter_state,
    make_vilt_state,
    meter_features,
    resize_table,
    vilt_features,
)

import apt_diffusion as apt
from apt_diffusion.convert.__main__ import main
from apt_diffusion.convert.checkpoint import read_checkpoint
from apt_diffusion.convert.conversion import convert, convert_state
from apt_diffusion.model import ModelAdapters
from apt_diffusion.models import meter as our_meter
from apt_diffusion.models.retrieval import load_matching_head
from apt_diffusion.models.vilt import add_classifier_token

MAKE = {"meter": make_meter_state, "vilt": make_vilt_state}
FEATURES = {"meter": meter_features, "vilt": vilt_features}
KINDS = {"vqa": "QuestionAnswering", "nlvr2": "ImagesAndTextClassification", "retrieval": "ImageAndTextRetrieval"}
TABLE = "vit_model.visual.positional_embedding"


def class_of(model_type, kind):
    return getattr(our_meter, f"Meter{kind}") if model_type == "meter" else getattr(transformers, f"Vilt{kind}")


def write(state, path, **more):
    """As Lightning does, with what else its files hold."""
    torch.save({"epoch": 9, "global_step": 1000, "hyper_parameters": {"lr": 1e-5}, "state_dict": state} | more, path)
    return path


@torch.no_grad()
def run(model, model_type, images=1, size=PATCH * GRID):
    torch.manual_seed(0)  # ViLT takes its patches in random order
    ids, mask, pixels = inputs(images, size)
    return model.eval()(input_ids=ids, attention_mask=mask, pixel_values=pixels)


def expected_logits(state, model_type, task):
    """From the official tensors alone."""
    ids, mask, pixels = inputs(2 if task == "nlvr2" else 1)
    if task == "nlvr2":
        passes = [FEATURES[model_type](state, ids, mask, pixels[:, i], kind=i + 1) for i in range(2)]
        return classify(state, "nlvr2_classifier", torch.cat(passes, -1))
    features = FEATURES[model_type](state, ids, mask, pixels)
    if task == "vqa":
        return classify(state, "vqa_classifier", features)
    return linear({key: tensor.double() for key, tensor in state.items()}, "rank_output", features)


def close(found, expected, tolerance=5e-6):
    assert expected.abs().max() > 0.05
    return (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("model_type", MAKE)
def test_a_pretrained_checkpoint(model_type, tmp_path):
    state = MAKE[model_type]()
    account = convert(write(state, tmp_path / "official.ckpt"), tmp_path / "out")
    model = class_of(model_type, "Model").from_pretrained(tmp_path / "out")
    assert close(run(model, model_type).pooler_output, FEATURES[model_type](state, *inputs()))
    head = load_matching_head(tmp_path / "out")
    assert torch.equal(head.weight, state["itm_score.fc.weight"]) and torch.equal(
        head.bias, state["itm_score.fc.bias"]
    )
    fates = {key: fate for key, _, fate in account.entries}
    assert fates.keys() == state.keys()
    dropped = {key for key, fate in fates.items() if fate.startswith("dropped: ")}
    constant = {"text_transformer.embeddings.position_ids", "text_embeddings.position_ids"}
    assert constant & set(state) <= dropped and all(
        key in constant
        or key.startswith(("mlm_score.", "vit_model.positional", "vit_model.ln_final", "text_transformer.p"))
        for key in dropped
    )
    assert fates["itm_score.fc.bias"] == "-> matching_head.bias (own file)"
    text = (tmp_path / "out" / "conversion.txt").read_text()
    assert all(key in text for key in state) and "From official.ckpt" in text


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("model_type", MAKE)
def test_a_fine_tuned_checkpoint(model_type, task, tmp_path):
    state = MAKE[model_type](task, images=2 if task == "nlvr2" else 1)
    convert(write(state, tmp_path / "official.ckpt"), tmp_path / "out")
    model = class_of(model_type, f"For{KINDS[task]}").from_pretrained(tmp_path / "out")
    logits = run(model, model_type, 2 if task == "nlvr2" else 1).logits
    assert close(logits, expected_logits(state, model_type, task))
    base = class_of(model_type, "Model").from_pretrained(tmp_path / "out")
    assert close(run(base, model_type).pooler_output, FEATURES[model_type](state, *inputs()))


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("model_type", MAKE)
def test_a_checkpoint_with_apt(model_type, task, tmp_path):
    images = 2 if task == "nlvr2" else 1
    state = MAKE[model_type](task, apt=True, images=images)
    convert(write(state, tmp_path / "official.ckpt"), tmp_path / "out")
    expected = expected_logits(state, model_type, task)
    cls = class_of(model_type, f"For{KINDS[task]}")
    model = cls.from_pretrained(tmp_path / "out")
    if model_type == "vilt":
        add_classifier_token(model, cls_token_id=0)
    without = run(model, model_type, images).logits
    names = apt.load_apt_weights(model, tmp_path / "out")
    assert len(names) == (4 * LAYERS if model_type == "meter" else LAYERS)
    assert close(run(model, model_type, images).logits, expected)
    assert not close(without, expected, 1e-2)
    config = ModelAdapters.of(model).configs["default"]
    assert (config.num_prompts, config.rank, config.init) == (PROMPTS, RANK, "paper")

    # The file alone, on the model that the checkpoint was fine-tuned from: heads, poolers and tables are in it.
    before = {key: tensor for key, tensor in state.items() if "APT" not in key and key != "token4classifier"}
    trained = ("pooler", "token_type_embeddings", f"{task}_classifier", "rank_output")
    for key in before:
        if any(name in key for name in trained) and not key.startswith("text_transformer"):
            before[key] = torch.randn_like(before[key])
    other = convert_state(before).model
    if model_type == "meter":
        other.save_pretrained(tmp_path / "before")
        other = cls.from_pretrained(tmp_path / "before", use_classifier_token=True)
    else:
        add_classifier_token(other, cls_token_id=0)
    apt.load_apt_weights(other, tmp_path / "out")
    assert close(run(other, model_type, images).logits, expected)


def test_image_positions_are_resized_as_the_official_code_does(tmp_path):
    state = make_meter_state()
    for grid in (2, 5):
        out = tmp_path / str(grid)
        account = convert(write(state, tmp_path / "official.ckpt"), out, image_size=grid * PATCH)
        model = our_meter.MeterModel.from_pretrained(out)
        resized = state | {TABLE: resize_table(state[TABLE], grid)}
        table = model.vision_model.embeddings.position_embedding.weight.double()
        assert (
            torch.allclose(table, resized[TABLE], atol=1e-5) and model.config.vision_config.image_size == grid * PATCH
        )
        assert close(
            run(model, "meter", size=grid * PATCH).pooler_output, meter_features(resized, *inputs(1, grid * PATCH))
        )
        assert account.made[0][1] == f"{GRID**2 + 1} positions resized to {grid**2 + 1}, bicubic"


@pytest.mark.parametrize("model_type", MAKE)
def test_retrieval_starts_from_the_matching_head(model_type):
    state = MAKE[model_type]()
    converted = convert_state(state, task="retrieval")
    head = {"rank_output.weight": state["itm_score.fc.weight"][1:], "rank_output.bias": state["itm_score.fc.bias"][1:]}
    assert close(run(converted.model, model_type).logits, expected_logits(state | head, model_type, "retrieval"))
    assert [source for _, source in converted.account.made] == ["row 1 (they match) of itm_score.fc"] * 2


def test_masked_words_of_vilt():
    state = make_vilt_state()
    model = convert_state(state, task="mlm").model.eval()
    x = torch.randn(2, 3, 128, dtype=torch.float64)
    double = {key: tensor.double() for key, tensor in state.items()}
    hidden = torch.nn.functional.gelu(linear(double, "mlm_score.transform.dense", x))
    layer = "mlm_score.transform.LayerNorm"
    hidden = torch.nn.functional.layer_norm(hidden, (128,), double[f"{layer}.weight"], double[f"{layer}.bias"], 1e-12)
    expected = hidden @ double["mlm_score.decoder.weight"].T + double["mlm_score.bias"]
    with torch.no_grad():
        assert close(model.double().mlm_score(x), expected, 1e-10)
    assert run(model.float(), "vilt").logits.shape == (2, 5, 60)


def test_norms_of_vilt_have_the_official_epsilons(tmp_path):
    """1e-6 in the blocks, 1e-12 where the norms are BERT's; small states would show another one."""
    state = make_vilt_state()
    for key in ("word", "position", "token_type"):
        state[f"text_embeddings.{key}_embeddings.weight"] *= 2e-3
    for key in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "cls_token"):
        state[f"transformer.{key}"] *= 2e-3
    state["token_type_embeddings.weight"] *= 2e-3
    state["text_embeddings.LayerNorm.weight"] *= 1e-3
    state["text_embeddings.LayerNorm.bias"] *= 1e-3
    expected = vilt_features(state, *inputs())
    assert close(run(convert_state(state).model, "vilt").pooler_output, expected, 2e-5)

    from apt_diffusion.models.vilt import use_text_epsilon

    convert(write(state, tmp_path / "official.ckpt"), tmp_path / "out")
    model = transformers.ViltModel.from_pretrained(tmp_path / "out")
    use_text_epsilon(model, model.config.text_layer_norm_eps)
    assert close(run(model, "vilt").pooler_output, expected, 2e-5)
    for other in (1e-12, 1e-5):
        wrong = transformers.ViltModel.from_pretrained(tmp_path / "out", layer_norm_eps=other)
        assert not close(run(wrong, "vilt").pooler_output, expected, 1e-4)


def test_processors_are_written_where_a_tokenizer_is_named(tmp_path):
    from conftest import make_tokenizer

    from apt_diffusion.data.processors import load_processor

    make_tokenizer(tmp_path / "words")
    convert(
        write(make_meter_state(), tmp_path / "a.ckpt"), tmp_path / "out", image_size=16, tokenizer=tmp_path / "words"
    )
    processor = load_processor("meter", tmp_path / "out")
    assert processor.image_processor.crop_size["height"] == 16
    assert processor.tokenizer("a cat")["input_ids"][0] == 512


class Payload:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_files_that_are_no_such_checkpoint(tmp_path, capsys):
    good = write(make_vilt_state(), tmp_path / "good.ckpt")
    save_file({"a": torch.ones(3)}, tmp_path / "good.safetensors")
    cases = {
        "text.ckpt": b"hello, this is no checkpoint",
        "empty.ckpt": b"",
        "cut.ckpt": good.read_bytes()[:20_000],
        "picture.ckpt": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "adapter.ckpt": good.with_suffix(".safetensors").read_bytes(),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{name} cannot be read as a PyTorch checkpoint: it is cut off, damaged"
        ):
            read_checkpoint(tmp_path / name)
    for content in ({"state_dict": {}}, {"epoch": 1}, [1, 2], {"state_dict": {"a": 1}}):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match=r"holds no `state_dict` of tensors"):
            read_checkpoint(tmp_path / "other.ckpt")
    write(make_vilt_state(), tmp_path / "code.ckpt", callbacks=Payload())
    with pytest.raises(ValueError, match=r"would run code from the file \(GLOBAL print\).*keep its tensors only"):
        read_checkpoint(tmp_path / "code.ckpt")
    assert "must not run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no file"):
        read_checkpoint(tmp_path / "absent.ckpt")


def test_lightnings_own_classes_are_read_as_shells(tmp_path, monkeypatch):
    """Lightning keys the state of a callback by its class, which need not be installed here."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    checkpoint_class = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = checkpoint_class
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = make_vilt_state()
    file = write(state, tmp_path / "lightning.ckpt", callbacks={checkpoint_class: {"best_model_score": torch.ones(1)}})
    monkeypatch.undo()
    assert "pytorch_lightning" not in sys.modules
    assert read_checkpoint(file).keys() == state.keys()


@pytest.mark.parametrize(
    "module", ["pytorch_lightning.utilities.parsing", "lightning_fabric.utilities.data", "lightning.fabric.utilities"]
)
def test_hyper_parameters_in_lightnings_own_dict(tmp_path, monkeypatch, module):
    """Pickled as Lightning pickles them: an instance of a subclass of dict, with items and with attributes."""
    parts = module.split(".")
    modules = {".".join(parts[: end + 1]): types.ModuleType(".".join(parts[: end + 1])) for end in range(len(parts))}
    attribute_dict = type("AttributeDict", (dict,), {"__module__": module})
    modules[module].AttributeDict = attribute_dict
    for name, value in modules.items():
        monkeypatch.setitem(sys.modules, name, value)
    settings = attribute_dict(config={"loss_names": {"vqa": 1}, "datasets": ["vqa"]}, lr=1e-4)
    with_state = attribute_dict(empty=attribute_dict())
    with_state.extra = 3
    state = make_vilt_state()
    file = write(state, tmp_path / "lightning.ckpt", hyper_parameters=settings, callbacks=[with_state])
    monkeypatch.undo()
    assert module not in sys.modules
    found = read_checkpoint(file)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


def test_checkpoints_that_do_not_fit(tmp_path):
    state = make_meter_state("vqa")
    cases = [
        ({"a.weight": torch.ones(2)}, "neither METER nor ViLT.*a.weight"),
        (
            state | {"cross_modal_text_layers.0.lora_q.A": torch.ones(2)},
            "1 of .* keys are unknown: cross_modal.*lora_q",
        ),
        ({k: v for k, v in state.items() if "ln_post" not in k}, "lacks 2 tensors of MeterForQuestionAnswering"),
        ({k: v for k, v in state.items() if "conv1" not in k}, r"lacks vit_model\.visual\.conv1\.weight"),
        (
            state | {"cross_modal_text_pooler.dense.bias": torch.ones(3)},
            r"pooler\.dense\.bias is \(3,\), not \(128,\)",
        ),
        (state | {TABLE: torch.ones(9, 128)}, "9 image positions are no square grid"),
        (make_vilt_state("vqa") | {"token4classifier": torch.ones(1, 1, 128)}, "token4classifier but no APT"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            convert(write(wrong, tmp_path / "wrong.ckpt"), tmp_path / "out")
    partial = make_meter_state("vqa", apt=True)
    del partial["cross_modal_image_layers.1.crossattention.output.APT.mm_tokens"]
    with pytest.raises(ValueError, match=r"crossattention\.apt\.prompts is missing"):
        convert(write(partial, tmp_path / "wrong.ckpt"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"no head for 'nlvr2', only for \['base', 'vqa'\]"):
        convert_state(state, task="nlvr2")
    with pytest.raises(ValueError, match="image_size 21 is no multiple of the patch size 8"):
        convert_state(state, image_size=21)
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["wrong.ckpt"]


def test_the_command(tmp_path, capsys, monkeypatch):
    file = write(make_meter_state("vqa", apt=True), tmp_path / "apt.ckpt")
    assert main([str(file), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "vit_model.ln_final.bias (16,) dropped: left over from CLIP's text tower" in printed
    assert "resblocks.0.attn.in_proj_bias (384,) -> vision_model.encoder.layers.0.self_attn.q_proj.bias, " in printed
    assert "output.APT.mm.0.weight (2, 128) -> cross_modal_text_layers.0.attention.apt.low_rank_down" in printed
    assert list(tmp_path.iterdir()) == [file]
    assert main([str(file), str(tmp_path / "out")]) == 0
    assert "keys: " in capsys.readouterr().out
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "model.safetensors", "pytorch_apt_weights.safetensors", "conversion.txt"}
    assert main([str(file), str(tmp_path / "out")]) == 1
    assert "exists: choose a new folder" in capsys.readouterr().err
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 1000))
    assert main([str(file), str(tmp_path / "second")]) == 1
    assert "No space for" in capsys.readouterr().err and not (tmp_path / "second").exists()
    with pytest.raises(SystemExit):
        main([str(file)])
