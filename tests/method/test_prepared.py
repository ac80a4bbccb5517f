"""Prepared inference: what is computed once, what makes it be computed again, and what is compiled."""

import numpy as np
import pytest
import torch
from conftest import make_text_encoder, make_unet, randomize
from support.families import text_output, unet_output
from support.pipeline_helpers import INPUTS, SMALL, draw, make_pipe

import apt_diffusion as apt
from apt_diffusion.api import cores_of
from apt_diffusion.equation import ApproximatedPrompt
from apt_diffusion.processor import APTProcessorCore


@pytest.fixture
def unet():
    """Two adapters, both streams, one by default active."""
    torch.manual_seed(0)
    unet = make_unet().eval()
    for name in ("a", "b"):
        apt.add_apt(unet, SMALL, name)
    randomize(unet)
    apt.set_apt_adapters(unet, "a")
    return unet


def adapters_of(unet):
    return [core.adapters["a"] for core in cores_of(unet)]


def in_place(unet, _):
    with torch.no_grad():
        for adapter in adapters_of(unet):
            adapter.prompts.mul_(1.5)


def optimizer_step(unet, _):
    apt.freeze_base(unet)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=1.0)
    unet_output(unet).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_dict(unet, _, assign=False):
    state = {key: value * 1.5 if ".apt" in key else value for key, value in unet.state_dict().items()}
    unet.load_state_dict(state, assign=assign)


def there_and_back(unet, _):
    """To half precision and back: rounded, perhaps at the very address where the weights were before."""
    unet.to(torch.bfloat16)
    unet.to(torch.float32)


def new_data(unet, _):
    for adapter in adapters_of(unet):
        for _ in range(2):  # the second may get the first one's address
            adapter.prompts.data = adapter.prompts.data * 1.5


def hot_swap(unet, tmp_path):
    other = make_unet()
    apt.add_apt(other, SMALL)
    randomize(other, 7)
    apt.load_apt_weights(unet, apt.save_apt_weights(other, tmp_path), "a", hotswap=True)


def reloaded(unet, tmp_path):
    other = make_unet()
    apt.add_apt(other, SMALL)
    randomize(other, 7)
    apt.delete_apt_adapters(unet, "a")
    apt.load_apt_weights(unet, apt.save_apt_weights(other, tmp_path), "a")


def per_sample(unet, _):
    for core in cores_of(unet):
        core.adapters_per_sample = ("b", "a")


