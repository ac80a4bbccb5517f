"""What a file or a dict says of itself, and what of it is put where."""

import copy

import numpy as np
import pytest
import torch
from conftest import draw, make_text_encoder, make_unet, randomize
from safetensors.torch import load_file, save_file
from support.families import same, snapshot, text_output, unet_output

import apt_diffusion as apt
from apt_diffusion.api import cores_of
from apt_diffusion.io.files import read_adapter_file

SMALL = apt.APTConfig(num_prompts=6, rank=2)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return make_unet().eval()


@torch.no_grad()
def output(unet):
    return unet_output(unet)


SETTINGS = [
    {"query_source": "attn_output"},
    {"activation": "softmax"},
    {"activation": "softmax", "query_source": "attn_output", "init": "paper"},
    {"dropout": 0.5},
    {"streams": ["context"], "query_source": "attn_output"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_tensors_alone_do_not_guess_their_settings(unet, tmp_path, settings):
    """`load_file` drops the header: another query source draws another picture, and saving makes it permanent."""
    config = apt.APTConfig(num_prompts=6, rank=2, **settings)
    apt.add_apt(unet, config)
    randomize(unet)
    expected = output(unet)
    file = apt.save_apt_weights(unet, tmp_path)
    tensors = load_file(file)
    headless = tmp_path / "headless.safetensors"
    save_file(tensors, headless)
    apt.remove_apt(unet)
    before = snapshot(unet)
    for source in (tensors, headless):
        with pytest.raises(ValueError, match=r"tensors without settings.*Pass config=APTConfig"):
            apt.load_apt_weights(unet, source)
        assert same(before, snapshot(unet))
        apt.load_apt_weights(unet, source, config=apt.APTConfig(**settings))
        assert torch.equal(output(unet), expected)
        again = read_adapter_file(apt.save_apt_weights(unet, tmp_path / "again"))
        stored, new = (read_adapter_file(f).configs[""] for f in (file, tmp_path / "again" / file.name))
        for name in ("num_prompts", "rank", "activation", "dropout", "init", "query_source", "streams"):
            assert getattr(stored, name) == getattr(new, name)
        assert again.tensors.keys() == tensors.keys()
        apt.remove_apt(unet)
    with pytest.raises(ValueError, match="leave config out"):
        other = {"relu": "softmax", "softmax": "relu"}[config.activation]
        apt.load_apt_weights(unet, file, config=apt.APTConfig(activation=other))


def test_a_hot_swap_of_tensors_needs_settings_too(unet, tmp_path):
    apt.add_apt(unet, SMALL)
    randomize(unet)
    tensors = load_file(apt.save_apt_weights(unet, tmp_path))
    expected = output(unet)
    randomize(unet, 8)
    with pytest.raises(ValueError, match="Pass config="):
        apt.load_apt_weights(unet, tensors, hotswap=True)
    apt.load_apt_weights(unet, tensors, hotswap=True, config=SMALL)
    assert torch.equal(output(unet), expected)


def test_tensors_of_a_pipeline(pipe, tmp_path):
    apt.add_apt(pipe, apt.APTConfig(num_prompts=6, rank=2, query_source="attn_output"))
    randomize(pipe)
    expected = draw(pipe)
    tensors = load_file(pipe.save_apt_weights(tmp_path))
    pipe.unload_apt_weights()
    for config in (
        apt.APTConfig(query_source="attn_output"),  # as in `add_apt`: the denoiser's, text encoders keep theirs
        {"unet": apt.APTConfig(query_source="attn_output"), "text_encoder": apt.APTConfig()},
    ):
        pipe.load_apt_weights(tensors, config=config)
        assert np.array_equal(draw(pipe), expected)
        pipe.unload_apt_weights()
    with pytest.raises(ValueError, match="no settings for component 'text_encoder'"):
        pipe.load_apt_weights(tensors, config={"unet": apt.APTConfig()})
    assert pipe.get_list_apt_adapters() == {}


def test_sizes_per_module(unet, tmp_path):
    config = apt.APTConfig(
        num_prompts=6,
        rank=2,
        num_prompts_pattern={r"mid_block\..*attn2": 9, "up_blocks.0.attentions.1.transformer_blocks.0.attn2": 3},
        rank_pattern={"mid_block.*": 5},
    )
    assert apt.APTConfig.from_json(config.to_json()) == config and hash(config) == hash(copy.deepcopy(config))
    names = apt.add_apt(unet, config)
    randomize(unet)
    expected = output(unet)

    def sizes():
        found = {name: unet.get_submodule(name).apt.adapters["default"] for name in names}
        return {name: (len(adapter.prompts), len(adapter.low_rank_down)) for name, adapter in found.items()}

    wanted = {name: (6, 2) for name in names}
    wanted["mid_block.attentions.0.transformer_blocks.0.attn2"] = (9, 5)
    wanted["up_blocks.0.attentions.1.transformer_blocks.0.attn2"] = (3, 2)
    assert sizes() == wanted and config.at(names[0]) == apt.APTConfig(num_prompts=6, rank=2)
    file = apt.save_apt_weights(unet, tmp_path)
    tensors = load_file(file)
    for source, options in ((file, {}), (tensors, {"config": apt.APTConfig()})):
        apt.remove_apt(unet)
        apt.load_apt_weights(unet, source, **options)
        assert sizes() == wanted and torch.equal(output(unet), expected)
    apt.remove_apt(unet)
    apt.enable_apt_hotswap(unet, 9, 5)
    apt.add_apt(unet, SMALL)
    apt.remove_apt(unet, "default")
    apt.load_apt_weights(unet, file)
    assert torch.allclose(output(unet), expected, atol=1e-5)
    again = load_file(apt.save_apt_weights(unet, tmp_path / "again"))
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"nowhere": 3}}, "'nowhere' matches none"),
        ({"rank_pattern": {"attn2": 0}}, "positive integer"),
        ({"num_prompts_pattern": {"": 3}}, "non-empty"),
        ({"num_prompts_pattern": {"(": 3}}, "regular expression"),
        ({"num_prompts_pattern": ["attn2"]}, "dict"),
    ],
)
def test_bad_patterns(unet, settings, message):
    with pytest.raises(ValueError, match=message):
        apt.add_apt(unet, apt.APTConfig(**settings))
    assert apt.get_list_apt_adapters(unet) == []


