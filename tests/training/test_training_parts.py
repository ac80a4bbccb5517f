"""What all trainers share: checkpoints that survive a kill, the log, the objective, cards, grids, interruption."""

import json
import os
import shutil
import signal
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from apt_diffusion.training import checkpoints, hub, model_card, provenance
from apt_diffusion.training.grids import save_grid
from apt_diffusion.training.interrupt import Interrupt
from apt_diffusion.training.loss_log import LOG_NAME, LossLog, plot_losses, read_log
from apt_diffusion.training.optimizer import make_adamw, make_schedule, set_learning_rates
from apt_diffusion.training.progress import Progress
from apt_diffusion.training.text_to_image.losses import batch_loss, distance_of
from apt_diffusion.training.text_to_image.objectives import DiffusionObjective
from apt_diffusion.training.trackers import log_images

# Checkpoints


def write(output_dir, step, content="whole"):
    with checkpoints.new_checkpoint(output_dir, step) as folder:
        state = {"step": step, "content": content, "optimizer": {}}
        (folder / checkpoints.STATE_NAME).write_text(json.dumps(state))
        save_file({}, folder / checkpoints.OPTIMIZER_NAME)


def names(output_dir):
    return sorted(path.name for path in output_dir.iterdir())


def test_only_whole_checkpoints_are_found(tmp_path):
    for step in (2, 10, 4):
        write(tmp_path, step)
    for other in ("checkpoint-final", "checkpoint-", "checkpoint-4.old", "my-checkpoint-99"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-77").write_text("a file")
    assert list(checkpoints.list_checkpoints(tmp_path)) == [2, 4, 10]
    assert checkpoints.find_checkpoint(tmp_path, "latest").step == 10
    assert checkpoints.find_checkpoint(tmp_path, "checkpoint-4").step == 4


def test_a_path_elsewhere_is_taken_as_it_is(tmp_path):
    write(tmp_path / "elsewhere", 3)
    found = checkpoints.find_checkpoint(tmp_path / "here", str(tmp_path / "elsewhere" / "checkpoint-3"))
    assert found.step == 3 and found.folder == tmp_path / "elsewhere" / "checkpoint-3"


def test_a_missing_checkpoint_is_an_error_that_lists_those_present(tmp_path):
    assert checkpoints.find_checkpoint(tmp_path, "latest") is None
    with pytest.raises(ValueError, match=r"checkpoint-999.*Present: none"):
        checkpoints.find_checkpoint(tmp_path, "checkpoint-999")
    write(tmp_path, 2)
    write(tmp_path, 4)
    with pytest.raises(ValueError, match="Present: checkpoint-2, checkpoint-4"):
        checkpoints.find_checkpoint(tmp_path, "/somewhere/checkpoint-2")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ValueError, match="foreign is no checkpoint to resume from"):
        checkpoints.find_checkpoint(tmp_path, "foreign")


def test_an_exception_while_writing_leaves_nothing(tmp_path):
    write(tmp_path, 2, "old")
    with pytest.raises(OSError, match="disk full"), checkpoints.new_checkpoint(tmp_path, 2) as folder:
        (folder / checkpoints.STATE_NAME).write_text("{")
        raise OSError("disk full")
    assert names(tmp_path) == ["checkpoint-2"]
    assert checkpoints.find_checkpoint(tmp_path, "latest").state["content"] == "old"
    write(tmp_path, 2, "new")
    assert names(tmp_path) == ["checkpoint-2"]
    assert checkpoints.find_checkpoint(tmp_path, "latest").state["content"] == "new"


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["empty", "half written", "before its name", "while an old one is deleted"])
def test_kill_9_never_leaves_a_checkpoint_that_is_not_whole(tmp_path, moment, monkeypatch):
    for step in (2, 4):
        write(tmp_path, step)
    child = os.fork()
    if child == 0:
        if moment == "before its name":
            monkeypatch.setattr(os, "rename", die)
        if moment == "while an old one is deleted":
            monkeypatch.setattr(shutil, "rmtree", die)
            checkpoints.prune_checkpoints(tmp_path, 1, newest=4)
        with checkpoints.new_checkpoint(tmp_path, 6) as folder:
            if moment == "empty":
                die()
            (folder / checkpoints.STATE_NAME).write_text('{"step": ')
            if moment == "half written":
                die()
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    leftovers = [name for name in names(tmp_path) if not name.startswith("checkpoint-")]
    assert len(leftovers) == 1 and "checkpoint" not in leftovers[0]
    assert checkpoints.find_checkpoint(tmp_path, "latest").step == 4
    checkpoints.remove_unfinished(tmp_path)
    assert set(names(tmp_path)) <= {"checkpoint-2", "checkpoint-4"}


