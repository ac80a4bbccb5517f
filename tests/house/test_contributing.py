"""The examples of CONTRIBUTING.md do what it says, written into a file of their own and imported as they stand."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.families import make_vilt, vilt_output
from support.vl_helpers import results, train

from apt_diffusion import load_apt_weights, remove_apt, save_apt_weights
from apt_diffusion.architectures import ARCHITECTURES
from apt_diffusion.baselines import (
    MethodConfig,
    add_method,
    freeze_for_method,
    load_method,
    method_names,
    unregister_method,
)
from apt_diffusion.costs import count_costs

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example_under(heading: str, folder: Path) -> ModuleType:
    """Imports the Python block that stands under a heading, as a module."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)[1]
    file = folder / "example.py"
    file.write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("example", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ia3(tmp_path):
    example_under("Add a method to the comparison", tmp_path)
    yield
    unregister_method("ia3")


def test_the_example_of_a_method(ia3):
    assert "ia3" in method_names()
    torch.manual_seed(0)
    model = make_vilt().eval()
    base = vilt_output(model)
    assert len(add_method(model, MethodConfig("ia3"))) == 4
    assert torch.equal(vilt_output(model), base)
    heads = 32 * 32 + 32 + 2 * 32 + 2 * 32  # pooler; modalities; segments of the text
    assert freeze_for_method(model)[0] == 4 * 32 + heads
    assert count_costs("ia3", hidden_size=32, num_tokens=21, num_modules=2) == (4 * 32, 0)


def test_a_trainer_trains_the_example_of_a_method(ia3, tiny_vl, vqa_dir, tmp_path):
    flags = {"method": "ia3", "start": 0.9, "min_answer_count": 3, "learning_rate": 0.1}
    out = train("vqa", tiny_vl["vilt"], vqa_dir, tmp_path / "out", **flags)
    assert results(out)["method"] == "ia3" and results(out)["settings"]["start"] == 0.9
    from transformers import ViltForQuestionAnswering

    fresh = ViltForQuestionAnswering.from_pretrained(tiny_vl["vilt"], num_labels=3)
    assert load_method(fresh, out) == MethodConfig("ia3", start=0.9)
    factors = torch.stack([p for name, p in fresh.named_parameters() if name.endswith(".factors")])
    assert factors.shape == (4, 32) and (factors - 0.9).abs().max() > 0.01


@torch.no_grad()
def test_the_example_of_an_architecture(tmp_path):
    before = list(ARCHITECTURES)
    try:
        example = example_under("Add an architecture", tmp_path)
        assert example.names == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
        model = example.model.eval()
        sound = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0))

        def encoded() -> torch.Tensor:
            return model.encoder(sound).last_hidden_state

        untrained = encoded()
        for name, parameter in model.named_parameters():
            if name.endswith((".gate", ".prompts")):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        trained, file = encoded(), save_apt_weights(model, tmp_path)
        remove_apt(model)
        assert torch.equal(encoded(), untrained) and not torch.allclose(trained, untrained, atol=1e-3)
        load_apt_weights(model, file)
        assert torch.equal(encoded(), trained)
    finally:
        ARCHITECTURES[:] = before
