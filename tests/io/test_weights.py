"""The file format: bit-exact round trips, and failed loads that leave the model exactly as it was."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_text_encoder, make_unet, randomize
from safetensors.torch import load_file, save_file
from support.families import same, snapshot, text_output, unet_output

import apt_diffusion as apt
from apt_diffusion.api import adapter_parameters, cores_of
from apt_diffusion.io.files import WEIGHTS_NAME, read_adapter_file
from apt_diffusion.io.save import apt_state_dict

SMALL = apt.APTConfig(num_prompts=6, rank=2)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return make_unet().eval()


@pytest.fixture
def file(unet, tmp_path):
    """An adapter of `unet`, saved; the model is bare again."""
    apt.add_apt(unet, SMALL)
    randomize(unet)
    path = apt.save_apt_weights(unet, tmp_path / "saved", metadata={"base_model": "tiny-one"})
    apt.remove_apt(unet)
    return path


def test_round_trip_is_bit_exact(unet, tmp_path):
    config = apt.APTConfig(
        num_prompts=5, rank=3, init="paper", query_source="hidden_states", streams=["query", "context"]
    )
    apt.add_apt(unet, config)
    randomize(unet)
    before = unet_output(unet)
    path = apt.save_apt_weights(unet, tmp_path, metadata={"instance_prompt": "a sks glyph"})
    assert path == tmp_path / WEIGHTS_NAME and [p.name for p in tmp_path.iterdir()] == [WEIGHTS_NAME]
    state = {key: value.clone() for key, value in unet.state_dict().items() if ".apt" in key}
    apt.remove_apt(unet)
    rng = torch.get_rng_state()
    apt.load_apt_weights(unet, tmp_path)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(unet.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(unet_output(unet), before)
    again = apt.save_apt_weights(unet, tmp_path / "again.safetensors", metadata={"instance_prompt": "a sks glyph"})
    first, second = read_adapter_file(path), read_adapter_file(again)
    assert first.metadata == second.metadata and first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(second.tensors[key], value) for key, value in first.tensors.items())


def test_keys_and_header_explain_the_file(unet, file):
    keys = list(load_file(file))
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.apt.prompts" in keys
    assert all(".apt." in key or ".apt_context." in key for key in keys)
    header = read_adapter_file(file).metadata
    assert header["format"] == "pt" and header["base_model"] == "tiny-one"
    assert header["apt_diffusion_version"] == apt.__version__
    stored = apt.APTConfig.from_dict(json.loads(header["apt_config"])[""])
    assert (stored.num_prompts, stored.rank, stored.init) == (6, 2, "identity")


@pytest.mark.parametrize("segment", ["text_model.", ""])
def test_old_and_new_clip_prefixes_load(segment, tmp_path):
    torch.manual_seed(0)
    model = make_text_encoder().eval()
    apt.add_apt(model, SMALL)
    randomize(model)
    before = text_output(model)
    path = apt.save_apt_weights(model, tmp_path)
    tensors = load_file(path)
    assert "encoder.layers.0.self_attn.apt.prompts" in tensors
    header = read_adapter_file(path).metadata
    save_file({segment + key: value for key, value in tensors.items()}, path, metadata=header)
    apt.remove_apt(model)
    apt.load_apt_weights(model, path)
    assert torch.equal(text_output(model), before)
    apt.remove_apt(model)
    apt.load_apt_weights(model, {segment + key: value for key, value in tensors.items()}, config=apt.APTConfig())
    assert torch.equal(text_output(model), before)


def test_dict_without_header_takes_sizes_and_places_from_the_tensors(unet, file):
    tensors = {key: value for key, value in load_file(file).items() if "mid_block" in key}
    base = unet_output(unet)
    assert apt.load_apt_weights(unet, tensors, config=apt.APTConfig()) == [
        "mid_block.attentions.0.transformer_blocks.0.attn2"
    ]
    assert not torch.allclose(unet_output(unet), base)
    assert {key: tuple(value.shape) for key, value in apt_state_dict(unet).items()} == {
        key: tuple(value.shape) for key, value in tensors.items()
    }


def damaged(file, change):
    tensors, header = load_file(file), read_adapter_file(file).metadata
    change(tensors, header)
    save_file(tensors, file, metadata=header)


def drop_one(tensors, header):
    del tensors["mid_block.attentions.0.transformer_blocks.0.attn2.apt.low_rank_up"]


def drop_module(tensors, header):
    for key in [key for key in tensors if key.startswith("mid_block")]:
        del tensors[key]


def add_one(tensors, header):
    tensors["classifier.weight"] = torch.zeros(3)


def reshape_one(tensors, header):
    tensors["mid_block.attentions.0.transformer_blocks.0.attn2.apt.prompts"] = torch.zeros(6, 48)


def flatten_one(tensors, header):
    tensors["mid_block.attentions.0.transformer_blocks.0.attn2.apt.prompts"] = torch.zeros(6)


def poison_one(tensors, header):
    tensors["mid_block.attentions.0.transformer_blocks.0.attn2.apt.prompts"][0, 0] = float("nan")


def in_eight_bits(tensors, header):
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.apt.prompts"
    tensors[key] = torch.full_like(tensors[key], float("nan")).to(torch.float8_e4m3fn)


def claim_more_prompts(tensors, header):
    header["apt_config"] = header["apt_config"].replace('"num_prompts": 6', '"num_prompts": 7')


def break_header(tensors, header):
    header["apt_config"] = "{nonsense"


def newer_header(tensors, header):
    header["apt_config"] = header["apt_config"].replace('"rank"', '"colour": 3, "rank"')


def make_lora(tensors, header):
    tensors.clear()
    tensors["unet.mid_block.lora.down.weight"] = torch.zeros(3)
    header.clear()


def make_foreign(tensors, header):
    tensors.clear()
    tensors["conv.weight"] = torch.zeros(3)
    header.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, "lacks 1 tensors .*low_rank_up"),
        (drop_module, "lacks 5 tensors"),
        (add_one, "holds unexpected 1 tensors .*classifier.weight"),
        (reshape_one, r"has shape \(6, 48\), this model needs \(6, 64\).*tiny-one"),
        (flatten_one, r"has shape \(6,\)"),
        (poison_one, "not finite"),
        (in_eight_bits, "not finite"),
        (claim_more_prompts, r"needs \(7, 64\)"),
        (break_header, "header that cannot be used"),
        (newer_header, "newer apt-diffusion"),
        (make_lora, "LoRA file.*load_lora_weights"),
        (make_foreign, "not an APT adapter"),
    ],
)
def test_a_failed_load_changes_nothing(unet, file, change, message):
    apt.add_apt(unet, SMALL, "first")
    randomize(unet)
    before, picture = snapshot(unet), unet_output(unet)
    damaged(file, change)
    with pytest.raises(ValueError, match=message):
        apt.load_apt_weights(unet, file, "second")
    assert same(before, snapshot(unet))
    assert torch.equal(unet_output(unet), picture)
    assert apt.get_list_apt_adapters(unet) == apt.get_active_apt_adapters(unet) == ["first"]


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({}, ValueError, "the given dict is not an APT adapter: none of its 0 tensors"),
        ({"conv.weight": torch.zeros(3)}, ValueError, "not an APT adapter"),
        ({"unet.x.lora.down.weight": torch.zeros(3)}, ValueError, "LoRA file.*load_lora_weights"),
        ({3: torch.zeros(3)}, TypeError, "tensors by name, got 3: Tensor"),
        ({"x.apt.prompts": [1.0]}, TypeError, "tensors by name, got 'x.apt.prompts': list"),
        (None, TypeError, "got NoneType"),
        (["a"], TypeError, "got list"),
    ],
)
def test_what_is_no_adapter_is_refused(unet, pipe, tensors, error, message):
    before = [snapshot(model) for model in (unet, pipe.unet, pipe.text_encoder)]
    for model in (unet, pipe):
        with pytest.raises(error, match=message):
            apt.load_apt_weights(model, tensors)
    after = [snapshot(model) for model in (unet, pipe.unet, pipe.text_encoder)]
    assert all(map(same, before, after))


def test_truncated_pickled_and_missing_files(unet, file, tmp_path):
    before = snapshot(unet)
    content = file.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            apt.load_apt_weights(unet, file)
    file.write_bytes(pickle.dumps({"unet.x.apt.prompts": [1]}))
    with pytest.raises(ValueError, match=r"pickled files .* are never loaded"):
        apt.load_apt_weights(unet, file)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no pytorch_apt_weights.safetensors in .*notes.txt"):
        apt.load_apt_weights(unet, tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        apt.load_apt_weights(unet, str(tmp_path / "nowhere"))
    for escape in ("../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "C:\\x.safetensors"):
        with pytest.raises(ValueError, match="leads out"):
            apt.load_apt_weights(unet, tmp_path, weight_name=escape)
        with pytest.raises(ValueError, match="leads out"):
            apt.load_apt_weights(unet, tmp_path, subfolder=escape)
    for no_file in (".", Path("."), "no.safetensors", Path("no.safetensors")):
        with pytest.raises(FileNotFoundError, match="There is no"):
            apt.load_apt_weights(unet, tmp_path, weight_name=no_file)
    with pytest.raises(TypeError, match="weight_name must be a name, got 3"):
        apt.load_apt_weights(unet, tmp_path, weight_name=3)
    assert same(before, snapshot(unet))


def test_wrong_base_models(unet, file, pipe, tmp_path):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"matches no module of CLIPTextModel.*tiny-one"):
        apt.load_apt_weights(make_text_encoder(), file)
    with pytest.raises(ValueError, match="one single model, but is loaded into a pipeline"):
        pipe.load_apt_weights(file)
    apt.add_apt(pipe, SMALL)
    path = pipe.save_apt_weights(tmp_path / "both")
    with pytest.raises(ValueError, match=r"components .*of a pipeline, but is loaded into a single model"):
        apt.load_apt_weights(unet, path)
    with pytest.raises(ValueError, match="is loaded into a pipeline with"):
        apt.load_apt_weights({"unet": unet}, path)
    assert apt.get_list_apt_adapters(unet) == []


def test_failure_in_the_second_component_leaves_the_first_untouched(pipe, tmp_path):
    apt.add_apt(pipe, SMALL)
    path = pipe.save_apt_weights(tmp_path)
    pipe.unload_apt_weights()
    tensors, header = load_file(path), read_adapter_file(path).metadata
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.apt.prompts"
    tensors[key] = torch.zeros(6, 48)  # "text_encoder" is worked through before "unet"
    save_file(tensors, path, metadata=header)
    before = [snapshot(pipe.unet), snapshot(pipe.text_encoder)]
    with pytest.raises(ValueError, match="has shape"):
        pipe.load_apt_weights(path)
    assert same(before[0], snapshot(pipe.unet)) and same(before[1], snapshot(pipe.text_encoder))


def test_saving_is_atomic(unet, file, monkeypatch):
    apt.load_apt_weights(unet, file)
    content = file.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="No space"):
        apt.save_apt_weights(unet, file)
    monkeypatch.undo()

    def interrupted(tensors, path, metadata):
        with open(path, "wb") as stream:
            stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apt.save_apt_weights(unet, file)
    assert file.read_bytes() == content
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    with pytest.raises(ValueError, match="'other' is not here"):
        apt.save_apt_weights(unet, file, "other")


def test_hub(unet, file, monkeypatch, tmp_path):
    """The hub's own client, answered from a folder."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    calls = []

    def download(repo_id, filename, **kwargs):
        calls.append((repo_id, filename, kwargs))
        if repo_id == "someone/offline":
            raise LocalEntryNotFoundError("offline")
        if repo_id == "someone/empty":
            raise EntryNotFoundError("404 Client Error: Entry Not Found")
        return str(file)

    real = huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    apt.load_apt_weights(
        unet,
        "someone/adapter",
        "a",
        subfolder="v2",
        revision="abc",
        token="t",
        cache_dir=tmp_path,
        local_files_only=True,
    )
    expected = {
        "subfolder": "v2",
        "revision": "abc",
        "token": "t",
        "cache_dir": tmp_path,
        "force_download": False,
        "local_files_only": True,
    }
    assert calls == [("someone/adapter", WEIGHTS_NAME, expected)]
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        apt.load_apt_weights(unet, "someone/offline", "b")
    with pytest.raises(FileNotFoundError, match="hub has no"):
        apt.load_apt_weights(unet, "someone/empty", "b")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", real)
    with pytest.raises(FileNotFoundError, match="no valid hub repository name"):
        apt.load_apt_weights(unet, "a/b/c/d", "b")
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        apt.load_apt_weights(unet, "someone/adapter", "b", cache_dir=tmp_path / "cache", local_files_only=True)
    assert apt.get_list_apt_adapters(unet) == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("init", ["paper", "identity"])
