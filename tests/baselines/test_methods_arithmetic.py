"""Every compared method on every model: outputs and gradients against numpy, sizes in closed form, files.

Inputs are padded, where the model can have padding; the two towers of this CLIP have different widths and depths.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import make_meter, meter_inputs
from support.families import make_clip, make_vilt
from support.method_helpers import METHODS, SIZES, config_of, stored_config
from support.methods_reference import Reference
from torch import Tensor, nn

from apt_diffusion.baselines import (
    add_method,
    freeze_for_method,
    load_method,
    method_parameters,
    save_method,
)
from apt_diffusion.models.clip_classifier import LinearClassifier
from apt_diffusion.models.vilt import use_sdpa

P, R, B = SIZES.values()  # prompts, rank, bottleneck
COMPARED = ("classifier_only", "shallow_prompt", "deep_prompt", "adapter", "scaled_pa", "lora")
PAIRS = [(family, method) for family in ("vilt", "meter", "clip") for method in COMPARED]
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vilt_outputs(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(0)  # ViLT draws its image patches at random
    mask = torch.ones(2, 32, 32, dtype=torch.long)
    mask[1, 16:] = 0
    words = {
        "input_ids": torch.tensor([[2, 3, 9, 27], [5, 6, 7, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1] * 3 + [0]]),
    }
    return [model(**words, pixel_values=PIXELS.to(model.dtype), pixel_mask=mask).last_hidden_state]


def meter_outputs(model: nn.Module) -> list[Tensor]:
    batch = meter_inputs()
    return [model(**batch | {"pixel_values": batch["pixel_values"].to(model.dtype)}).last_hidden_state]


def clip_outputs(model: nn.Module, padded: bool = True) -> list[Tensor]:
    tokens = torch.tensor([[512, 3, 9, 27, 513, 513], [512, 5, 6, 7, 8, 513]])
    mask = torch.tensor([[1] * 5 + [0], [1] * 6]) if padded else None
    output = model(input_ids=tokens, attention_mask=mask, pixel_values=PIXELS[..., :16, :16].to(model.dtype))
    return [output.text_model_output.last_hidden_state, output.vision_model_output.last_hidden_state]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], list[Tensor]]]] = {
    "vilt": (make_vilt, vilt_outputs),
    "meter": (make_meter, meter_outputs),
    "clip": (lambda: make_clip(vision_width=48), clip_outputs),
}


def make(family: str) -> nn.Module:
    """Weights large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    model = MODELS[family][0]().eval()
    shake(model.parameters(), 0.25)
    return model


def shake(parameters: Iterable[nn.Parameter], size: float = 0.3, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)


def shake_method(model: nn.Module) -> None:
    shake((p for _, p in method_parameters(model)), 0.3, seed=2)


@dataclass
class Case:
    """A model in float64 with a method, and what its layers were given in the last pass."""

    family: str
    method: str

    def __post_init__(self) -> None:
        self.model, self.entered = make(self.family).double(), {}
        keep = self.entered.update  # these hooks come before the method's
        if self.family == "vilt":
            self.model.embeddings.register_forward_hook(lambda m, a, out: keep(states=out[0], real=out[1].bool()))
        elif self.family == "meter":
            self.model.cross_modal_text_layers[0].register_forward_pre_hook(
                lambda m, a: keep(text=a[0], image=a[1], real=a[2])
            )
        else:
            keep(real=torch.tensor([[True] * 5 + [False], [True] * 6]))
            self.model.text_model.embeddings.register_forward_hook(lambda m, a, out: keep(words=out))
            self.model.vision_model.pre_layrnorm.register_forward_hook(lambda m, a, out: keep(image=out))
        add_method(self.model, config_of(self.method))
        shake_method(self.model)

    def outputs(self) -> list[Tensor]:
        return MODELS[self.family][1](self.model)

    def weights(self) -> dict[str, np.ndarray]:
        return {name: value.detach().numpy().copy() for name, value in self.model.named_parameters()}

    def expected(self, weights: dict[str, np.ndarray] | None = None) -> list[np.ndarray]:
        reference = Reference(weights or self.weights(), self.method)
        entered = {name: value.detach().numpy() for name, value in self.entered.items()}
        samples = [getattr(reference, self.family)(**{k: v[i] for k, v in entered.items()}) for i in range(2)]
        return [np.stack(part) for part in zip(*samples, strict=True)]


def assert_close(found: list[Tensor], expected: list[np.ndarray], tolerance: float = 1e-9) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a.detach().numpy() - b).max() < tolerance * np.abs(b).max()


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_the_whole_forward_pass_in_numpy(family, method):
    case = Case(family, method)
    with torch.no_grad():
        assert_close(case.outputs(), case.expected())
        if method != "classifier_only":
            plain = Case(family, "classifier_only").outputs()
            assert all((a - b).abs().max() > 0.05 for a, b in zip(case.outputs(), plain, strict=True))
        if family == "vilt":
            use_sdpa(case.model)
            assert_close(case.outputs(), case.expected())
        if family == "clip":
            case.model.set_attn_implementation("eager")  # additive masks, softmax in float32
            assert_close(case.outputs(), case.expected(), 1e-5)
            for implementation, tolerance in (("eager", 1e-5), ("sdpa", 1e-9)):  # the latter has no mask but a flag
                case.model.set_attn_implementation(implementation)
                case.entered["real"] = torch.ones(2, 6, dtype=torch.bool)
                assert_close(clip_outputs(case.model, padded=False), case.expected(), tolerance)


