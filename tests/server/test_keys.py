"""API keys: what is kept of them, and what each may do."""

import json
import time

import httpx
import pytest
from conftest import randomize
from support.gate import Gate
from support.server import fill, served

from apt_diffusion import StableDiffusionAPTPipeline
from apt_diffusion.cli import main
from apt_diffusion.server.keys import add_key, read_keys, remove_key
from apt_diffusion.server.settings import ServerSettings


def test_the_file_has_hashes_only_and_the_command_shows_a_key_once(tmp_path, capsys):
    file = tmp_path / "keys.json"
    words = ["keys", "add", "alice", "--keys", str(file), "--scopes", "generate", "--adapters", "cat-*"]
    assert main([*words, "--requests_per_minute", "60"]) == 0
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("apt-") and len(secret) > 40 and secret not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert main(["keys", "list", "--keys", str(file)]) == 0
    assert capsys.readouterr().out == "alice: generate; cat-*; 60 pictures a minute, 64 requests at a time\n"
    assert main(words) == 1 and "a key 'alice' already" in capsys.readouterr().err
    assert main(["keys", "remove", "bob", "--keys", str(file)]) == 1
    assert "no key 'bob'; there are alice" in capsys.readouterr().err
    assert main(["keys", "remove", "alice", "--keys", str(file)]) == 0 and read_keys(file) == {}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"keys": 1}', '{"keys": [{"name": "x", "scopes": ["all"]}]}', '{"keys": [{"nam": "x"}]}',
             '{"keys": [{"name": "x", "concurrent": 0}]}'],
)  # fmt: skip
def test_a_damaged_file_is_told(tmp_path, text):
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(ValueError, match="is no file of keys"):
        read_keys(tmp_path / "keys.json")
    with pytest.raises(FileNotFoundError, match="apt-diffusion keys add"):
        read_keys(tmp_path / "none.json")


def test_what_a_key_may_do(tiny_sd_path, tmp_path):
    pipe = StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path)
    pipe.set_progress_bar_config(disable=True)
    (tmp_path / "adapters").mkdir()
    fill(pipe, tmp_path / "adapters", randomize)
    file = tmp_path / "keys.json"
    owner = add_key(file, "owner")
    guest = add_key(file, "guest", ["generate"], ["a*"], requests_per_minute=2)
    settings = ServerSettings(adapters=str(tmp_path / "adapters"), keys=str(file), num_inference_steps=2)
    with served(pipe, settings) as (address, _):

        def call(method, path, secret, **kwargs):
            headers = {"Authorization": f"Bearer {secret}"} if secret else {}
            return httpx.request(method, f"{address}{path}", headers=headers, timeout=60, **kwargs)

        def draw(secret, model="a", **more):
            return call("POST", "/v1/images/generations", secret, json={"prompt": "x", "model": model, **more})

        for secret in ("", "apt-wrong", guest[:-1]):
            answer = draw(secret)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert call("GET", "/healthz", "").status_code == 200
        assert [m["id"] for m in call("GET", "/v1/models", guest).json()["data"]] == ["base", "a"]
        assert [m["id"] for m in call("GET", "/v1/models", owner).json()["data"]] == ["base", "a", "b"]
        assert draw(guest, "b").status_code == 404  # as if it were not there
        data = (tmp_path / "adapters" / "b.safetensors").read_bytes()
        assert call("PUT", "/v1/adapters/a2", guest, content=data).status_code == 403
        assert call("DELETE", "/v1/adapters/a", guest).status_code == 403
        assert call("PUT", "/v1/adapters/a2", owner, content=data).status_code == 201
        assert [draw(guest).status_code, draw(guest, "a2").status_code] == [200, 200]
        many = draw(guest)
        assert many.status_code == 429 and 1 <= int(many.headers["retry-after"]) <= 30
        assert "2 pictures a minute" in many.json()["error"]["message"]
        assert draw(owner, n=2).status_code == 200
        assert draw(guest, n=3).status_code == 400  # waiting would not help
        remove_key(file, "guest")
        assert draw(guest).status_code == 401
        file.write_text("damaged")
        time.sleep(0.01)
        assert draw(owner).status_code == 200  # the former keys stay in use
        file.unlink()
        assert draw(owner).status_code == 401


def test_requests_at_a_time_are_limited(tiny_sd_path, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    pipe = StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path)
    pipe.set_progress_bar_config(disable=True)
    secret = add_key(tmp_path / "keys.json", "one", concurrent=1)
    settings = ServerSettings(adapters=str(tmp_path / "adapters"), keys=str(tmp_path / "keys.json"))
    gate = Gate(pipe.unet)
    with served(pipe, settings) as (address, _), ThreadPoolExecutor() as pool, gate:

        def draw(steps):
            body = {"prompt": "x", "size": "16x16", "num_inference_steps": steps}
            headers = {"Authorization": f"Bearer {secret}"}
            return httpx.post(f"{address}/v1/images/generations", json=body, headers=headers, timeout=240)

        first = pool.submit(draw, 20)
        gate.wait()  # until it is being drawn
        assert draw(2).status_code == 429
        gate.open()
        assert first.result().status_code == 200 and draw(2).status_code == 200


def test_other_computers_need_keys(capsys):
    for host in ("0.0.0.0", "192.168.0.7", "::"):
        assert main(["serve", "--host", host]) == 1
        assert f"--host {host} lets other computers in" in capsys.readouterr().err
    assert main(["serve", "--keys", json.dumps("none")]) == 1 and "no file of keys" in capsys.readouterr().err
    assert main(["serve", "--max_queue", "0"]) == 1 and "--max_queue must be positive" in capsys.readouterr().err
