"""The nodes for ComfyUI against the hook of `add_apt`: on a stub, and on a real checkout where there is one."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_text_encoder, make_unet
from support.comfyui_stub import StubClip, StubPatcher, StubSampling, StubUNet, install

import apt_diffusion as apt

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INPUTS = (
    torch.linspace(-1, 1, 512).view(2, 4, 8, 8), torch.tensor([3, 400]), torch.linspace(-2, 2, 448).view(2, 7, 32),
)  # fmt: skip
PLACES = {
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
}
NAMES = {
    f"{ours}.transformer_blocks.0.{kind}.to_q.weight": f"{theirs}.transformer_blocks.0.{kind}.to_q.weight"
    for ours, theirs in PLACES.items()
    for kind in ("attn1", "attn2")
}
FILE = "pytorch_apt_weights.safetensors"


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return {"unet": make_unet().eval(), "text_encoder": make_text_encoder().eval()}


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    """The node pack, imported without ComfyUI, with the stub in its place when a node is used."""
    monkeypatch.syspath_prepend(str(ROOT / "integrations"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "comfyui"]:
        monkeypatch.delitem(sys.modules, name)
    from comfyui import nodes

    assert "comfy" not in sys.modules and "folder_paths" not in sys.modules
    install(monkeypatch, NAMES, tmp_path)
    return nodes


def save(parts, folder, name, **settings):
    """An adapter of random weights in `models/apt`, and a copy of the models that has it by the hook."""
    hooked = copy.deepcopy(parts)
    config = apt.APTConfig(**{"num_prompts": 5, "rank": 2, "init": "paper"} | settings)
    plain = apt.APTConfig(num_prompts=4, rank=2, init="paper")
    apt.add_apt(hooked, {"unet": config, "text_encoder": plain}, name)
    torch.manual_seed(len(name))
    with torch.no_grad():
        for part in hooked.values():
            for key, parameter in part.named_parameters():
                if ".apt" in key:
                    parameter.normal_(0, 0.3)
    apt.save_apt_weights(hooked, folder / "apt" / name, name, {"instance_prompt": "a sks dog", "base_model": "tiny"})
    return hooked


def as_comfy(parts):
    unet = StubUNet(copy.deepcopy(parts["unet"]), NAMES)
    base = SimpleNamespace(
        diffusion_model=unet, model_config=SimpleNamespace(unet_config={}), model_sampling=StubSampling
    )
    return StubPatcher(base), StubClip(copy.deepcopy(parts["text_encoder"]).encoder.layers)


def draw(model, sigma=1.0):
    return model.model.diffusion_model.run(model.model_options, *INPUTS, sigma=sigma)


@torch.no_grad()
def reference(parts):
    return parts["unet"](*INPUTS).sample


VARIANTS = [
    {},
    {"query_source": "attn_output", "init": "identity"},
    {"streams": ["query", "context"], "activation": "softmax"},
    {"target_modules": r".*\.attn[12]"},
]


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_unet_gets_the_numbers_of_the_hook(nodes, parts, tmp_path, settings):
    hooked = save(parts, tmp_path, "dog", **settings)
    apt.set_apt_adapters(hooked, "dog", 0.7)
    model, clip = as_comfy(parts)
    patched, _ = nodes.LoadAPTAdapter().load(model, f"dog/{FILE}", 0.7, 0.0, clip)
    base, expected = reference(parts), reference(hooked)
    effect = (expected - base).abs().max()
    assert effect > 1e-2
    assert (draw(patched) - expected).abs().max() <= 1e-4 * effect
    assert torch.equal(draw(model), base)  # the original stays as it is


def test_clip_gets_the_numbers_of_the_hook_and_adapters_add_up(nodes, parts, tmp_path):
    dog, cat = save(parts, tmp_path, "dog"), save(parts, tmp_path, "tabby cat")
    both = copy.deepcopy(parts)
    for name in ("dog", "tabby cat"):
        apt.load_apt_weights(both, tmp_path / "apt" / name, name)
    apt.set_apt_adapters(both, ["dog", "tabby cat"], [0.8, -0.4])
    model, clip = as_comfy(parts)
    load = nodes.LoadAPTAdapter().load
    first = load(model, f"dog/{FILE}", 0.8, 0.8, clip)
    second = load(first[0], f"tabby cat/{FILE}", -0.4, -0.4, first[1])
    torch.testing.assert_close(draw(second[0]), reference(both), rtol=0, atol=1e-5)
    x = torch.linspace(-1, 1, 192).view(1, 6, 32)
    with torch.no_grad():
        for number, layer in enumerate(both["text_encoder"].encoder.layers):
            expected = layer.self_attn(x)[0]
            torch.testing.assert_close(second[1].attend(number, x), expected, rtol=0, atol=1e-5)
            bare = parts["text_encoder"].encoder.layers[number].self_attn(x)[0]
            assert torch.equal(clip.attend(number, x), bare) and not torch.allclose(expected, bare, atol=1e-3)
    assert dog is not cat


def test_a_schedule_acts_in_its_ranges_only(nodes, parts, tmp_path):
    hooked = save(parts, tmp_path, "dog")
    model, clip = as_comfy(parts)
    add = nodes.APTStrengthSchedule().add
    [early] = add(0.0, 0.3, 1.0)
    [both] = add(0.8, 1.0, 0.5, early)
    patched, _ = nodes.LoadAPTAdapter().load(model, f"dog/{FILE}", 1.0, 0.0, clip, both)
    for sigma, weight in ((9.9, 1.0), (7.1, 1.0), (6.9, 0.0), (2.1, 0.0), (1.9, 0.5)):
        apt.set_apt_adapters(hooked, "dog", weight)
        torch.testing.assert_close(draw(patched, sigma), reference(hooked), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is empty"):
        add(0.5, 0.5, 1.0)


def test_the_card_says_what_the_file_knows(nodes, parts, tmp_path):
    from PIL import Image

    save(parts, tmp_path, "dog")
    info = nodes.APTAdapterInfo()
    [names], *_ = info.INPUT_TYPES()["required"]["adapter"], None
    assert names == [f"dog/{FILE}"]
    card, trigger, samples = info.read(f"dog/{FILE}")["result"]
    assert trigger == "a sks dog" and samples.shape == (1, 64, 64, 3)
    assert "base model: tiny" in card and '"num_prompts": 5' in card and "unet: 4 attentions" in card
    (tmp_path / "apt" / "dog" / "samples").mkdir()
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "apt" / "dog" / "samples" / "step-000010.png")
    samples = info.read(f"dog/{FILE}")["result"][2]
    assert samples.shape == (1, 10, 20, 3) and samples[0, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_bad_input_is_one_sentence_and_patches_nothing(nodes, parts, tmp_path):
    save(parts, tmp_path, "dog")
    model, clip = as_comfy(parts)
    load = nodes.LoadAPTAdapter().load
    with pytest.raises(ValueError, match="no adapter 'cat' in models/apt"):
        load(model, "cat", 1.0, 1.0, clip)
    with pytest.raises(ValueError, match="connect clip"):
        load(model, f"dog/{FILE}", 1.0, 1.0)
    torch.manual_seed(0)
    wide = {"unet": make_unet(cross_attention_dim=16).eval(), "text_encoder": parts["text_encoder"]}
    save(wide, tmp_path, "wide", streams=["query", "context"])
    with pytest.raises(ValueError, match=r"wide/.* does not fit this model: .*width 16 \(it has 32\).* 'tiny'"):
        load(model, f"wide/{FILE}", 1.0, 1.0, clip)
    single = copy.deepcopy(parts["unet"])
    apt.add_apt(single, apt.APTConfig(num_prompts=2))
    apt.save_apt_weights(single, tmp_path / "apt" / "single")
    with pytest.raises(ValueError, match="one single model"):
        load(model, f"single/{FILE}", 1.0, 1.0, clip)
    (tmp_path / "apt" / "junk").mkdir()
    (tmp_path / "apt" / "junk" / FILE).write_bytes(b"no adapter")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load(model, f"junk/{FILE}", 1.0, 1.0, clip)
    assert not model.model_options["transformer_options"].get("patches") and not clip.patcher.object_patches


def test_only_adapters_are_offered_and_not_what_else_a_checkpoint_has(nodes, parts, tmp_path):
    save(parts, tmp_path, "dog")
    checkpoint = tmp_path / "apt" / "dog" / "checkpoint-4"
    checkpoint.mkdir()
    for name in (FILE, "optimizer.safetensors", "trained_weights.safetensors"):
        (checkpoint / name).write_bytes((tmp_path / "apt" / "dog" / FILE).read_bytes())
    (offered,) = nodes.LoadAPTAdapter.INPUT_TYPES()["required"]["adapter"]
    assert offered == [f"dog/checkpoint-4/{FILE}", f"dog/{FILE}"]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("workflow.json", {"LoadAPTAdapter", "APTAdapterInfo"}),
        ("workflow-demo.json", {"LoadAPTAdapter", "LoadEmbeddedModel"}),
    ],
)
def test_the_example_workflows_name_nodes_and_links_that_fit(nodes, file, expected):
    workflow = json.loads((ROOT / "integrations" / "comfyui" / file).read_text())
    by_id = {node["id"]: node for node in workflow["nodes"]}
    ours = {node["type"] for node in workflow["nodes"]} & set(nodes.NODE_CLASS_MAPPINGS)
    assert ours == expected
    for number, source, output, target, place, kind in workflow["links"]:
        assert by_id[source]["outputs"][output]["type"] == by_id[target]["inputs"][place]["type"] == kind
        assert number in by_id[source]["outputs"][output]["links"] and by_id[target]["inputs"][place]["link"] == number
    loader = next(node for node in workflow["nodes"] if node["type"] == "LoadAPTAdapter")
    widgets = [name for name, (kind, *_) in nodes.LoadAPTAdapter.INPUT_TYPES()["required"].items() if kind != "MODEL"]
    assert len(loader["widgets_values"]) == len(widgets)


def test_the_folder_works_where_it_is_copied(tmp_path):
    """As ComfyUI imports it: from `custom_nodes`, by path, under a name of its own."""
    folder = tmp_path / "custom_nodes" / "apt_adapters"
    shutil.copytree(ROOT / "integrations" / "comfyui", folder)
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('apt_adapters', {str(folder / '__init__.py')!r},"
        f" submodule_search_locations=[{str(folder)!r}])\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['apt_adapters'] = module\n"
        "spec.loader.exec_module(module); print(sorted(module.NODE_CLASS_MAPPINGS), 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (
        done.stdout.strip() == "['APTAdapterInfo', 'APTStrengthSchedule', 'LoadAPTAdapter', 'LoadEmbeddedModel'] False"
    ), done.stderr


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no checkout of ComfyUI")
def test_a_real_graph_draws_the_picture_of_diffusers(tmp_path):
    script = ROOT / "tests" / "support" / "comfyui_graph.py"
    command = [sys.executable, str(script), os.environ["COMFYUI_PATH"], str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = {
        row["name"]: row for row in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    }
    assert len(rows) == 6, done.stderr[-2000:]
    bare = rows["the bare graph"]["difference"]
    assert rows["the original after it"]["difference"] == bare < 1e-3
    for row in rows.values():
        assert row["difference"] <= 2 * bare + 1e-4 * row["effect"], row
