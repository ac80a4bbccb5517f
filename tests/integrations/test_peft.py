"""APT as a PEFT tuner gives the numbers of `add_apt`, and does what PEFT's users do with any tuner."""

import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from conftest import make_text_encoder, make_unet
from peft import LoraConfig, PeftModel, get_peft_model

import apt_diffusion.peft
from apt_diffusion import APTConfig, add_apt, load_apt_weights, save_apt_weights, set_apt_adapters
from apt_diffusion.convert.__main__ import main as convert_command
from apt_diffusion.convert.peft import apt_to_peft, peft_to_apt
from apt_diffusion.peft import APTLayer, APTTunerConfig

pytestmark = pytest.mark.slow

UNET_INPUTS = (
    torch.linspace(-1, 1, 512).view(2, 4, 8, 8),
    torch.tensor([3, 400]),
    torch.linspace(-2, 2, 448).view(2, 7, 32),
)
TOKENS = torch.arange(18).view(2, 9)
SETTINGS = {"num_prompts": 5, "rank": 2, "init": "paper"}


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return make_unet().eval()


@pytest.fixture
def text_encoder():
    torch.manual_seed(0)
    return make_text_encoder().eval()


def draw(model):
    with torch.no_grad():
        return model(*UNET_INPUTS).sample


def encode(model):
    with torch.no_grad():
        return model(TOKENS).last_hidden_state