@pytest.mark.parametrize(("family", "method"), [pair for pair in PAIRS if pair[1] != "classifier_only"])
def test_gradients_are_those_of_the_numpy_pass(family, method):
    """Along a random direction in the method's parameters, with and without checkpointing of activations."""
    case = Case(family, method)
    freeze_for_method(case.model)
    own = dict(method_parameters(case.model))
    rng = np.random.default_rng(0)
    direction = {name: rng.standard_normal(p.shape) for name, p in own.items()}
    with torch.no_grad():
        factors = [rng.standard_normal(output.shape) for output in case.outputs()]
    weights, step = case.weights(), 1e-6
    ahead, behind = (
        case.expected({name: value + sign * step * direction.get(name, 0) for name, value in weights.items()})
        for sign in (1, -1)
    )
    expected = sum(((a - b) * f).sum() for a, b, f in zip(ahead, behind, factors, strict=True)) / (2 * step)
    for checkpointing in (False, True):
        if checkpointing:
            case.model.train()
            getattr(case.model, "activation_checkpointing_enable", case.model.gradient_checkpointing_enable)()
        case.model.zero_grad(set_to_none=True)
        sum((o * torch.tensor(f)).sum() for o, f in zip(case.outputs(), factors, strict=True)).backward()
        assert sum((p.grad.numpy() * direction[name]).sum() for name, p in own.items()) == pytest.approx(
            expected, 1e-6
        )


# Sizes

D = 32  # of ViLT, of METER's cross-modal layers, of CLIP's text tower; its vision tower has 48


def apt(d: int) -> int:
    return P * d + 2 * d * R + 1


def lora(d: int) -> int:
    return 2 * 2 * d * R  # query and value


def adapter(d: int) -> int:
    return 2 * d * B + B + d


def parallel(d: int) -> int:
    return adapter(d) + 2 * d  # its norm


CLOSED_FORMS = {
    "vilt": {  # two layers of one attention
        "apt": 2 * apt(D), "shallow_prompt": P * D, "deep_prompt": 2 * P * D, "adapter": 2 * 2 * adapter(D),
        "scaled_pa": 2 * parallel(D), "lora": 2 * lora(D), "classifier_only": 0,
    },
    "meter": {  # two stacks of two layers of two attentions
        "apt": 8 * apt(D), "shallow_prompt": 2 * P * D, "deep_prompt": 4 * P * D, "adapter": 4 * 3 * adapter(D),
        "scaled_pa": 8 * parallel(D), "lora": 8 * lora(D), "classifier_only": 0,
    },
    "clip": {  # three layers of 32 and two of 48
        "apt": 3 * apt(D) + 2 * apt(48), "shallow_prompt": P * (D + 48), "deep_prompt": P * (3 * D + 2 * 48),
        "adapter": 2 * (3 * adapter(D) + 2 * adapter(48)), "scaled_pa": 3 * parallel(D) + 2 * parallel(48),
        "lora": 3 * lora(D) + 2 * lora(48), "classifier_only": 0,
    },
}  # fmt: skip
# Poolers and kinds of tokens; in ViLT the segments of its text, too.
BESIDE = {"vilt": D * D + D + 2 * D + 2 * D, "meter": 2 * (D * D + D) + 2 * D, "clip": 0}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_trainable_parameters_are_the_closed_form(family, method):
    model = make(family)
    base = sum(p.numel() for p in model.parameters())
    add_method(model, config_of(method))
    trainable, total = freeze_for_method(model)
    added = 0 if method == "full" else CLOSED_FORMS[family][method]
    assert total == base + added
    assert trainable == (base if method == "full" else added + BESIDE[family])
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


# Files


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_method_gives_a_fresh_model_the_same_outputs(family, method, tmp_path):
    def fresh() -> nn.Module:
        model = make(family)
        if family == "clip":  # it has no head of its own
            model.classifier = LinearClassifier(["a", "b"], torch.ones(2, 16))
        return model

    model, other = fresh(), fresh()
    add_method(model, config_of(method))
    freeze_for_method(model)
    shake((p for p in model.parameters() if p.requires_grad), seed=5)
    loaded = load_method(other, save_method(model, tmp_path / "method.safetensors"))
    assert loaded == stored_config(fresh(), method)
    with torch.no_grad():
        outputs = [MODELS[family][1](m) for m in (model, other, fresh())]
    assert all(torch.equal(a, b) for a, b in zip(*outputs[:2], strict=True))
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    changed = [not torch.equal(a, b) for a, b in zip(outputs[0], outputs[2], strict=True)]
    assert all(changed) or (family, method) == ("clip", "classifier_only")
