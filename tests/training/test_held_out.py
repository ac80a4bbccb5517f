"""Held-out pictures: which they are, what is measured, that measuring changes nothing, and which adapter is kept."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.training_helpers import assert_same_adapter, losses, tensors, train

from apt_diffusion.data.dreambooth import Framing
from apt_diffusion.data.held_out import TIMESTEPS, HeldOutData, split_off
from apt_diffusion.data.order import Purpose, random_at
from apt_diffusion.data.pictures import Picture


def measured(folder) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["validation_loss"] for row in rows}


@pytest.fixture
def go(tiny_sd_path, instance_dir, tmp_path):
    def run(out, **flags):
        return train(tiny_sd_path, instance_dir, tmp_path / out, **flags)

    return run


def pictures(tmp_path, count):
    return [Picture(tmp_path / f"{index}.png", f"number {index}", 40, 50) for index in range(count)]


def test_a_share_is_split_off_by_the_seed(tmp_path):
    of_ten = pictures(tmp_path, 10)
    trained, held_out = split_off(of_ten * 3, 0.3, seed=1)  # each three times, as in a folder that repeats them
    assert len(held_out) == 3 and len(trained) == 21 and not set(trained) & set(held_out)
    assert split_off(of_ten, 0.3, seed=1)[1] == held_out != split_off(of_ten, 0.3, seed=2)[1]
    for share in (0.01, 0.99):
        assert all(split_off(of_ten[:2], share, seed=0))  # never none
    with pytest.raises(ValueError, match="--validation_split needs two pictures"):
        split_off(of_ten[:1] * 5, 0.5, seed=0)


def test_a_picture_of_two_folders_is_held_out_of_both(tmp_path):
    of_four = pictures(tmp_path, 4)
    elsewhere = [dataclasses.replace(picture, caption="another prompt") for picture in of_four]
    trained, held_out = split_off([*of_four, *elsewhere], 0.25, seed=0)
    assert len(held_out) == 2 and len({picture.path for picture in held_out}) == 1
    assert not {picture.path for picture in trained} & {picture.path for picture in held_out} and len(trained) == 6


def test_timesteps_are_spread_and_noise_is_fixed(tmp_path):
    found = HeldOutData(pictures(tmp_path, 2), Framing(32, random_flip=True), (4, 8, 8), 1000)
    found.cache = {view: torch.zeros(2, 4, 8, 8) for index in range(len(found)) for view in found.views_at(index)}
    samples = [found[index][0] for index in range(len(found))]
    assert [sample.timestep for sample in samples] == [62, 187, 312, 437, 562, 687, 812, 937] * 2
    assert len(samples) == 2 * TIMESTEPS and [sample.prompt for sample in samples[7:9]] == ["number 0", "number 1"]
    noises = torch.stack([sample.noise for sample in samples])
    assert len(torch.unique(noises[:, 0, 0, 0])) == len(samples)
    assert torch.equal(noises[3], found[3][0].noise)
    assert not any(view.flipped for view in found.cache)


@pytest.mark.slow
def test_the_loss_is_that_of_the_model_alone(go, tiny_sd_path, instance_dir):
    """Against diffusers' own noise schedule, VAE and UNet, with an adapter that changes nothing yet."""
    from diffusers import StableDiffusionPipeline

    out = go("out", validation_split=0.2, learning_rate=1e-12, max_train_steps=1)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_path)
    found = []  # for each picture, as it is not written down which was held out
    with torch.no_grad():
        states = pipe.encode_prompt("a sks glyph", "cpu", 1, False)[0]
        for path in sorted(instance_dir.iterdir()):
            image = Image.open(path).resize((32, 32), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            posterior = pipe.vae.encode(pixels).latent_dist
            errors = []
            for index in range(TIMESTEPS):
                timestep = torch.tensor([int((index + 0.5) / TIMESTEPS * 1000)])
                draws = random_at(0, index, Purpose.SAMPLE).standard_normal((2, 4, 8, 8), dtype=np.float32)
                sampled, noise = torch.from_numpy(draws)
                latents = (posterior.mean + posterior.std * sampled) * pipe.vae.config.scaling_factor
                noisy = pipe.scheduler.add_noise(latents, noise[None], timestep)
                errors.append((pipe.unet(noisy, timestep, states).sample - noise).square().mean())
            found.append(torch.stack(errors).mean().item())
    distances = sorted(abs(value - measured(out)[1]) for value in found)
    assert distances[0] < 1e-5 and distances[1] > 1e-4


def test_measuring_changes_nothing_and_is_logged_plotted_and_in_the_card(go):
    flags = {"max_train_steps": 4, "lora_dropout": 0.3, "validation_split": 0.2}
    often = go("often", validation_steps=1, **flags)
    once = go("once", **flags)
    assert_same_adapter(often, once)
    assert losses(often) == losses(once)
    assert list(measured(often)) == [1, 2, 3, 4] and measured(often)[4] == measured(once)[4]
    assert "| validation_loss |" in (often / "README.md").read_text()
    plots = [np.asarray(Image.open(out / "loss.png").convert("RGB")).astype(int) for out in (often, once)]
    orange = [np.abs(plot - (255, 127, 14)).sum(-1).min() for plot in plots]
    assert max(orange) < 30  # the curve of held-out pictures


@pytest.mark.slow
def test_a_resumed_run_measures_the_same(go):
    flags = {"validation_split": 0.4, "validation_steps": 1, "keep_best": True, "learning_rate": 0.1}
    straight = go("straight", max_train_steps=4, **flags)
    go("parts", max_train_steps=2, **flags)
    parts = go("parts", max_train_steps=4, resume_from_checkpoint="latest", **flags)
    assert measured(straight) == measured(parts) and len(measured(parts)) == 4
    assert_same_adapter(straight / "best", parts / "best")


def test_the_best_adapter_comes_along_to_another_folder(go):
    flags = {"validation_split": 0.4, "validation_steps": 1, "keep_best": True, "checkpointing_steps": 1}
    first = go("first", max_train_steps=3, learning_rate=0.02, **flags)
    lowest = min(measured(first), key=measured(first).get)
    second = go("second", max_train_steps=4, learning_rate=5.0, resume_from_checkpoint=first / "checkpoint-3", **flags)
    assert min(measured(second), key=measured(second).get) == lowest
    assert_same_adapter(second / "best", first / "best")
    third = go("third", max_train_steps=2, resume_from_checkpoint=first / "checkpoint-1", learning_rate=5.0, **flags)
    best = min(measured(third), key=measured(third).get)
    assert_same_adapter(third / "best", first / "checkpoint-1" if best == 1 else third / "checkpoint-2")


def test_other_held_out_pictures_are_named_on_resume(go, tmp_path, instance_dir):
    (tmp_path / "held").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "held" / "a.png")
    flags = {"validation_data_dir": tmp_path / "held", "resume_from_checkpoint": "latest"}
    go("out", max_train_steps=1, **flags)
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "held" / "a.png")
    with pytest.raises(
        ValueError, match=r"The pictures of the held-out part are not those .* a\.png has another content"
    ):
        go("out", max_train_steps=2, **flags)