def test_pruning_keeps_the_newest(tmp_path):
    for step in (2, 4, 6, 900):
        write(tmp_path, step)
    checkpoints.prune_checkpoints(tmp_path, None, newest=6)
    assert len(names(tmp_path)) == 4
    checkpoints.prune_checkpoints(tmp_path, 3, newest=6)  # 900 is of a run that was given up
    assert list(checkpoints.list_checkpoints(tmp_path)) == [2, 4, 6]
    checkpoints.prune_checkpoints(tmp_path, 1, newest=6)
    assert list(checkpoints.list_checkpoints(tmp_path)) == [6]


def take_steps(parameters, steps, optimizer):
    for step in steps:
        for index, parameter in enumerate(parameters.values()):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1) * (index + 1))
        optimizer.step()


def fresh():
    torch.manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(3, 2)) for name in ("unet.a", "unet.b", "text.c")}
    groups = [({n: p for n, p in parameters.items() if n.startswith("unet")}, 0.1), ({"c": parameters["text.c"]}, 0.2)]
    return parameters, make_adamw(groups, (0.9, 0.999), 0.01, 1e-8)


def test_the_optimizer_continues_bit_for_bit_and_nothing_is_pickled(tmp_path):
    straight, optimizer = fresh()
    take_steps(straight, range(4), optimizer)
    first, optimizer = fresh()
    take_steps(first, range(2), optimizer)
    scaler = types.SimpleNamespace(state_dict=lambda: {"scale": 1024.0, "_growth_tracker": 3})
    with checkpoints.new_checkpoint(tmp_path, 2) as folder:
        checkpoints.save_training_state(folder, optimizer, first, {"step": 2}, scaler)
    assert names(tmp_path / "checkpoint-2") == ["optimizer.safetensors", "training_state.json"]
    second, optimizer = fresh()
    for name, parameter in second.items():
        parameter.data.copy_(first[name].data)
    loaded = {}
    scaler.load_state_dict = loaded.update
    checkpoint = checkpoints.find_checkpoint(tmp_path, "latest")
    checkpoints.load_training_state(checkpoint, optimizer, second, scaler)
    assert loaded == {"scale": 1024.0, "_growth_tracker": 3}
    take_steps(second, (2, 3), optimizer)
    assert all(torch.equal(second[name], straight[name]) for name in straight)
    del second["unet.a"]
    with pytest.raises(ValueError, match="other parameters"):
        checkpoints.load_training_state(checkpoint, optimizer, second)


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 2)
    parameters, optimizer = fresh()
    take_steps(parameters, range(1), optimizer)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="No space for"), checkpoints.new_checkpoint(tmp_path, 4) as folder:
        checkpoints.save_training_state(folder, optimizer, parameters, {"step": 4})
    assert names(tmp_path) == ["checkpoint-2"]


# Learning rates


def test_learning_rates_are_functions_of_the_step():
    _, optimizer = fresh()
    schedule = make_schedule("cosine", optimizer, warmup_steps=2, total_steps=10, cycles=1, power=1.0)
    rates = [set_learning_rates(optimizer, schedule(step)) for step in range(10)]
    expected = [0, 0.5, *(0.5 * (1 + np.cos(np.pi * 2 * 0.5 * k / 8)) for k in range(8))]
    assert np.allclose([rate[0] for rate in rates], 0.1 * np.array(expected))
    assert np.allclose([rate[1] for rate in rates], 0.2 * np.array(expected))


# Log


def test_the_log_drops_what_came_after_the_checkpoint_and_a_half_line(tmp_path):
    rows = [{"step": step, "loss": 1 / step, "lr": 0.1} for step in range(1, 6)]
    LossLog(tmp_path).append(rows)
    with (tmp_path / LOG_NAME).open("a") as file:
        file.write('{"step": 6, "lo')
    assert read_log(tmp_path / LOG_NAME) == rows
    LossLog(tmp_path, step=3).append([{"step": 4, "loss": 9.0, "lr": 0.1}])
    assert [row["loss"] for row in read_log(tmp_path / LOG_NAME)] == [1, 1 / 2, 1 / 3, 9.0]
    LossLog(tmp_path / "other", step=2, source=tmp_path / LOG_NAME)
    assert read_log(tmp_path / "other" / LOG_NAME) == rows[:2]
    LossLog(tmp_path)
    assert read_log(tmp_path / LOG_NAME) == []


