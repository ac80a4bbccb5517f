"""The store for serving: names, memory, changes on disk, threads, and adapters that come for one call."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import draw, randomize
from safetensors.torch import load_file, save_file

import apt_diffusion as apt
from apt_diffusion import AdapterStore
from apt_diffusion.api import cores_of
from apt_diffusion.io.files import WEIGHTS_NAME, read_adapter_file
from apt_diffusion.serving import store

NAMES = ("a", "b", "c")


def write_adapter(file, value: float, size: int = 1000) -> None:
    """A file that the store takes for an adapter: `size` float32 numbers."""
    save_file({"unet.attn.apt.prompts": torch.full((1, size), value)}, file)


@pytest.fixture
def folder(tmp_path):
    """Three adapters of 4000 bytes, as a trainer writes them and as single files."""
    for index, name in enumerate(NAMES[:2]):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name / WEIGHTS_NAME, float(index))
    write_adapter(tmp_path / "c.safetensors", 2.0)
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that were read."""
    files = []

    def read(file, with_words):
        files.append(file.parent.name if file.name == WEIGHTS_NAME else file.stem)
        time.sleep(0.01)  # as a large file would take: long enough for another thread to ask
        return read_adapter_file(file, with_words)

    monkeypatch.setattr(store, "read_adapter_file", read)
    return files


def value(adapter) -> float:
    return adapter.tensors["unet.attn.apt.prompts"].mean().item()


def test_lists_what_is_on_disk(folder):
    adapters = AdapterStore(folder)
    assert adapters.names() == ["a", "b", "c"]
    assert adapters.file("a") == folder.resolve() / "a" / WEIGHTS_NAME
    assert [value(adapters.get(name)) for name in NAMES] == [0.0, 1.0, 2.0]
    (folder / "notes.txt").write_text("not an adapter")
    (folder / "checkpoints").mkdir()
    shutil.copytree(folder / "a", folder / "d")
    shutil.rmtree(folder / "b")
    assert adapters.names() == ["a", "c", "d"]
    with pytest.raises(ValueError, match="no adapter 'b'"):
        adapters.get("b")
    assert adapters.names_in_memory == ["a", "c"]


@pytest.mark.parametrize("name", ["../a", "a/..", "", ".", "a/", f"a/{WEIGHTS_NAME}", "c.safetensors", "a\0", "~"])
def test_names_are_no_paths(folder, name):
    inner = folder / "inner"
    inner.mkdir()
    for names in (folder, inner):
        with pytest.raises(ValueError, match="There is no adapter"):
            AdapterStore(names).get(name)


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    write_adapter(outside / WEIGHTS_NAME, 9.0)
    (folder / "linked").symlink_to(outside)
    (folder / "file.safetensors").symlink_to(outside / WEIGHTS_NAME)
    (folder / "within").symlink_to(folder / "a")
    assert AdapterStore(folder).names() == ["a", "b", "c", "within"]


def test_bad_folder_and_limit(tmp_path):
    with pytest.raises(FileNotFoundError, match="needs one"):
        AdapterStore(tmp_path / "missing")
    with pytest.raises(ValueError, match="-1"):
        AdapterStore(tmp_path, -1)


def test_the_least_recently_used_leave_memory(folder, reads):
    adapters = AdapterStore(folder, max_bytes=8000)
    first = adapters.get("a")
    adapters.get("b")
    assert adapters.get("a") is first and adapters.names_in_memory == ["b", "a"]
    adapters.get("c")
    assert adapters.names_in_memory == ["a", "c"] and adapters.bytes_in_memory == 8000
    adapters.get("b")
    assert reads == ["a", "b", "c", "b"] and adapters.names_in_memory == ["c", "b"]


def test_a_limit_smaller_than_one_adapter_keeps_none(folder, reads):
    adapters = AdapterStore(folder, max_bytes=3999)
    assert [value(adapters.get("b")) for _ in range(2)] == [1.0, 1.0]
    assert reads == ["b", "b"] and adapters.bytes_in_memory == 0
    write_adapter(folder / "c.safetensors", 2.0, size=10)
    assert adapters.get("c") is adapters.get("c") and adapters.bytes_in_memory == 40