@pytest.mark.slow
def test_the_best_adapter_is_kept(go):
    out = go(
        "out", validation_split=0.4, validation_steps=1, keep_best=True, max_train_steps=6, checkpointing_steps=1,
        learning_rate=0.3,
    )  # fmt: skip
    found = measured(out)
    best = min(found, key=found.get)
    assert_same_adapter(out / "best", out / f"checkpoint-{best}")
    if best != 6:
        assert any(not torch.equal(value, tensors(out)[key]) for key, value in tensors(out / "best").items())


def test_a_folder_may_be_held_out(go, tmp_path, instance_dir):
    (tmp_path / "held").mkdir()
    shutil.copy(next(instance_dir.iterdir()), tmp_path / "held" / "other.png")
    (tmp_path / "held" / "other.txt").write_text("another caption")
    out = go("out", validation_data_dir=tmp_path / "held", mixed_precision="bf16", train_text_encoder=True)
    assert list(measured(out)) == [2]
    with pytest.raises(ValueError, match="no pictures in"):
        (tmp_path / "none").mkdir()
        go("out", validation_data_dir=tmp_path / "none")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep_best": True}, "--keep_best needs pictures to measure by"),
        ({"validation_split": 0.5, "validation_data_dir": "x"}, "both say what is held out"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(go, flags, message):
    with pytest.raises(ValueError, match=message):
        go("out", **flags)
