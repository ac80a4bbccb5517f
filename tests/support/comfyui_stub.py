"""As much of ComfyUI as the nodes touch, written for the tests: a transformer block, a model patcher, a CLIP.

The block does with its patches what ComfyUI's does: one dict of options per call, which both patches get.
"""

import copy
import sys
import types
from pathlib import Path

import torch
from torch import nn


class StubUNet(nn.Module):
    """A UNet of diffusers under ComfyUI's names; its attentions call patches as ComfyUI's blocks do."""

    def __init__(self, unet, names):
        super().__init__()
        self.unet = unet
        self.sites = {}  # (site, kind) -> attention
        self.attentions = {}
        for name, module in unet.named_modules():
            if name.endswith((".attn1", ".attn2")):
                place = names[f"{name}.to_q.weight"].removesuffix(".to_q.weight")
                self.attentions[place] = module
                kind, number, *_ = place.split(".")
                block = (kind.split("_")[0], 0 if kind == "middle_block" else int(number))
                transformer = int(place.split(".transformer_blocks.")[1].split(".")[0])
                self.sites[name] = (*block, transformer)

    def get_submodule(self, target):
        if target not in self.attentions:
            raise AttributeError(target)
        return self.attentions[target]

    def run(self, options, *inputs, sigma=1.0):
        """The UNet's prediction with the patches of `options`."""
        unet, handles = self.unet, []
        patches = options["transformer_options"].get("patches", {})

        def wrap(module, kind, site):
            def before(_, args, kwargs):
                extra = {"block": site[:2], "block_index": site[2], "sigmas": torch.tensor([sigma])}
                module.extra = extra
                n, context = args[0], kwargs.get("encoder_hidden_states")
                value = context = n if context is None else context
                for patch in patches.get(f"{kind}_patch", []):
                    n, context, value = patch(n, context, value, extra)
                return (n, *args[1:]), kwargs | (
                    {} if kwargs.get("encoder_hidden_states") is None else {"encoder_hidden_states": context}
                )

            def after(_, args, kwargs, output):
                for patch in patches.get(f"{kind}_output_patch", []):
                    output = patch(output, module.extra)
                return output

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))

        for name, site in self.sites.items():
            wrap(unet.get_submodule(name), name.rpartition(".")[2], site)
        try:
            with torch.no_grad():
                return unet(*inputs).sample
        finally:
            for handle in handles:
                handle.remove()


class StubPatcher:
    """ComfyUI's model patcher: clones share the model and have their own patches."""

    def __init__(self, model):
        self.model = model
        self.model_options = {"transformer_options": {}}
        self.object_patches = {}

    def clone(self):
        other = StubPatcher(self.model)
        other.model_options = copy.deepcopy({"transformer_options": {}})
        patches = self.model_options["transformer_options"].get("patches", {})
        other.model_options["transformer_options"]["patches"] = {name: list(p) for name, p in patches.items()}
        other.object_patches = dict(self.object_patches)
        return other

    def set_model_patch(self, patch, name):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = [*patches.get(name, []), patch]

    def add_object_patch(self, name, obj):
        self.object_patches[name] = obj

    def get_model_object(self, name):
        if name in self.object_patches:
            return self.object_patches[name]
        target = self.model
        for part in name.split("."):
            target = getattr(target, part)
        return target


class StubSampling:
    """Sigmas fall from 10 to 0 with the share of the steps done."""

    @staticmethod
    def percent_to_sigma(percent):
        return 10.0 * (1 - percent)


class StubAttention(nn.Module):
    """ComfyUI's self-attention of a text encoder: X is the argument, O comes back alone."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.q_proj = attention.q_proj

    def forward(self, x, mask=None, optimized_attention=None):
        return self.attention(x, attention_mask=mask)[0]


class StubClip:
    """ComfyUI's CLIP: `cond_stage_model.clip_l.transformer.text_model.encoder.layers.N.self_attn`."""

    def __init__(self, layers, patcher=None):
        if patcher is None:
            text_model = nn.Module()
            text_model.encoder = nn.Module()
            text_model.encoder.layers = nn.ModuleList()
            for layer in layers:
                block = nn.Module()
                block.self_attn = StubAttention(layer.self_attn)
                text_model.encoder.layers.append(block)
            model = nn.Module()
            model.clip_l = nn.Module()
            model.clip_l.transformer = nn.Module()
            model.clip_l.transformer.text_model = text_model
            patcher = StubPatcher(model)
        self.cond_stage_model, self.patcher = patcher.model, patcher

    def clone(self):
        return StubClip(None, self.patcher.clone())

    def attend(self, number, x):
        """The output of one layer's self-attention, with the patches."""
        path = f"clip_l.transformer.text_model.encoder.layers.{number}.self_attn.forward"
        with torch.no_grad():
            return self.patcher.get_model_object(path)(x)


def install(monkeypatch, names, folder: Path):
    """Puts modules `comfy.utils` and `folder_paths` in place of ComfyUI's."""
    utils, comfy, paths = types.ModuleType("comfy.utils"), types.ModuleType("comfy"), types.ModuleType("folder_paths")
    utils.unet_to_diffusers = lambda config: names
    comfy.utils = utils
    paths.models_dir = str(folder)
    paths.folder_names_and_paths = {}
    paths.get_filename_list = lambda name: sorted(
        str(file.relative_to(folder / name)) for file in (folder / name).rglob("*.safetensors")
    )
    paths.get_full_path = lambda name, file: str(folder / name / file) if (folder / name / file).is_file() else None
    for name, module in {"comfy": comfy, "comfy.utils": utils, "folder_paths": paths}.items():
        monkeypatch.setitem(sys.modules, name, module)
