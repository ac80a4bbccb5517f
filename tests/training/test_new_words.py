"""`--new_tokens`: only the new embeddings learn, files bring the words to pipelines, and unloading takes them away."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import draw
from safetensors.torch import load_file, save_file
from support.training_helpers import WEIGHTS, assert_same_adapter, header, losses, tensors, train

from apt_diffusion import (
    StableDiffusion3APTPipeline,
    StableDiffusionAPTPipeline,
    StableDiffusionXLAPTPipeline,
    load_apt_weights,
    remove_apt,
)
from apt_diffusion.convert.peft import apt_to_peft
from apt_diffusion.io.files import read_adapter_file
from apt_diffusion.training.text_to_image.bases import open_base
from apt_diffusion.training.text_to_image.prompts import Prompts
from apt_diffusion.words import add_words, words_of

PROMPT = "a <sks> glyph <big>"
RUN = {
    "new_tokens": ["<sks>", "<big>"], "new_tokens_initializer": ["dog", "large"], "new_tokens_lr": 0.1,
    "instance_prompt": PROMPT, "max_train_steps": 3,
}  # fmt: skip
ROWS = "text_encoder.apt_words"


@pytest.fixture
def trained(go):
    return go(**RUN)


# Training


def test_only_the_new_embeddings_learn(pipe, trained):
    found = tensors(trained)
    table = pipe.text_encoder.get_input_embeddings().weight
    ids = pipe.tokenizer("dog", add_special_tokens=False).input_ids
    start = table[ids].mean(0)
    assert found[ROWS].shape == (2, 32) and found[ROWS].dtype == torch.float32
    assert 0.05 < (found[ROWS][0] - start).abs().max() < 0.5  # three steps of AdamW at 0.1
    assert json.loads(header(trained)["apt_words"]) == ["<sks>", "<big>"]
    others = [key for key in found if key != ROWS]
    assert others and all(key.startswith("unet.") for key in others)


def test_the_base_is_untouched_and_gets_no_gradient(pipe):
    encoder = pipe.text_encoder.requires_grad_(False)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    ids = pipe.tokenizer(["a glyph", "glyph"], padding="max_length", return_tensors="pt").input_ids
    plain = encoder(ids)
    tokenizer = add_words(encoder, pipe.tokenizer, "x", ["<sks>"], torch.randn(1, 32))
    again = encoder(ids)
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])
    new = tokenizer(["a <sks> glyph"], padding="max_length", return_tensors="pt").input_ids
    assert (new >= 514).sum() == 1 and (pipe.tokenizer("<sks>").input_ids != tokenizer("<sks>").input_ids)
    states = encoder(new)[0]
    assert not torch.allclose(states[0, 1:], plain[0][0, 1:])
    states.sum().backward()
    with_gradient = [name for name, parameter in encoder.named_parameters() if parameter.grad is not None]
    assert len(with_gradient) == 1 and with_gradient[0].endswith("apt_words.rows.x")
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in before.items())


def test_the_new_embedding_is_that_of_a_longer_table(pipe):
    """transformers' own way: the table resized, the row written."""
    from transformers import CLIPTextModel

    row = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    own = CLIPTextModel(pipe.text_encoder.config).eval()
    own.load_state_dict(pipe.text_encoder.state_dict())
    tokenizer = add_words(pipe.text_encoder, pipe.tokenizer, "x", ["<sks>"], row)
    own.resize_token_embeddings(len(tokenizer))
    own.get_input_embeddings().weight.data[-1] = row
    ids = tokenizer(["<sks> and a <sks>"], padding="max_length", return_tensors="pt").input_ids
    ours, theirs = pipe.text_encoder(ids), own(ids)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_the_pooled_text_is_still_that_of_the_end(pipe):
    """CLIP's old settings take the token with the highest id for the end of the text; a new word's is higher."""
    pipe.text_encoder.eos_token_id = 2
    before = pipe.text_encoder(pipe.tokenizer(["a dog"], padding="max_length", return_tensors="pt").input_ids)[1]
    taught = add_words(pipe.text_encoder, pipe.tokenizer, "x", ["<sks>"], torch.randn(1, 32))
    ids = taught(["a <sks> dog"], padding="max_length", return_tensors="pt").input_ids
    states, pooled = pipe.text_encoder(ids)[:2]
    assert torch.equal(pooled[0], states[0, ids[0].tolist().index(513)])
    ids = taught(["a dog"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(pipe.text_encoder(ids)[1], before)


def test_a_plain_word_is_not_found_inside_others(pipe):
    taught = add_words(pipe.text_encoder, pipe.tokenizer, "x", ["sks"], torch.randn(1, 32))
    assert taught.tokenize("a sks, asksy") == ["a</w>", "sks", *pipe.tokenizer.tokenize(", asksy")]


def test_a_random_start_follows_the_seed(go):
    flags = RUN | {"new_tokens_initializer": None, "new_tokens_lr": 0.0}
    first, second, other = go(**flags), go(**flags), go(**flags, seed=1)
    assert torch.equal(tensors(first)[ROWS], tensors(second)[ROWS])
    assert not torch.equal(tensors(first)[ROWS], tensors(other)[ROWS])


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"train_text_encoder": True, "use_ema": True, "gradient_checkpointing": True}])
def test_a_resumed_run_ends_where_it_would_have(go, more):
    flags = RUN | {"max_train_steps": 4, "checkpointing_steps": 2} | more
    straight = go("straight", **flags)
    go("parts", **flags | {"max_train_steps": 2})
    parts = go("parts", **flags, resume_from_checkpoint="latest")
    assert_same_adapter(straight, parts)
    assert losses(straight) == losses(parts)
    with pytest.raises(ValueError, match=r"has the new words .*, this run trains \['<other>'\]"):
        go("parts", **flags | {"new_tokens": ["<other>"], "new_tokens_initializer": None, "max_train_steps": 6},
           resume_from_checkpoint="latest")  # fmt: skip