def test_hotswap_writes_in_place_between_sizes(unet, tmp_path, init):
    outputs, paths = {}, {}
    for name, prompts, seed in (("small", 3, 1), ("large", 9, 2)):
        apt.add_apt(unet, apt.APTConfig(num_prompts=prompts, rank=2, init=init))
        randomize(unet, seed)
        outputs[name] = unet_output(unet).detach()
        paths[name] = apt.save_apt_weights(unet, tmp_path / name)
        apt.remove_apt(unet)
    with pytest.raises(ValueError, match="no adapter 'default'"):
        apt.load_apt_weights(unet, paths["small"], hotswap=True)
    apt.load_apt_weights(unet, paths["small"])
    with pytest.raises(ValueError, match="enable_apt_hotswap"):
        apt.load_apt_weights(unet, paths["large"], hotswap=True)
    torch.testing.assert_close(unet_output(unet), outputs["small"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="before the first adapter"):
        apt.enable_apt_hotswap(unet, 16)
    apt.remove_apt(unet)
    apt.enable_apt_hotswap(unet, 16)
    apt.load_apt_weights(unet, paths["small"])
    pointers = [p.data_ptr() for core in cores_of(unet) for p in core.parameters()]
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    fast = torch.compile(unet, backend=backend)
    with torch.no_grad():
        for name in ("small", "large", "small"):
            apt.load_apt_weights(unet, paths[name], hotswap=True)
            torch.testing.assert_close(unet_output(unet), outputs[name], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(unet_output(fast), outputs[name], rtol=1e-5, atol=1e-5)
    assert len(compiled) == 1
    assert pointers == [p.data_ptr() for core in cores_of(unet) for p in core.parameters()]
    saved = apt.save_apt_weights(unet, tmp_path / "again")
    assert load_file(saved).keys() == load_file(paths["small"]).keys()
    for key, value in load_file(paths["small"]).items():
        assert torch.equal(load_file(saved)[key], value)
    torch._dynamo.reset()


def test_hotswap_between_ranks(unet, tmp_path):
    outputs, paths = {}, {}
    for name, rank, seed in (("thin", 1, 1), ("thick", 5, 2)):
        apt.add_apt(unet, apt.APTConfig(num_prompts=4, rank=rank))
        randomize(unet, seed)
        outputs[name] = unet_output(unet).detach()
        paths[name] = apt.save_apt_weights(unet, tmp_path / name)
        apt.remove_apt(unet)
    apt.enable_apt_hotswap(unet, max_num_prompts=6, max_rank=5)
    apt.load_apt_weights(unet, paths["thin"])
    pointers = [p.data_ptr() for core in cores_of(unet) for p in core.parameters()]
    for name in ("thick", "thin"):
        apt.load_apt_weights(unet, paths[name], hotswap=True)
        torch.testing.assert_close(unet_output(unet), outputs[name], rtol=1e-5, atol=1e-5)
        saved = load_file(apt.save_apt_weights(unet, tmp_path / "again"))
        assert all(torch.equal(saved[key], value) for key, value in load_file(paths[name]).items())
    assert pointers == [p.data_ptr() for core in cores_of(unet) for p in core.parameters()]
    apt.remove_apt(unet)
    apt.enable_apt_hotswap(unet, max_num_prompts=6, max_rank=4)
    with pytest.raises(ValueError, match="rank 5; enable_apt_hotswap allows 6 prompts of rank 4"):
        apt.load_apt_weights(unet, paths["thick"])


def test_hotswap_keeps_the_precision_of_what_it_overwrites(unet, file):
    half = unet.to(torch.bfloat16)
    apt.add_apt(half, SMALL)
    for parameter in adapter_parameters(half):
        parameter.data = parameter.data.float()
    apt.load_apt_weights(half, file, hotswap=True)
    expected, state = load_file(file), apt_state_dict(half)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