def test_patterns_of_a_pipeline_go_where_they_match(pipe):
    apt.add_apt(
        pipe, apt.APTConfig(num_prompts=6, rank=2, rank_pattern={r"layers\.1\.self_attn": 3, "mid_block.*": 4})
    )
    ranks = {len(core.adapters["default"].low_rank_down) for core in cores_of(pipe.unet)}
    assert ranks == {2, 4} and {len(c.adapters["default"].low_rank_down) for c in cores_of(pipe.text_encoder)} == {
        2,
        3,
    }
    with pytest.raises(ValueError, match=r"rank_pattern has keys that match no module .*\['nowhere'\]"):
        apt.add_apt(pipe, apt.APTConfig(rank_pattern={"nowhere": 3}), "b")


# Components that are absent


@pytest.fixture
def saved(pipe, tmp_path):
    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    file = pipe.save_apt_weights(tmp_path / "adapter")
    pipe.unload_apt_weights()
    return file


def embeddings(pipe):
    return dict(
        zip(
            ("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt("a sks glyph", "cpu", 1, True), strict=True
        )
    )


def without_text_encoder(pipe):
    components = {**pipe.components, "text_encoder": None, "tokenizer": None}
    other = apt.StableDiffusionAPTPipeline(**components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def test_a_pipeline_without_its_text_encoder_takes_the_rest(pipe, saved, caplog):
    with torch.no_grad():
        inputs = embeddings(pipe)
    apt.load_apt_weights({"unet": pipe.unet}, saved, components=["unet"])
    expected = draw(pipe, None, **inputs)
    pipe.unload_apt_weights()
    other = without_text_encoder(pipe)
    other.load_apt_weights(saved)
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert len(said) == 1 and "text_encoder" in said[0]
    assert other.get_list_apt_adapters() == {"unet": ["default"]}
    assert np.array_equal(draw(other, None, **inputs), expected)


def test_components_choose(pipe, saved):
    pipe.load_apt_weights(saved, components=["text_encoder"])
    assert pipe.get_list_apt_adapters() == {"text_encoder": ["default"]}
    pipe.unload_apt_weights()
    for wrong, message in ((["vae"], "must name some"), ([], "must name some"), ("unet", "must name some")):
        with pytest.raises(ValueError, match=message):
            pipe.load_apt_weights(saved, components=wrong)
    with pytest.raises(ValueError, match="no component"):
        without_text_encoder(pipe).load_apt_weights(saved, components=["text_encoder"])
    with pytest.raises(ValueError, match="loaded into a pipeline"):
        apt.load_apt_weights({"text_encoder": None, "unet": None, "transformer": None}, saved)


def test_a_saved_pipeline_opens_without_its_text_encoder(pipe, saved, tmp_path, caplog):
    pipe.load_apt_weights(saved, "both")
    apt.add_apt({"text_encoder": pipe.text_encoder}, SMALL, "text only")
    pipe.set_apt_adapters(["both", "text only"], [0.5, 0.25])
    pipe.save_pretrained(tmp_path / "pipe")
    opened = apt.StableDiffusionAPTPipeline.from_pretrained(tmp_path / "pipe", text_encoder=None)
    assert opened.get_list_apt_adapters() == {"unet": ["both"]} and opened.get_active_apt_adapters() == ["both"]
    assert "'text only' is left out" in caplog.text


def test_another_kind_of_pipeline_is_no_absent_component(unet, pipe, tmp_path):
    """Both have the CLIP text encoder; the file's denoiser has no place here."""

    class Transformer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(12, 3, batch_first=True)

    model = {"transformer": Transformer(), "text_encoder": make_text_encoder()}
    config = apt.APTConfig(num_prompts=4, target_modules=["attn"])
    apt.add_apt(model, {"transformer": config, "text_encoder": SMALL})
    file = apt.save_apt_weights(model, tmp_path)
    before = snapshot(pipe.text_encoder)
    with pytest.raises(ValueError, match=r"components \['text_encoder', 'transformer'\].*is loaded into a pipeline"):
        pipe.load_apt_weights(file)
    with pytest.raises(ValueError, match="is loaded into a pipeline"):
        apt.load_apt_weights({"unet": unet, "transformer": None, "text_encoder": pipe.text_encoder}, file)
    assert same(before, snapshot(pipe.text_encoder))


# Failures after the first module


class Fails(Exception):
    pass


@pytest.mark.parametrize("step", ["register", "offloading", "second component"])
@pytest.mark.parametrize("way", ["add", "load"])
def test_a_failure_while_attaching_leaves_the_model_as_it_was(pipe, saved, monkeypatch, step, way):
    import apt_diffusion.model as model_module

    apt.add_apt(pipe, apt.APTConfig(num_prompts=3), "own")
    randomize(pipe)
    pipe.set_apt_adapters("own", 0.5)
    before = [snapshot(pipe.unet), snapshot(pipe.text_encoder)]
    expected = draw(pipe)
    calls = []

    def fail_late(function, after):
        def replaced(*args, **kwargs):
            calls.append(1)
            if len(calls) > after:
                raise Fails
            return function(*args, **kwargs)

        return replaced

    if step == "register":
        from apt_diffusion.processor import APTProcessorCore

        monkeypatch.setattr(APTProcessorCore, "add", fail_late(APTProcessorCore.add, 2))
    else:
        after = {"offloading": 0, "second component": 1}[step]
        monkeypatch.setattr(model_module, "regroup_offloaded", fail_late(model_module.regroup_offloaded, after))
    with pytest.raises(Fails):
        if way == "add":
            apt.add_apt(pipe, SMALL, "new")
        else:
            pipe.load_apt_weights(saved, "new")
    monkeypatch.undo()
    assert all(same(old, snapshot(m)) for old, m in zip(before, (pipe.unet, pipe.text_encoder), strict=True))
    assert pipe.get_list_apt_adapters() == {"unet": ["own"], "text_encoder": ["own"]}
    assert np.array_equal(draw(pipe), expected)
    apt.add_apt(pipe, SMALL, "new")


@pytest.mark.parametrize("after", [0, 2])
def test_a_failure_at_new_places_leaves_no_core_behind(unet, monkeypatch, after):
    import apt_diffusion.model as model_module
    from apt_diffusion.processor import APTProcessorCore

    before, calls = snapshot(unet), []
    add, register = APTProcessorCore.add, model_module.register

    def failing(function):
        def replaced(*args):
            calls.append(1)
            if len(calls) > after:
                raise Fails
            return function(*args)

        return replaced

    for target, name, function in ((APTProcessorCore, "add", add), (model_module, "register", register)):
        calls.clear()
        monkeypatch.setattr(target, name, failing(function))
        with pytest.raises(Fails):
            apt.add_apt(unet, SMALL)
        monkeypatch.undo()
        assert same(before, snapshot(unet)) and not list(cores_of(unet))


def test_a_failure_in_a_hot_swap_puts_the_old_weights_back(pipe, saved, monkeypatch):
    from apt_diffusion.io import hotswap

    pipe.load_apt_weights(saved, "slot")
    randomize(pipe, 5)
    expected, calls, write = draw(pipe), [], hotswap.write_parameters

    def fail(*args):
        calls.append(1)
        if len(calls) > 5:
            raise Fails
        write(*args)

    monkeypatch.setattr(hotswap, "write_parameters", fail)
    with pytest.raises(Fails):
        pipe.load_apt_weights(saved, "slot", hotswap=True)
    assert np.array_equal(draw(pipe), expected)


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_adapters_of_a_half_precision_base_are_float32(dtype, tmp_path):
    """AdamW on float16 parameters: epsilon 1e-8 is zero, and after one step they are NaN."""
    torch.manual_seed(0)
    model = make_text_encoder().to(dtype)
    apt.add_apt(model, SMALL)
    expected = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for core in cores_of(model) for p in core.parameters()} == {expected}
    apt.freeze_base(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        result = text_output(model)
        assert result.dtype == dtype
        (result.float() * torch.randn(result.shape, generator=generator)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for core in cores_of(model) for p in core.parameters())
    assert all(core.adapters["default"].gate.abs() > 1e-3 for core in cores_of(model))
    file = apt.save_apt_weights(model, tmp_path)
    apt.remove_apt(model)
    apt.load_apt_weights(model, file)
    assert {p.dtype for core in cores_of(model) for p in core.parameters()} == {expected}
    assert model.dtype == dtype


@pytest.mark.parametrize("option", [{"weight_name": "other.safetensors"}, {"subfolder": "inside"}])
def test_arguments_that_could_not_act_are_refused(unet, tmp_path, option):
    apt.add_apt(unet, SMALL)
    file = apt.save_apt_weights(unet, tmp_path)
    apt.remove_apt(unet)
    for source in (file, str(file), load_file(file), read_adapter_file(file)):
        with pytest.raises(ValueError, match="name a file inside a folder"):
            apt.load_apt_weights(unet, source, config=SMALL, **option)
    with pytest.raises(FileNotFoundError):
        apt.load_apt_weights(unet, tmp_path, **option)
    assert apt.get_list_apt_adapters(unet) == []


def test_what_is_left_out_is_said_once(pipe, saved, caplog):
    """Also where a store brings the adapter for every call."""
    other = without_text_encoder(pipe)
    for _ in range(3):
        other.load_apt_weights(saved)
        other.unload_apt_weights()
    assert len([record for record in caplog.records if "left out" in record.message]) == 1