def test_a_run_without_words_writes_what_it_wrote(go):
    assert ROWS not in tensors(go()) and "apt_words" not in header(go())


def test_prompts_without_the_words_are_named(go, caplog):
    go(**RUN | {"instance_prompt": "a glyph", "max_train_steps": 1})
    assert "have none of the words of --new_tokens (<sks> <big>)" in caplog.text
    caplog.clear()
    go(
        **RUN
        | {"new_tokens": ["zyx"], "new_tokens_initializer": None, "instance_prompt": "two zyxs", "max_train_steps": 1}
    )
    assert "have none of the words of --new_tokens (zyx)" in caplog.text
    caplog.clear()
    go(
        **RUN
        | {
            "new_tokens": ["zyx"],
            "new_tokens_initializer": None,
            "instance_prompt": "a ZYX, twice",
            "max_train_steps": 1,
        }
    )
    assert "have none of the words" not in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"new_tokens_lr": 1e-3}, "--new_tokens_lr needs --new_tokens"),
        ({"new_tokens_initializer": ["dog"]}, "--new_tokens_initializer needs --new_tokens"),
        ({"new_tokens": ["<a>"], "cache_text_embeddings": True}, "--new_tokens changes the text embeddings"),
        ({"new_tokens": ["<a>"], "new_tokens_initializer": ["b", "c"]}, "has 2 words for 1 of --new_tokens"),
        ({"new_tokens": ["two words"]}, "one short word without blanks, got 'two words'"),
        ({"new_tokens": ["<Anna>"]}, "CLIP's tokenizers read small letters only, got '<Anna>'"),
        ({"new_tokens": ["<a>", "<a>"]}, "must be different ones"),
        ({"new_tokens": ["<a>", "<a>_12"]}, "To diffusers '<a>_12' is a part of another word"),
        ({"new_tokens": ["<|endoftext|>"]}, "is a word that the tokenizer knows already"),
    ],
)
def test_words_that_cannot_be_trained_are_refused(go, no_models, flags, message):
    with pytest.raises(ValueError) as error:
        go(**flags)
    assert message in str(error.value)


def test_language_models_learn_no_words(tiny_transformer_path, instance_dir, tmp_path):
    with pytest.raises(ValueError, match="--new_tokens is for Stable Diffusion 1, 2, XL and 3"):
        train(tiny_transformer_path("flux"), instance_dir, tmp_path / "out", resolution=16, new_tokens=["<a>"])


# Pipelines


def embeddings_in_training(path, out, prompt):
    """As a step of the trainer computes them."""
    base = open_base(str(path))
    encoders = base.text_encoders(torch.float32)
    prompts = Prompts([("", prompt)], base, new_words=RUN["new_tokens"])
    file = read_adapter_file(out / WEIGHTS, with_words=True)
    for part, rows in file.word_rows.items():
        add_words(encoders[part], prompts.own_tokenizers[part], "default", file.words, rows)
    with torch.no_grad():
        return prompts([prompt], encoders)


def test_a_pipeline_reads_prompts_as_in_training_and_forgets_the_words(pipe, tiny_sd_path, trained):
    before, tokenizer = draw(pipe, PROMPT), pipe.tokenizer
    state = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    pipe.load_apt_weights(trained)
    expected = embeddings_in_training(tiny_sd_path, trained, PROMPT)["prompt_embeds"]
    assert torch.equal(pipe.encode_prompt(PROMPT, "cpu", 1, False)[0], expected)
    assert not np.allclose(draw(pipe, PROMPT, apt_scale=0.0), before)  # a word is known whatever the scale
    pipe.unload_apt_weights()
    assert pipe.tokenizer is tokenizer and np.array_equal(draw(pipe, PROMPT), before)
    assert pipe.text_encoder.state_dict().keys() == state.keys() and words_of(pipe.text_encoder) is None
    assert not any(module._forward_pre_hooks for module in pipe.text_encoder.modules())