CHANGES = {
    "in place": in_place,
    "optimizer": optimizer_step,
    "load_state_dict": state_dict,
    "load_state_dict that assigns": lambda unet, path: state_dict(unet, path, assign=True),
    "precision and back": there_and_back,
    "double precision": lambda unet, _: unet.to(torch.float64),
    "new data": new_data,
    "hot swap": hot_swap,
    "another under the same name": reloaded,
    "other adapter": lambda unet, _: apt.set_apt_adapters(unet, "b"),
    "two adapters": lambda unet, _: apt.set_apt_adapters(unet, ["a", "b"], [0.4, 0.8]),
    "weight": lambda unet, _: apt.set_apt_adapters(unet, "a", 0.5),
    "weights per block": lambda unet, _: apt.set_apt_adapters(unet, "a", {"mid": 0.0, "up": [0.2, 0.6]}),
    "scale": lambda unet, _: apt.set_apt_scale(unet, 0.5),
    "off": lambda unet, _: apt.disable_apt(unet),
    "an adapter per sample": per_sample,
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(unet, tmp_path, change):
    """With the same inputs: the context stream's correction depends on the weights, too."""
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)

    @torch.no_grad()
    def run():
        dtype = unet.dtype
        return unet(
            sample.to(dtype), 7, encoder_hidden_states=context if dtype == torch.float32 else context.to(dtype)
        )[0]

    with apt.prepared_apt(unet):
        before = run()
        assert torch.equal(run(), before)
        CHANGES[change](unet, tmp_path)
        prepared = run()
        assert not torch.equal(prepared, before)
    torch.testing.assert_close(prepared, run(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_another_context_at_the_same_place_is_seen(unet):
    """A pipeline's user may write new embeddings into the old tensor, and PyTorch new tensors into old memory."""
    sample, contexts = torch.randn(1, 4, 8, 8), torch.randn(5, 1, 5, 32)
    expected = [unet(sample, 7, encoder_hidden_states=context)[0] for context in contexts]
    written = torch.empty(1, 5, 32)
    with apt.prepared_apt(unet):
        for context, output in zip(contexts, expected, strict=True):
            written.copy_(context)
            for same in (context.clone(), written):
                assert torch.equal(unet(sample, 7, encoder_hidden_states=same)[0], output)
    assert all(not torch.equal(expected[0], output) for output in expected[1:])


def test_in_inference_mode(unet):
    """Its tensors do not count their changes: what depends on them is not kept."""
    context = torch.randn(1, 5, 32)
    with torch.inference_mode(), apt.prepared_apt(unet):
        sample, states = torch.randn(1, 4, 8, 8), context.clone()
        before = unet(sample, 7, encoder_hidden_states=states)[0]
        states.add_(1)
        after = unet(sample, 7, encoder_hidden_states=states)[0]
        for core in cores_of(unet):
            core.adapters_per_sample = ("b",)
        mixed = unet(sample, 7, encoder_hidden_states=states)[0]
    with torch.inference_mode():
        assert torch.allclose(unet(sample, 7, encoder_hidden_states=states)[0], mixed, atol=1e-6)
    assert not torch.equal(before, after) and not torch.equal(after, mixed)


@pytest.fixture
def counted(monkeypatch):
    """Calls of what prepared inference saves: foldings, and corrections of the context."""
    counts = {"folded": 0, "context": 0}
    fold, forward = ApproximatedPrompt.fold, APTProcessorCore.forward

    def count_fold(self, *args, **kwargs):
        counts["folded"] += 1
        return fold(self, *args, **kwargs)

    def count_forward(self, attn_output, hidden_states):
        counts["context"] += attn_output is hidden_states  # only the context stream asks with what it corrects
        return forward(self, attn_output, hidden_states)

    monkeypatch.setattr(ApproximatedPrompt, "fold", count_fold)
    monkeypatch.setattr(APTProcessorCore, "forward", count_forward)
    return counts


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("settings", [{}, {"apt_adapter_names": ["default", None, "default"]}])
def test_once_per_prompt_and_not_once_per_step(tiny_sd_path, tiny_sdxl_path, counted, kind, settings):
    pipeline = make_pipe(kind, tiny_sd_path, tiny_sdxl_path)
    apt.add_apt(pipeline, SMALL)
    randomize(pipeline)
    cores = list(cores_of(pipeline))
    contexts = sum("context" in name for name, m in pipeline.unet.named_modules() if isinstance(m, APTProcessorCore))
    draw(pipeline, **settings)  # two steps with guidance, and twice through each text encoder
    assert counted == {"folded": len(cores), "context": contexts}
    assert not any(core.keep_folded or core.kept() for core in cores)
    with apt.prepared_apt(pipeline):  # around several calls: nothing is folded again
        pictures = [draw(pipeline, **settings) for _ in range(2)]
        assert counted == {"folded": 2 * len(cores), "context": 3 * contexts}
        pipeline.set_apt_adapters("default", 0.5)
        assert not np.array_equal(draw(pipeline), pictures[0])
        tensors = find_tensors([core.kept() for core in cores])
        assert tensors and not any(t.requires_grad for t in tensors)
    assert np.array_equal(*pictures)


def find_tensors(values):
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in find_tensors(value)] if isinstance(values, list | tuple) else []


@torch.no_grad()
def test_what_is_kept_for_mixed_batches_does_not_grow(unet):
    core = next(cores_of(unet))
    states = torch.randn(4, 3, core.hidden_size)
    mixes = [("a", "b"), ("b", "a"), ("a", None), (None, "b"), ("b", "b"), ("a", "b", "b", "a"), ("a", "b", "a", "b")]

    def run(names):
        core.adapters_per_sample = names
        return core(states, states)

    expected = [run(names) for names in mixes]
    with apt.prepared_apt(unet):
        for names, output in zip(mixes, expected, strict=True):
            assert torch.equal(run(names), output)
            assert len(core.kept()) <= 3  # two adapters and one stack


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
@torch.no_grad()
def test_one_whole_graph_prepared_and_not(unet, mixed):
    """`fullgraph=True` raises at a break; and preparing does not compile again."""
    text_encoder = make_text_encoder().eval()
    apt.add_apt(text_encoder, apt.APTConfig(num_prompts=6, rank=2), "a")
    apt.add_apt(text_encoder, apt.APTConfig(num_prompts=9, rank=2), "b")
    randomize(text_encoder)
    for model, run in ((unet, unet_output), (text_encoder, text_output)):
        graphs = []

        def backend(module, inputs, graphs=graphs):
            graphs.append(module)
            return module.forward

        apt.set_apt_adapters(model, ["a", "b"], [0.5, 0.7])
        for core in cores_of(model):
            core.adapters_per_sample = ("b", None) if mixed else None
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        expected = run(model)
        for _ in range(2):
            torch.testing.assert_close(run(compiled), expected, rtol=1e-5, atol=1e-5)
            with apt.prepared_apt(model):
                torch.testing.assert_close(run(compiled), expected, rtol=1e-5, atol=1e-5)
        assert len(graphs) == 1
        torch._dynamo.reset()


@torch.no_grad()
def test_compiled_blocks_are_swapped_without_compiling(unet, tmp_path):
    """diffusers' way to compile fast: one graph for all transformer blocks, with adapters no more than without."""
    graphs, files, outputs = [], [], []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    apt.remove_apt(unet)
    for prompts in (4, 9):
        apt.add_apt(unet, apt.APTConfig(num_prompts=prompts, rank=2))
        randomize(unet, prompts)
        files.append(apt.save_apt_weights(unet, tmp_path / str(prompts)))
        outputs.append(unet_output(unet))
        apt.remove_apt(unet)
    unet.compile_repeated_blocks(backend=backend, fullgraph=True)
    base, bare = unet_output(unet), len(graphs)
    apt.enable_apt_hotswap(unet, 9)
    apt.load_apt_weights(unet, files[0])
    for number in (0, 1, 0):
        apt.load_apt_weights(unet, files[number], hotswap=True)
        torch.testing.assert_close(unet_output(unet), outputs[number], rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2 * bare > 0 and not torch.allclose(outputs[0], base, atol=1e-3)
    torch._dynamo.reset()