def hooked(model, name="default", **settings):
    """A copy with a hooked adapter of random weights."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    add_apt(model, APTConfig(**SETTINGS | settings), name)
    randomise(model, ".apt")
    return model


def randomise(model, part):
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.normal_(0, 0.3)


VARIANTS = [
    {},
    {"init": "identity", "query_source": "attn_output"},
    {"streams": ["query", "context"], "activation": "softmax"},
    {"num_prompts_pattern": {"mid_block.*": 3}, "rank_pattern": {"attn2": 1}},
]


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_saved_adapter_draws_the_same_through_peft(unet, tmp_path, settings):
    ours = hooked(unet, **settings)
    save_apt_weights(ours, tmp_path / "apt")
    [folder] = apt_to_peft(tmp_path / "apt", tmp_path / "peft")
    theirs = PeftModel.from_pretrained(copy.deepcopy(unet), folder).eval()
    assert not torch.equal(draw(ours), draw(unet))
    torch.testing.assert_close(draw(theirs), draw(ours), rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", VARIANTS)
def test_an_adapter_of_peft_draws_the_same_when_loaded_by_us(unet, tmp_path, settings):
    theirs = get_peft_model(copy.deepcopy(unet), APTTunerConfig(**SETTINGS | settings)).eval()
    randomise(theirs, ".apt_")
    theirs.save_pretrained(tmp_path / "peft")
    ours = copy.deepcopy(unet)
    load_apt_weights(ours, peft_to_apt(tmp_path / "peft", tmp_path / "apt.safetensors"))
    torch.testing.assert_close(draw(ours), draw(theirs), rtol=0, atol=1e-6)


def test_gradients_are_those_of_the_hook(text_encoder, tmp_path):
    ours = hooked(text_encoder)
    save_apt_weights(ours, tmp_path / "apt")
    [folder] = apt_to_peft(tmp_path / "apt", tmp_path / "peft")
    theirs = PeftModel.from_pretrained(copy.deepcopy(text_encoder), folder, is_trainable=True)
    direction = torch.linspace(-1, 1, 18 * 32).view(2, 9, 32)
    for model in (ours, theirs):
        (model(TOKENS).last_hidden_state * direction).sum().backward()
    expected = {name.replace(".adapters.", "."): p.grad for name, p in ours.named_parameters() if ".apt." in name}
    found = {
        name.removeprefix("base_model.model.").replace(".apt_query.", ".apt."): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert sorted(found) == sorted(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
        assert gradient.abs().sum() > 0


def test_only_the_adapter_is_trainable_and_untrained_identity_changes_nothing(unet):
    model = get_peft_model(copy.deepcopy(unet), APTTunerConfig(num_prompts=5, rank=2))
    trainable, _ = model.get_nb_trainable_parameters()
    modules = [module for module in model.modules() if isinstance(module, APTLayer)]
    assert trainable == sum(5 * m.query_dim + 2 * 2 * m.query_dim + 2 for m in modules)  # p·d + 2·d·r + scale + gate
    assert torch.equal(draw(model.eval()), draw(unet))


def test_switching_disabling_deleting_and_unloading(text_encoder):
    base = encode(text_encoder)
    model = get_peft_model(copy.deepcopy(text_encoder), APTTunerConfig(**SETTINGS), "a").eval()
    model.add_adapter("b", APTTunerConfig(**SETTINGS | {"num_prompts": 3}))
    randomise(model, ".apt_")
    a = encode(model)
    model.set_adapter("b")
    b = encode(model)
    assert not torch.equal(a, b)
    with model.disable_adapter():
        assert torch.equal(encode(model), base)
    model.delete_adapter("b")
    assert model.active_adapters == ["a"]
    assert torch.equal(encode(model), a)
    assert torch.equal(encode(model.unload()), base)


def test_merging_is_refused_with_the_reason_and_changes_nothing(text_encoder):
    model = get_peft_model(copy.deepcopy(text_encoder), APTTunerConfig(**SETTINGS)).eval()
    before = encode(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged into the base model"):
            merge()
    assert torch.equal(encode(model), before)


def test_weights_through_diffusers_are_those_of_set_apt_adapters(unet, tmp_path):
    ours = hooked(hooked(unet, "a"), "b", num_prompts=2, query_source="attn_output")
    for name in "ab":
        save_apt_weights(ours, tmp_path / name, name)
    model = copy.deepcopy(unet)
    for name in "ab":
        [folder] = apt_to_peft(tmp_path / name, tmp_path / f"peft-{name}")
        model.add_adapter(peft.PeftConfig.from_pretrained(folder), name)
        state = peft.utils.load_peft_weights(str(folder))
        result = peft.set_peft_model_state_dict(model, state, name)
        assert not result.unexpected_keys
    model.set_adapters(["a", "b"], [0.7, -0.4])
    set_apt_adapters(ours, ["a", "b"], [0.7, -0.4])
    torch.testing.assert_close(draw(model), draw(ours), rtol=0, atol=1e-5)
    model.set_adapters(["a", "b"], [0.0, 0.0])
    assert torch.equal(draw(model), draw(unet))
    model.disable_adapters()
    assert torch.equal(draw(model), draw(unet))


def test_beside_lora_in_one_model(unet, tmp_path):
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    ours = copy.deepcopy(unet)
    torch.manual_seed(5)
    ours.add_adapter(lora, "lora")
    mixed = copy.deepcopy(ours)
    ours = hooked(ours)
    save_apt_weights(ours, tmp_path / "apt")
    [folder] = apt_to_peft(tmp_path / "apt", tmp_path / "peft")
    mixed.add_adapter(peft.PeftConfig.from_pretrained(folder), "apt")
    peft.set_peft_model_state_dict(mixed, peft.utils.load_peft_weights(str(folder)), "apt")
    mixed.set_adapters(["lora", "apt"], [0.5, 1.0])
    ours.set_adapters(["lora"], [0.5])
    torch.testing.assert_close(draw(mixed), draw(ours), rtol=0, atol=1e-5)


def test_transformers_add_save_and_load_adapter(text_encoder, tmp_path):
    model = copy.deepcopy(text_encoder)
    model.add_adapter(APTTunerConfig(**SETTINGS), "mine")
    randomise(model, ".apt_")
    with_adapter = encode(model)
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(text_encoder)
    again.load_adapter(str(tmp_path), "mine")
    torch.testing.assert_close(encode(again), with_adapter, rtol=0, atol=1e-6)
    again.disable_adapters()
    assert torch.equal(encode(again), encode(text_encoder))


def test_copies_pickles_and_checkpointing_keep_the_numbers(text_encoder):
    model = get_peft_model(copy.deepcopy(text_encoder), APTTunerConfig(**SETTINGS)).eval()
    randomise(model, ".apt_")
    expected = encode(model)
    assert torch.equal(encode(copy.deepcopy(model)), expected)
    assert torch.equal(encode(pickle.loads(pickle.dumps(model))), expected)

    def gradient(model):
        model.zero_grad()
        model(TOKENS).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradient(model.train())
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(plain, gradient(model), strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_bases_get_adapters_in_float32(text_encoder):
    model = get_peft_model(copy.deepcopy(text_encoder).to(torch.bfloat16), APTTunerConfig(**SETTINGS))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert encode(model.eval()).dtype is torch.bfloat16


def test_heads_go_both_ways(tmp_path):
    from transformers import CLIPConfig, CLIPForImageClassification, CLIPTextConfig, CLIPVisionConfig

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    torch.manual_seed(0)
    model = CLIPForImageClassification(
        CLIPConfig(vision_config=vision.to_dict(), text_config=CLIPTextConfig(**sizes).to_dict(), num_labels=3)
    ).eval()
    pixels = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
    ours = copy.deepcopy(model)
    add_apt(ours, APTConfig(num_prompts=3, modules_to_save=["classifier"]))
    randomise(ours, "classifier")
    save_apt_weights(ours, tmp_path / "apt")
    [folder] = apt_to_peft(tmp_path / "apt", tmp_path / "peft")
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    expected = ours(pixel_values=pixels).logits
    assert not torch.equal(expected, model(pixel_values=pixels).logits)
    torch.testing.assert_close(theirs(pixel_values=pixels).logits, expected, rtol=0, atol=1e-6)
    theirs.save_pretrained(tmp_path / "again")
    back = copy.deepcopy(model)
    load_apt_weights(back, peft_to_apt(tmp_path / "again", tmp_path / "back"))
    torch.testing.assert_close(back(pixel_values=pixels).logits, expected, rtol=0, atol=1e-6)


def test_an_adapter_of_a_pipeline_is_one_folder_per_component(unet, text_encoder, tmp_path):
    parts = {"unet": copy.deepcopy(unet), "text_encoder": copy.deepcopy(text_encoder)}
    add_apt(parts, APTConfig(**SETTINGS))
    for part in parts.values():
        randomise(part, ".apt")
    save_apt_weights(parts, tmp_path / "apt")
    folders = apt_to_peft(tmp_path / "apt", tmp_path / "peft")
    assert sorted(folder.name for folder in folders) == ["text_encoder", "unet"]
    theirs = PeftModel.from_pretrained(copy.deepcopy(text_encoder), tmp_path / "peft" / "text_encoder").eval()
    torch.testing.assert_close(encode(theirs), encode(parts["text_encoder"]), rtol=0, atol=1e-6)
    again = {"unet": copy.deepcopy(unet), "text_encoder": copy.deepcopy(text_encoder)}
    load_apt_weights(again, peft_to_apt(tmp_path / "peft", tmp_path / "back"))
    assert torch.equal(draw(again["unet"]), draw(parts["unet"]))
    assert torch.equal(encode(again["text_encoder"]), encode(parts["text_encoder"]))


def test_bad_settings_and_places_are_refused_before_a_module_is_replaced(unet):
    for settings, message in (
        ({"num_prompts": 0}, "num_prompts"), ({"init": "zero"}, "init"), ({"streams": ["image"]}, "streams"),
        ({"layers_pattern": ["layers"]}, "layers_to_transform"), ({"activation": "gelu"}, "activation"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            APTTunerConfig(**settings)
    names = [name for name, _ in unet.named_modules()]
    for targets, message in ((["attn2", "conv_in"], "conv_in"), (["nowhere"], "nowhere")):
        with pytest.raises(ValueError, match=message):
            get_peft_model(unet, APTTunerConfig(target_modules=targets))
        assert [name for name, _ in unet.named_modules()] == names
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), APTTunerConfig())


def test_a_config_survives_its_json(tmp_path):
    config = APTTunerConfig(target_modules=["attn2"], streams=["query"], rank_pattern={"mid": 2}, dropout=0.1)
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
    assert isinstance(peft.PeftConfig.from_pretrained(tmp_path), APTTunerConfig)


def test_conversion_refuses_what_it_cannot_convert(unet, tmp_path):
    lora = copy.deepcopy(unet)
    lora.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "default")
    get_peft_model(copy.deepcopy(unet), LoraConfig(r=2, target_modules=["to_q"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA, not of APT"):
        peft_to_apt(tmp_path / "lora", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        peft_to_apt(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_apt_weights(hooked(unet), tmp_path / "apt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        apt_to_peft(tmp_path / "apt", tmp_path / "full")


def test_the_command_converts_both_ways_and_ends_with_one_sentence_where_it_cannot(unet, tmp_path, capsys):
    ours = hooked(unet)
    save_apt_weights(ours, tmp_path / "apt")
    assert convert_command([str(tmp_path / "apt"), str(tmp_path / "peft"), "--to", "peft"]) == 0
    assert convert_command([str(tmp_path / "peft"), str(tmp_path / "back"), "--to", "apt"]) == 0
    again = copy.deepcopy(unet)
    load_apt_weights(again, tmp_path / "back")
    assert torch.equal(draw(again), draw(ours))
    capsys.readouterr()
    assert convert_command([str(tmp_path / "back"), str(tmp_path / "other"), "--to", "apt"]) == 1
    assert "There is no adapter_config.json" in capsys.readouterr().err.splitlines()[-1]


def test_another_process_loads_it_after_the_import_only(text_encoder, tmp_path):
    model = get_peft_model(copy.deepcopy(text_encoder), APTTunerConfig(**SETTINGS)).eval()
    model.save_pretrained(tmp_path / "peft")
    script = "import peft; print(peft.PeftConfig.from_pretrained({!r}).num_prompts)".format(str(tmp_path / "peft"))
    alone = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert alone.returncode != 0
    both = subprocess.run(
        [sys.executable, "-c", f"import apt_diffusion.peft; {script}"], capture_output=True, text=True
    )
    assert both.stdout.strip() == "5", both.stderr
    assert apt_diffusion.peft.PeftType["APT"].value == "APT"
