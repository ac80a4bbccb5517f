"""Exported denoisers draw what the pipeline draws: in onnxruntime alone, in a pipeline, as a program of torch."""

import json

import numpy as np
import pytest
import torch
from conftest import randomize
from diffusers import DiffusionPipeline
from safetensors.numpy import load_file

from apt_diffusion import (
    APTConfig,
    StableDiffusionAPTPipeline,
    add_apt,
    cli,
    get_list_apt_adapters,
    remove_apt,
    save_apt_weights,
)
from apt_diffusion.export import ExportedModel, Manifest, adapter_inputs, export_denoiser, write_inputs

PROMPT = "a red circle on a plain blue background"


def make_adapter(pipe, folder, seed, **config):
    """Saves an adapter that acts, and leaves the pipeline without it."""
    add_apt(pipe, APTConfig(**config), "made")
    randomize(pipe, seed)
    save_apt_weights(pipe, folder, "made")
    pipe.delete_apt_adapters("made")
    return str(folder)


def opened(path, **settings):
    pipe = StableDiffusionAPTPipeline.from_pretrained(path, dtype=torch.float32, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, count=1, prompt=PROMPT, steps=2, **settings):
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    settings = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "np"} | settings
    return pipe([prompt] * count, generator=generators, **settings).images


# The graph with the adapter as input, on the embedded model


@pytest.fixture(scope="module")
def miniature():
    return opened("miniature")


@pytest.fixture(scope="module")
def adapters(miniature, tmp_path_factory):
    """Two of different sizes, of the UNet alone."""
    folder = tmp_path_factory.mktemp("adapters")
    parts = {"unet": miniature.unet}
    found = {}
    for seed, (name, sizes) in enumerate({"a": (8, 4), "b": (3, 1)}.items()):
        add_apt(parts, APTConfig(num_prompts=sizes[0], rank=sizes[1]), name)
        randomize(miniature.unet, seed)
        save_apt_weights(parts, folder / name, name)
        miniature.delete_apt_adapters(name)
        found[name] = str(folder / name)
    return found


@pytest.fixture(scope="module")
def graph(miniature, adapters, tmp_path_factory):
    """Traced with `a`; the inputs of `b` are added later, from its file alone."""
    folder = tmp_path_factory.mktemp("graph") / "exported"
    export_denoiser(miniature, folder, {adapters["a"]: 1.0}, as_inputs=True, base_model="miniature")
    assert not get_list_apt_adapters(miniature)
    assert cli.main(["export", "--add_to", str(folder), "--adapter", f"{adapters['b']}:0.6"]) == 0
    return folder


def loop(pipe, session, adapter, steps=2, guidance=3.0):
    """The denoising loop of Stable Diffusion, with onnxruntime for the UNet."""
    with torch.no_grad():
        text, empty = pipe.encode_prompt(PROMPT, "cpu", 1, True, "")
        noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
        pipe.scheduler.set_timesteps(steps)
        latents = noise * pipe.scheduler.init_noise_sigma
        states = torch.cat([empty, text]).numpy()
        for step in pipe.scheduler.timesteps:
            sample = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), step).numpy()
            inputs = {
                "sample": sample,
                "timestep": np.asarray(step.item(), np.float32),
                "encoder_hidden_states": states,
            }
            (output,) = session.run(None, inputs | adapter)
            unconditional, conditional = torch.from_numpy(output)
            predicted = unconditional + guidance * (conditional - unconditional)
            latents = pipe.scheduler.step(predicted[None], step, latents).prev_sample
        picture = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return (picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.slow
def test_one_graph_draws_with_many_adapters_in_onnxruntime_alone(miniature, adapters, graph):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph / "model.onnx"), providers=["CPUExecutionProvider"])
    nothing = {}
    for one in session.get_inputs()[3:]:
        shape = [int(size) for size in one.shape[1:]]  # none behind a scale
        nothing[one.name] = np.zeros((1, *shape), np.float32) if shape else np.ones(1, np.float32)
    drawn = {}
    for name, weight in (("a", 1.0), ("b", 0.6), (None, 0.0)):
        inputs = load_file(graph / "adapters" / f"{name}.safetensors") if name else nothing
        drawn[name] = loop(miniature, session, inputs)
        if name:
            miniature.load_apt_weights(adapters[name], adapter_name=name)
        expected = draw(miniature, apt_scale=weight)
        if name:
            miniature.delete_apt_adapters(name)
        assert np.abs(drawn[name] - expected).max() < 1e-3, name
    assert np.abs(drawn["a"] - drawn[None]).max() > 0.1 < np.abs(drawn["b"] - drawn[None]).max()