@pytest.mark.slow
def test_sdxl_learns_words_in_both_text_encoders(tiny_sdxl_path, instance_dir, tmp_path):
    out = train(tiny_sdxl_path, instance_dir, tmp_path / "xl", **RUN)
    assert {ROWS, "text_encoder_2.apt_words"} <= tensors(out).keys()
    pipeline = StableDiffusionXLAPTPipeline.from_pretrained(tiny_sdxl_path)
    pipeline.load_apt_weights(out)
    expected = embeddings_in_training(tiny_sdxl_path, out, PROMPT)
    found = pipeline.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(found[0], expected["prompt_embeds"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2], expected["pooled_prompt_embeds"], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_stable_diffusion_3_learns_words_in_clip(instance_dir, tmp_path):
    flags = RUN | {"new_tokens_initializer": None, "resolution": 32, "max_sequence_length": 24}
    out = train("miniature-sd3", instance_dir, tmp_path / "sd3", **flags)
    assert {key for key in tensors(out) if "words" in key} == {ROWS, "text_encoder_2.apt_words"}
    pipeline = StableDiffusion3APTPipeline.from_pretrained("miniature-sd3")
    plain = pipeline.encode_prompt(PROMPT, None, None, max_sequence_length=24)[0]
    pipeline.load_apt_weights(out)
    assert not torch.allclose(pipeline.encode_prompt(PROMPT, None, None, max_sequence_length=24)[0], plain)


def relabelled(source, folder, words):
    """A copy of an adapter with other words."""
    metadata = header(source) | {"apt_words": json.dumps(words)}
    folder.mkdir()
    save_file(load_file(source / WEIGHTS), folder / WEIGHTS, metadata=metadata)
    return folder


def test_two_adapters_have_words_of_their_own(pipe, trained, tmp_path):
    other = relabelled(trained, tmp_path / "other", ["<cat>", "<blue>"])
    pipe.load_apt_weights(trained, "a")
    alone = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    with pytest.raises(ValueError, match="Another adapter has the word '<sks>', too: unload that one first"):
        pipe.load_apt_weights(trained, "b")
    assert pipe.get_list_apt_adapters() == {"unet": ["a"]}
    pipe.load_apt_weights(other, "b")
    assert torch.equal(pipe.encode_prompt(PROMPT, "cpu", 1, False)[0], alone)
    both = pipe.encode_prompt("<cat> <blue>", "cpu", 1, False)[0]
    assert torch.equal(both, pipe.encode_prompt("<sks> <big>", "cpu", 1, False)[0])  # the rows are the same
    pipe.delete_apt_adapters("a")  # the other's tokens get other ids, and the same meaning
    assert torch.equal(pipe.encode_prompt("<cat> <blue>", "cpu", 1, False)[0], both)
    assert len(pipe.tokenizer) == 516


def test_a_saved_pipeline_has_its_own_table_and_the_words_come_back(pipe, tiny_sd_path, trained, tmp_path):
    pipe.load_apt_weights(trained)
    expected = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    pipe.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "text_encoder" / "model.safetensors")
    assert stored.keys() == load_file(tiny_sd_path / "text_encoder" / "model.safetensors").keys()
    again = StableDiffusionAPTPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.encode_prompt(PROMPT, "cpu", 1, False)[0], expected)
    again.save_apt_weights(tmp_path / "copy")
    assert_same_adapter(trained, tmp_path / "copy")
    assert torch.equal(pipe.encode_prompt(PROMPT, "cpu", 1, False)[0], expected)


def test_what_cannot_learn_words_says_so(pipe, trained, tmp_path):
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    with pytest.raises(ValueError, match="has new words for text_encoder, but there is no text_encoder with a tokeni"):
        load_apt_weights(models, trained)
    assert pipe.get_list_apt_adapters() == {}
    with pytest.raises(ValueError, match=r"brings new words \(<sks>, <big>\), which only tokenizers can learn"):
        apt_to_peft(trained, tmp_path / "peft")
    pipe.load_apt_weights(trained)
    with pytest.raises(ValueError, match="adapters with new words cannot be swapped in place"):
        pipe.load_apt_weights(trained, hotswap=True)
    with pytest.raises(ValueError, match="remove it from the pipeline, whose tokenizers know them"):
        remove_apt(pipe.text_encoder)
    assert words_of(pipe.text_encoder) is not None
    tampered = relabelled(trained, tmp_path / "short", ["<only>"])
    fresh = StableDiffusionAPTPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(
        ValueError, match=r"The new words do not fit: text_encoder needs others than rows of \(2, 32\)"
    ):
        fresh.load_apt_weights(tampered, "short")
    assert "short" not in str(fresh.get_list_apt_adapters())


def test_old_words_of_a_file_are_checked(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "none", ignore=shutil.ignore_patterns("checkpoint*", "logs"))
    metadata = {key: value for key, value in header(trained).items() if key != "apt_words"}
    save_file(load_file(trained / WEIGHTS), folder / WEIGHTS, metadata=metadata)
    with pytest.raises(ValueError, match="is damaged: it has new words without embeddings, or the other way round"):
        read_adapter_file(folder / WEIGHTS, with_words=True)