def test_a_changed_file_is_read_again(folder):
    adapters = AdapterStore(folder)
    before = adapters.get("c")
    write_adapter(folder / "new", 5.0)
    (folder / "new").rename(folder / "c.safetensors")
    assert value(adapters.get("c")) == 5.0 and adapters.bytes_in_memory == 4000
    write_adapter(folder / "c.safetensors", 7.0, size=2000)  # in place, as no writer of ours does
    assert value(adapters.get("c")) == 7.0 and value(before) == 2.0
    kept = adapters.get("c")
    other = folder / "other"
    write_adapter(other, 6.0, size=2000)
    with open(folder / "c.safetensors", "r+b") as stream:  # over the very bytes that were read
        stream.write(other.read_bytes())
    assert value(kept) == 7.0
    write_adapter(folder / "c.safetensors", 8.0, size=10)
    assert adapters.get("c").tensors["unet.attn.apt.prompts"].shape == (1, 10) and adapters.bytes_in_memory == 40


def test_a_damaged_file_is_one_error_and_heals(folder):
    adapters = AdapterStore(folder)
    good = (folder / "c.safetensors").read_bytes()
    (folder / "c.safetensors").write_bytes(good[:-100])
    for _ in range(2):
        with pytest.raises(ValueError, match="cut off"):
            adapters.get("c")
    save_file({"lora.weight": torch.zeros(1)}, folder / "c.safetensors")
    with pytest.raises(ValueError, match="LoRA"):
        adapters.get("c")
    assert value(adapters.get("a")) == 0.0
    (folder / "c.safetensors").write_bytes(good)
    assert value(adapters.get("c")) == 2.0


def test_many_threads_read_each_file_once_and_get_what_they_asked_for(folder, reads):
    adapters, start = AdapterStore(folder), threading.Barrier(8)

    def work(index):
        start.wait()
        return [(name, value(adapters.get(name))) for name in NAMES[index % 3 :] + NAMES[: index % 3]]

    with ThreadPoolExecutor(8) as pool:
        found = [pair for pairs in pool.map(work, range(8)) for pair in pairs]
    assert set(found) == {("a", 0.0), ("b", 1.0), ("c", 2.0)} and sorted(reads) == ["a", "b", "c"]


def test_threads_with_a_small_limit_and_a_writer(folder):
    """Whole files only, never more than the limit, no deadlock."""
    adapters, stop, errors = AdapterStore(folder, max_bytes=8000), threading.Event(), []

    def write():
        for number in range(60):
            write_adapter(folder / "new", 10.0 + number)
            (folder / "new").rename(folder / "c.safetensors")
        stop.set()

    def read(index):
        generator = np.random.default_rng(index)
        while not stop.is_set():
            name = str(generator.choice(NAMES))
            tensor = adapters.get(name).tensors["unet.attn.apt.prompts"]
            expected = {"a": 0.0, "b": 1.0}.get(name)
            if tensor.min() != tensor.max() or expected not in (None, tensor[0, 0].item()):
                errors.append((name, tensor))
            if adapters.bytes_in_memory > 8000:
                errors.append(adapters.names_in_memory)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(4)] + [threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not errors
    assert value(adapters.get("c")) == 69.0


@pytest.fixture
def trained(pipe, tmp_path):
    """A folder with two adapters of the tiny pipeline, which is left without any; and what each of them draws."""
    pictures = {None: draw(pipe)}
    for seed, name in enumerate(("dog", "cat")):
        apt.add_apt(pipe, apt.APTConfig(num_prompts=4 + seed, rank=2), name)
        randomize(pipe, seed)
        pipe.save_apt_weights(tmp_path / name, name)
        pictures[name] = draw(pipe)
        pipe.unload_apt_weights()
    assert all(np.abs(pictures[None] - pictures[name]).max() > 1e-3 for name in ("dog", "cat"))
    return tmp_path, pictures


def test_a_pipeline_takes_from_the_store_what_a_call_names(pipe, trained):
    folder, pictures = trained
    pipe.apt_store = AdapterStore(folder)
    assert np.array_equal(draw(pipe, apt_scale={"dog": 1.0}), pictures["dog"])
    assert np.array_equal(draw(pipe, apt_scale={"cat": 1.0}), pictures["cat"])
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1, 1)
    mixed = draw(pipe, apt_adapter_names=["cat", None, "dog"], latents=noise)
    assert np.allclose(mixed, np.concatenate([pictures["cat"], pictures[None], pictures["dog"]]), atol=1e-4)
    assert pipe.get_list_apt_adapters() == {} and not list(cores_of(pipe))
    assert np.array_equal(draw(pipe), pictures[None])
    assert pipe.apt_store.names_in_memory == ["cat", "dog"]
    with pytest.raises(ValueError, match="apt_adapter_names must be a list"):
        draw(pipe, apt_adapter_names="dog")