@pytest.mark.slow
def test_it_stands_in_for_the_denoiser_of_a_pipeline(miniature, adapters, graph):
    """In batches of any number, with and without guidance, in other sizes, at other strengths."""
    exported = ExportedModel.load(graph)
    assert exported.adapters == ["a", "b"]
    assert [(one.name, one.shape) for one in exported.manifest.inputs] == [
        ("sample", [None, 4, None, None]),
        ("timestep", []),
        ("encoder_hidden_states", [None, None, 128]),
    ]
    unet = miniature.unet
    for name, weight, settings in (
        ("a", 0.5, {"guidance_scale": 1.0}),
        ("b", 1.5, {"count": 3}),
        (None, 1.0, {"height": 96, "width": 48}),
    ):
        if name:
            miniature.load_apt_weights(adapters[name])
        expected = draw(miniature, **settings, apt_scale=weight * (0.6 if name == "b" else 1.0))
        if name:
            miniature.delete_apt_adapters("default")
        exported.set_adapter(name, weight)
        miniature.unet = exported
        try:
            drawn = draw(miniature, **settings)
        finally:
            miniature.unet = unet
        assert np.abs(drawn - expected).max() < 1e-3, (name, settings)


@pytest.mark.slow
def test_inputs_that_are_there_are_replaced_only_on_demand(adapters, graph, capsys):
    with pytest.raises(FileExistsError, match=r"a\.safetensors is there already"):
        write_inputs(graph, adapters["a"])
    before = load_file(graph / "adapters" / "a.safetensors")
    words = ["export", "--add_to", str(graph), "--adapter", adapters["a"]]
    assert cli.main(words) == 1 and cli.main([*words, "--overwrite"]) == 0
    after = load_file(graph / "adapters" / "a.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert "is there already" in capsys.readouterr().err
    exported = ExportedModel.load(graph)
    with pytest.raises(ValueError, match=r"no adapter 'c' in .*; there are \['a', 'b'\]"):
        exported.set_adapter("c")
    with pytest.raises(ValueError, match=r"attn2\.apt\.keys is missing or too much"):
        exported.set_adapter({})


# Constants of the graph, on tiny models


@pytest.fixture(scope="module")
def tiny(tiny_sd_path, tmp_path_factory):
    """`(path, adapters)`: of text encoder and UNet; one corrects the context, too, the other is of another kind."""
    folder = tmp_path_factory.mktemp("tiny-adapters")
    pipe = opened(tiny_sd_path)
    other = {"query_source": "attn_output", "activation": "softmax"}
    return tiny_sd_path, {
        "a": make_adapter(pipe, folder / "a", 1, num_prompts=4, streams=["query", "context"]),
        "b": make_adapter(pipe, folder / "b", 2, num_prompts=5, **other),
    }


SMALL = {"height": 16, "width": 16, "prompt": "a dog"}


@pytest.mark.slow
def test_adapters_as_constants_are_mixed_by_their_weights(tiny, tmp_path):
    path, files = tiny
    manifest = export_denoiser(opened(path), tmp_path / "out", {files["a"]: 0.7, files["b"]: -0.5})
    assert manifest == Manifest.read(tmp_path / "out") and manifest.adapters == {"a": 0.7, "b": -0.5}
    pipe = opened(path)
    base = draw(pipe, **SMALL)
    for name, file in files.items():
        pipe.load_apt_weights(file, adapter_name=name)
    pipe.set_apt_adapters(["a", "b"], [0.7, -0.5])
    expected = draw(pipe, **SMALL)
    pipe.unet = ExportedModel.load(tmp_path / "out")
    drawn = draw(pipe, **SMALL)  # with the adapters of the text encoder
    assert np.abs(drawn - expected).max() < 1e-4 < 1e-2 < np.abs(base - expected).max()
    with pytest.raises(ValueError, match="are constants of it"):
        pipe.unet.set_adapter("a")
    with pytest.raises(ValueError, match="export with adapter inputs"):
        adapter_inputs(files["a"], manifest)


def on_part(path, part, folder):
    """`(pipeline, adapter of its denoiser, what it draws with it)`; the pipeline is without it again."""
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    parts = {part: getattr(pipe, part)}
    add_apt(parts, APTConfig(num_prompts=4))
    randomize(parts)
    save_apt_weights(parts, folder)
    drawn = draw(pipe, **SMALL)
    remove_apt(pipe)
    assert np.abs(draw(pipe, **SMALL) - drawn).max() > 1e-3
    return pipe, str(folder), drawn


@pytest.mark.slow
def test_the_command_writes_a_program_of_torch(tiny_sdxl_path, tiny, tmp_path, capsys):
    """Of a base with a dict among its arguments."""
    pipe, adapter, expected = on_part(tiny_sdxl_path, "unet", tmp_path / "a")
    folder = tmp_path / "out"
    words = ["export", "--model", str(tiny_sdxl_path), "--adapter", adapter, "--adapter_inputs", "--format", "torch"]
    words += ["--height", "16", "--width", "16", "--output", str(folder)]
    assert cli.main(words) == 0
    names = ("adapters/a.safetensors", "config.json", "export.json", "model.pt2")
    assert capsys.readouterr().out.splitlines() == [str(folder / name) for name in names]
    pipe.unet = ExportedModel.load(folder)
    pipe.unet.set_adapter("a")
    assert np.abs(draw(pipe, **SMALL) - expected).max() < 1e-4
    assert refused(capsys, words[1:]).startswith(f"{folder} would be replaced")
    # what cannot be added: an adapter of another kind, and flags of a graph
    assert "has activation='softmax', the graph 'relu': it needs a graph of its own" in added(
        capsys, folder, tiny, "b"
    )
    assert "--format has no effect with --add_to" in added(capsys, folder, tiny, "a", "--format", "torch")


def added(capsys, folder, tiny, name, *more):
    return refused(capsys, ["--add_to", folder, "--adapter", tiny[1][name], *more])


@pytest.mark.slow
def test_a_transformer_is_traced_with_what_its_pipeline_gives(tiny_transformer_path, tmp_path):
    pipe, adapter, expected = on_part(tiny_transformer_path("flux"), "transformer", tmp_path / "a")
    export_denoiser(pipe, tmp_path / "out", {adapter: 1.0}, "torch", height=16, width=16)
    pipe.transformer = ExportedModel.load(tmp_path / "out")
    assert np.abs(draw(pipe, **SMALL) - expected).max() < 1e-4


# Refusals: one sentence, nothing written


def refused(capsys, words):
    assert cli.main(["export", *map(str, words)]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    return message.removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--height", "0"], "--height must be at least 1, got 0."),
        (["--adapter", "x:nan"], "The weight of an adapter must be a finite number, got x:nan."),
        (["--adapter", "a:0.5"], "--adapter names one adapter twice: give each once."),
        ([], "'a' is neither a file nor a folder here"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_a_model_is_loaded(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *args, **kwargs: pytest.fail("too late"))
    assert refused(capsys, ["--adapter", "a", "--output", "out", *words]).startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_export_is_never_replaced(tiny, tmp_path, capsys):
    (tmp_path / "precious").write_text("")
    words = ["--adapter", tiny[1]["a"], "--output", tmp_path, "--overwrite"]
    assert refused(capsys, words) == f"{tmp_path} is there, and is no exported folder: choose another one."
    assert refused(capsys, ["--adapter", "a", "--add_to", tmp_path]).startswith(f"{tmp_path} holds no export.json")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_missing_library_is_named_with_the_way_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(capsys, ["--adapter", "a", "--output", tmp_path / "out"]) == (
        "Exporting to onnx needs onnx and onnxscript and onnxruntime, which are not installed: "
        'pip install "apt-diffusion[export]".'
    )


def test_an_adapter_of_another_base_is_refused(tiny, tmp_path, capsys):
    words = ["--model", "miniature", "--adapter", tiny[1]["a"], "--output", tmp_path / "out", "--format", "torch"]
    assert "this model needs (4, 96). Is this the right base model? It was made for" in refused(capsys, words)
    assert not list(tmp_path.iterdir())
    manifest = {
        "format": "torch", "component": "unet", "model_class": "UNet2DConditionModel", "base_model": "miniature",
        "dtype": "float32", "inputs": [], "outputs": [],
        "places": [{"name": "mid.attn2.apt", "width": 8, "activation": "relu", "query_source": "hidden_states"}],
    }  # fmt: skip
    (tmp_path / "export.json").write_text(json.dumps(manifest))
    message = refused(capsys, ["--add_to", tmp_path, "--adapter", tiny[1]["a"]])
    assert "does not fit this graph of 'miniature': the graph has no place for" in message
    assert [path.name for path in tmp_path.iterdir()] == ["export.json"]


def test_a_model_that_cannot_be_traced_is_refused_and_stays_as_it_was(tiny, tmp_path):
    path, files = tiny
    pipe = opened(path)

    def looks_at_values(module, args, output):
        return output * 2 if output.sum() > 0 else output

    handle = pipe.unet.conv_in.register_forward_hook(looks_at_values)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel cannot be exported, torch\.export cannot trace it: "):
        export_denoiser(pipe, tmp_path / "out", {files["a"]: 1.0}, "torch", height=16, width=16)
    handle.remove()
    assert not list(tmp_path.iterdir()) and not get_list_apt_adapters(pipe)
    assert np.array_equal(draw(pipe, **SMALL), draw(opened(path), **SMALL))
    with pytest.raises(ValueError, match="differ in activation or query_source at "):
        export_denoiser(pipe, tmp_path / "out", dict.fromkeys(files.values(), 1.0), "torch", as_inputs=True)
    pipe.load_apt_weights(files["a"])
    with pytest.raises(ValueError, match="The unet carries adapters"):
        export_denoiser(pipe, tmp_path / "out", {files["a"]: 1.0}, "torch")
