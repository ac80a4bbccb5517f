"""The hub's own client against a hub on this computer: what is asked for, with which token, and what comes of it."""

import pytest
import torch
from conftest import make_unet, randomize
from support.fake_hub import FakeHub
from support.families import same, snapshot, unet_output

import apt_diffusion as apt
from apt_diffusion.io.files import WEIGHTS_NAME
from apt_diffusion.training import hub as pushing

SMALL = apt.APTConfig(num_prompts=6, rank=2)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants, hf_api

    server = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "default-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    yield server
    server.close()


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return make_unet().eval()


@pytest.fixture
def adapters(unet, tmp_path):
    """Two adapters: the bytes of their files, and what the UNet says with them."""
    made = {}
    for seed, name in enumerate(("first", "second")):
        apt.add_apt(unet, SMALL)
        randomize(unet, seed)
        output = unet_output(unet).detach()
        made[name] = (apt.save_apt_weights(unet, tmp_path / name).read_bytes(), output)
        apt.remove_apt(unet)
    return made


def test_revisions_subfolders_and_the_cache(hub, unet, adapters, tmp_path):
    (first, first_output), (second, second_output) = adapters["first"], adapters["second"]
    hub.files = {
        ("someone/glyph", "main", WEIGHTS_NAME): first,
        ("someone/glyph", "v2", f"styles/{WEIGHTS_NAME}"): second,
        ("someone/glyph", "v2", "other.safetensors"): first,
    }
    places = [
        ({}, first_output),
        ({"revision": "v2", "subfolder": "styles"}, second_output),
        ({"revision": "v2", "weight_name": "other.safetensors"}, first_output),
    ]
    for place, output in places:
        apt.load_apt_weights(unet, "someone/glyph", cache_dir=tmp_path / "cache", **place)
        assert torch.equal(unet_output(unet), output)
        apt.remove_apt(unet)
    assert (tmp_path / "cache").is_dir() and not (tmp_path / "default-cache").exists()

    def downloads():
        return sum(method == "GET" for method, *_ in hub.seen)

    before = downloads()
    apt.load_apt_weights(unet, "someone/glyph", "again", cache_dir=tmp_path / "cache")
    assert downloads() == before
    apt.load_apt_weights(unet, "someone/glyph", "anew", cache_dir=tmp_path / "cache", force_download=True)
    assert downloads() == before + 1


def test_what_is_in_the_cache_loads_when_the_hub_is_out_of_reach(hub, unet, adapters, monkeypatch):
    from huggingface_hub import constants

    hub.files = {("someone/glyph", "main", WEIGHTS_NAME): adapters["first"][0]}
    apt.load_apt_weights(unet, "someone/glyph", "downloaded")
    hub.close()
    apt.load_apt_weights(unet, "someone/glyph", "cached")
    requests = len(hub.seen)
    apt.load_apt_weights(unet, "someone/glyph", "local", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    apt.load_apt_weights(unet, "someone/glyph", "offline")
    assert len(hub.seen) == requests
    assert torch.equal(unet_output(unet), adapters["first"][1])
    before = snapshot(unet)
    with pytest.raises(
        FileNotFoundError, match=r"'someone/other' is neither a file nor a folder.*not in the local cache"
    ):
        apt.load_apt_weights(unet, "someone/other", "x")
    assert same(before, snapshot(unet))


def test_a_private_repository_opens_to_its_token(hub, unet, adapters):
    hub.files = {("me/private", "main", WEIGHTS_NAME): adapters["first"][0]}
    hub.private = {"me/private": "hf_mine"}
    before = snapshot(unet)
    with pytest.raises(
        FileNotFoundError, match="'me/private' is neither a file nor a folder here, and the hub has no"
    ):
        apt.load_apt_weights(unet, "me/private")
    assert same(before, snapshot(unet)) and {token for *_, token in hub.seen} == {None}
    apt.load_apt_weights(unet, "me/private", token="hf_mine")
    assert hub.seen[-1][2] == "hf_mine" and torch.equal(unet_output(unet), adapters["first"][1])


@pytest.mark.parametrize("missing", [{"revision": "v9"}, {"weight_name": "x.safetensors"}, {"subfolder": "nowhere"}])
def test_what_the_hub_does_not_have_is_one_error(hub, unet, adapters, missing):
    hub.files = {("someone/glyph", "main", WEIGHTS_NAME): adapters["first"][0]}
    before = snapshot(unet)
    with pytest.raises(FileNotFoundError, match=r"the hub has no .*safetensors to give"):
        apt.load_apt_weights(unet, "someone/glyph", **missing)
    assert same(before, snapshot(unet))


def test_a_damaged_download_changes_nothing(hub, unet, adapters):
    hub.files = {("someone/glyph", "main", WEIGHTS_NAME): adapters["first"][0][:-9]}
    before = snapshot(unet)
    with pytest.raises(ValueError, match="cut off, damaged"):
        apt.load_apt_weights(unet, "someone/glyph")
    assert same(before, snapshot(unet))


def test_a_run_is_pushed_with_the_token_given(hub, tmp_path):
    for name in (WEIGHTS_NAME, "README.md", "losses.jsonl", "notes.txt", "checkpoint-2/README.md", ".hidden.png"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(f"content of {name}")
    repo_id = pushing.create_repository("glyph", "hf_mine")
    assert repo_id == "me/glyph"
    pushing.upload(repo_id, tmp_path / "run", "hf_mine")
    assert hub.committed == {
        name: f"content of {name}".encode() for name in (WEIGHTS_NAME, "README.md", "losses.jsonl")
    }
    assert {token for *_, token in hub.seen} == {"hf_mine"}


def test_a_hub_that_knows_nobody_is_found_out_before_training(hub):
    with pytest.raises(
        ValueError, match=r"(?s)--push_to_hub: the repository 'glyph'.*nothing was started.*hf auth login"
    ):
        pushing.create_repository("glyph", None)