def test_what_was_active_is_active_again(pipe, trained):
    folder, _ = trained
    pipe.apt_store = AdapterStore(folder)
    apt.add_apt(pipe, apt.APTConfig(num_prompts=3), "own")
    randomize(pipe, 5)
    pipe.set_apt_adapters("own", {"unet": {"mid": 0.5}, "text_encoder": 0.25})
    expected = draw(pipe)
    beside = draw(pipe, apt_scale={"dog": 1.0})
    assert pipe.get_active_apt_adapters() == ["own"] and np.array_equal(draw(pipe), expected)
    pipe.load_apt_weights(folder / "dog", "dog")
    assert np.abs(draw(pipe) - beside).max() < 1e-5 < np.abs(expected - beside).max()


def test_an_adapter_that_the_model_has_is_left_alone(pipe, trained):
    folder, pictures = trained
    pipe.load_apt_weights(folder / "cat", "dog")  # under a name that the store has, too
    with AdapterStore(folder).attached(pipe, ["dog", "cat"]):
        assert pipe.get_list_apt_adapters()["unet"] == ["dog", "cat"] and pipe.get_active_apt_adapters() == ["dog"]
    assert pipe.get_list_apt_adapters()["unet"] == ["dog"] and np.array_equal(draw(pipe), pictures["cat"])


def test_a_failure_attaches_none(pipe, trained):
    folder, pictures = trained
    file = folder / "cat" / WEIGHTS_NAME
    tensors = load_file(file)
    pipe.apt_store = AdapterStore(folder)
    header = read_adapter_file(file).metadata
    save_file(
        {key: tensor[:1] for key, tensor in tensors.items()}, file, metadata=header
    )  # an adapter, but of another size
    for names, message in ((["dog", "cat"], "cannot|not fit"), (["dog", "bird"], "no adapter 'bird'")):
        with pytest.raises(ValueError, match=message):
            draw(pipe, apt_adapter_names=names)
        assert pipe.get_list_apt_adapters() == {} and np.array_equal(draw(pipe), pictures[None])


def test_hot_swap_from_memory(pipe, trained, reads):
    folder, pictures = trained
    adapters = AdapterStore(folder)
    pipe.enable_apt_hotswap(8)
    pipe.load_apt_weights(adapters.get("dog"), "slot")
    parameters = [p for core in cores_of(pipe) for p in core.parameters()]
    for name in ("cat", "dog", "cat"):
        pipe.load_apt_weights(adapters.get(name), "slot", hotswap=True)
        assert np.allclose(draw(pipe), pictures[name], atol=1e-5)
    after = [p for core in cores_of(pipe) for p in core.parameters()]
    assert all(p is q for p, q in zip(parameters, after, strict=True)) and reads == ["dog", "cat"]


def test_what_leaves_with_a_call_leaves_room_for_a_swap(pipe, trained):
    folder, pictures = trained
    pipe.apt_store = AdapterStore(folder)
    pipe.enable_apt_hotswap(8)
    assert np.allclose(draw(pipe, apt_scale={"dog": 1.0}), pictures["dog"], atol=1e-5)
    pipe.load_apt_weights(pipe.apt_store.get("dog"), "slot")  # four prompts, in room for eight
    pipe.load_apt_weights(pipe.apt_store.get("cat"), "slot", hotswap=True)
    assert np.allclose(draw(pipe), pictures["cat"], atol=1e-5)


@pytest.mark.slow
def test_a_hot_swap_compiles_nothing_again(pipe, trained):
    """UNet and text encoder, adapters of four and five prompts."""
    folder, pictures = trained
    adapters, graphs = AdapterStore(folder), []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    pipe.enable_apt_hotswap(8)
    pipe.load_apt_weights(adapters.get("dog"), "slot")
    pipe.unet = torch.compile(pipe.unet, backend=backend)
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend=backend)
    assert np.allclose(draw(pipe), pictures["dog"], atol=1e-4)
    compiled = len(graphs)
    for name in ("cat", "dog", "cat"):
        pipe.load_apt_weights(adapters.get(name), "slot", hotswap=True)
        assert np.allclose(draw(pipe), pictures[name], atol=1e-4)
    assert len(graphs) == compiled >= 2
    torch._dynamo.reset()