def test_the_loss_is_plotted(tmp_path):
    assert plot_losses(tmp_path) is None
    LossLog(tmp_path).append([{"step": step, "loss": 1 / step, "lr": 0.1} for step in range(1, 60)])
    with Image.open(plot_losses(tmp_path)) as plot:
        assert plot.width > 400 and len(plot.convert("RGB").getcolors(100000)) > 10


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path):
    progress = Progress(Accelerator(cpu=True), LossLog(tmp_path), 0, 5)
    progress.add(1, [torch.tensor(1.0), torch.tensor(3.0)], {"lr": 0.1})
    assert progress.flush(None) == 0 and progress.pending == []
    progress.add(2, [torch.tensor(float("nan"))], {"lr": 0.1})
    with pytest.raises(FloatingPointError, match="nan at step 2"):
        progress.flush(None)
    progress.close()
    assert read_log(tmp_path / LOG_NAME)[0] == {"step": 1, "loss": 2.0, "lr": pytest.approx(0.1)}


# Objective


@pytest.fixture(scope="module")
def schedule():
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def test_noisy_latents_and_targets_are_those_of_diffusers(schedule):
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 8, 8)
    timesteps = torch.tensor([0, 10, 500, 999])
    objective = DiffusionObjective(schedule.alphas_cumprod, "v_prediction")
    expected = schedule.add_noise(latents, noise, timesteps)
    noisy, times = objective.model_inputs(latents, noise, timesteps)
    assert torch.allclose(noisy, expected, atol=1e-6) and torch.equal(times, timesteps)
    velocity = schedule.get_velocity(latents, noise, timesteps)
    assert torch.allclose(objective.target(latents, noise, timesteps), velocity, atol=1e-6)
    assert DiffusionObjective(schedule.alphas_cumprod, "epsilon").target(latents, noise, timesteps) is noise
    assert DiffusionObjective(schedule.alphas_cumprod, "sample").target(latents, noise, timesteps) is latents
    with pytest.raises(ValueError, match="'score'"):
        DiffusionObjective(schedule.alphas_cumprod, "score")


def test_min_snr_weights_are_those_of_diffusers(schedule):
    from diffusers.training_utils import compute_snr

    timesteps = torch.arange(0, 1000, 37)
    snr = compute_snr(schedule, timesteps).double()
    clipped = snr.clamp(max=5.0)
    for prediction_type, expected in (("epsilon", clipped / snr), ("v_prediction", clipped / (snr + 1))):
        objective = DiffusionObjective(schedule.alphas_cumprod, prediction_type, snr_gamma=5.0)
        assert torch.allclose(objective.weights[timesteps].double(), expected, rtol=1e-4)
    dark = torch.cat([schedule.alphas_cumprod, torch.zeros(1)])  # zero terminal SNR
    weights = {p: DiffusionObjective(dark, p, 5.0).weights for p in ("epsilon", "v_prediction", "sample")}
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert (weights["epsilon"][-1], weights["v_prediction"][-1], weights["sample"][-1]) == (1, 0, 0)


def test_errors_are_weighed_by_timestep_and_the_class_by_its_weight(schedule):
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 4, 2, 3, 3)
    timesteps = torch.tensor([10, 900, 10, 900])
    errors = ((prediction - target) ** 2).mean((1, 2, 3))
    plain = DiffusionObjective(schedule.alphas_cumprod, "epsilon").errors(prediction, target, timesteps)
    assert torch.allclose(plain, errors)
    assert torch.allclose(batch_loss(plain), ((prediction - target) ** 2).mean())
    assert torch.allclose(batch_loss(plain, prior_weight=0.3), errors[:2].mean() + 0.3 * errors[2:].mean())
    weighted = DiffusionObjective(schedule.alphas_cumprod, "epsilon", 5.0)
    expected = errors * weighted.weights[timesteps]
    assert torch.allclose(weighted.errors(prediction, target, timesteps), expected)


def test_the_class_counts_as_in_diffusers_trainer(schedule):
    """`loss + args.prior_loss_weight * prior_loss` of `train_dreambooth_lora.py`, and its gradient."""
    torch.manual_seed(0)
    target = torch.randn(6, 4, 3, 3)
    ours, theirs = (torch.ones(6, 4, 3, 3, requires_grad=True) for _ in range(2))
    timesteps = torch.tensor([3, 400, 999] * 2)
    objective = DiffusionObjective(schedule.alphas_cumprod, "epsilon")
    loss = batch_loss(objective.errors(ours, target, timesteps), prior_weight=0.7)
    (instance, prior), (instance_target, prior_target) = theirs.chunk(2), target.chunk(2)
    expected = functional.mse_loss(instance, instance_target, reduction="mean")
    expected = expected + 0.7 * functional.mse_loss(prior, prior_target, reduction="mean")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_distances_are_those_of_numpy(schedule):
    error = torch.linspace(-3, 3, 13, dtype=torch.float64)
    e = error.numpy()
    assert np.allclose(distance_of("l2", 0.1)(error), e**2)
    assert np.allclose(distance_of("l1", 0.1)(error), np.abs(e))
    assert np.allclose(distance_of("huber", 0.5)(error), np.sqrt(e**2 + 0.25) - 0.5)
    assert np.allclose(distance_of("huber", 1e3)(error), e**2, rtol=1e-4)  # all errors are small
    assert np.allclose(distance_of("huber", 1e-4)(error) / 2e-4, np.abs(e), atol=2e-4)  # all are large
    half = torch.full((2, 1, 2, 2), 0.5)
    objective = DiffusionObjective(schedule.alphas_cumprod, "epsilon")
    found = objective.errors(half, torch.zeros_like(half), torch.tensor([1, 2]), distance_of("l1", 0.1))
    assert found.tolist() == [0.5, 0.5]


# Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), number)
        assert interrupt.signal_number == number
        assert signal.getsignal(number) == before
    with Interrupt() as interrupt:
        assert interrupt.signal_number is None
    assert signal.getsignal(number) == before


# Cards, grids, provenance, hub


def test_a_card_is_valid_and_names_what_matters(tmp_path):
    from huggingface_hub import ModelCard

    (tmp_path / "samples").mkdir()
    card = model_card.write_model_card(
        tmp_path,
        title="my glyph",
        base_model="someone/stable-diffusion",
        summary="A summary.",
        usage="pipe.load_apt_weights('x')",
        tags=["text-to-image", "apt"],
        settings={"rank": 4, "hub_token": "hf_secret", "note": "a | b", "unset": None},
        command="train --hub_token ***",
        pipeline_tag="text-to-image",
        license="openrail",
        triggers=['a "sks": glyph # not a comment', "another"],
        samples={tmp_path / "samples" / "step-000004.png": "a prompt: of a\nsample"},
        loss_plot=tmp_path / "loss.png",
    )
    loaded = ModelCard.load(card)
    assert loaded.data.base_model == "someone/stable-diffusion" and loaded.data.tags == ["text-to-image", "apt"]
    assert loaded.data.to_dict()["instance_prompt"] == 'a "sks": glyph # not a comment'
    assert (loaded.data.license, loaded.data.pipeline_tag) == ("openrail", "text-to-image")
    assert loaded.data.base_model_relation == "adapter" and loaded.data.library_name == "apt-diffusion"
    assert loaded.data.widget == [{"text": "a prompt: of a\nsample", "output": {"url": "samples/step-000004.png"}}]
    for text in (
        "<Gallery />",
        "![samples](samples/step-000004.png)",
        "![loss](loss.png)",
        "| rank | `4` |",
        "a \\| b",
        "torch",
    ):
        assert text in loaded.text
    assert "hf_secret" not in card.read_text() and "unset" not in card.read_text()
    local = model_card.write_model_card(
        tmp_path, title="t", base_model=str(tmp_path), summary="", usage="", tags=["apt"], settings={}, command=""
    )
    loaded = ModelCard.load(local)
    assert loaded.data.to_dict() == {"library_name": "apt-diffusion", "tags": ["apt"]} and "<Gal" not in loaded.text


def test_metadata_hold_no_token():
    command = provenance.command_line("train_apt_sd.py", ["--instance_prompt", "a sks glyph", "--rank=3"])
    assert command == "train_apt_sd.py --instance_prompt 'a sks glyph' --rank=3"
    metadata = provenance.adapter_metadata(
        {"rank": 4, "hub_token": "hf_secret", "variant": None}, command, 7, base_model="b"
    )
    assert all(isinstance(value, str) and "hf_secret" not in value for value in metadata.values())
    assert json.loads(metadata["training"]) == {"rank": 4, "step": 7} and metadata["base_model"] == "b"
    assert json.loads(metadata["versions"])["torch"] == torch.__version__


def test_a_grid_holds_every_image_under_its_title(tmp_path):
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue", "yellow", "purple")]
    path = save_grid(images, [f"seed {i}" for i in range(5)], "step 3: a prompt " * 20, tmp_path / "s" / "grid.png")
    with Image.open(path) as grid:
        assert grid.width > 4 * 192 and grid.height > 2 * 192
        found = {color for count, color in grid.getcolors(100000) if count >= 192 * 192}
    assert {image.getpixel((0, 0)) for image in images} <= found
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["grid.png"]


def test_trackers_get_the_images():
    seen = {}
    writer = types.SimpleNamespace(add_images=lambda name, images, step, dataformats: seen.update(shape=images.shape))
    tracker = types.SimpleNamespace(name="tensorboard", writer=writer)
    log_images([tracker], "validation", [Image.new("RGB", (8, 4))] * 3, "a prompt", 5)
    assert seen == {"shape": (3, 4, 8, 3)}


def test_hub_errors_say_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise PermissionError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(ValueError, match=r"--push_to_hub.*401 Unauthorized.*hf auth login"):
        hub.create_repository("me/glyph", None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    with pytest.raises(RuntimeError, match=f"The adapter is in {tmp_path}"):
        hub.upload("me/glyph", tmp_path, None)
