"""Builds the embedded model of emoji from ComfyUI's own classes, so that an adapter of the demo can be used there.

ComfyUI's checkpoint loader knows models by their layout, and this one is none of those. Nothing of ComfyUI is imported
before a model is loaded.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apt_diffusion.miniature import MODELS

NAMES = ("miniature-emoji",)  # "miniature" has layers of 16 channels, which ComfyUI cannot make: it groups by 32


class Width(int):
    """A width of a UNet, as the multiplier that ComfyUI asks for: the product with the first width is the width.

    ComfyUI multiplies and needs integers; 160 is no integer multiple of 96.
    """

    def __mul__(self, other: int) -> int:
        return int(self)

    __rmul__ = __mul__


def folder_of(name: str) -> Path:
    """Where the package keeps a model.

    Raises:
        ValueError: for a name that is no embedded model.
    """
    if name not in NAMES:
        raise ValueError(f"There is no embedded model {name!r} for ComfyUI: use {', '.join(NAMES)}.")
    return MODELS[name]


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """A part's `config.json`."""
    return json.loads((folder / part / "config.json").read_text(encoding="utf-8"))


def to_unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's settings of a UNet with these of diffusers."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    down = [int(kind.startswith("CrossAttn")) for kind in config["down_block_types"]]
    up = [int(kind.startswith("CrossAttn")) for kind in config["up_block_types"]]
    return {
        "image_size": config["sample_size"], "in_channels": config["in_channels"],
        "out_channels": config["out_channels"], "model_channels": widths[0],
        "channel_mult": [Width(width) for width in widths], "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in down for _ in range(layers)], "transformer_depth_middle": 1,
        "transformer_depth_output": [depth for depth in reversed(up) for _ in range(layers + 1)],  # taken from its end
        "context_dim": config["cross_attention_dim"], "use_spatial_transformer": True, "legacy": False,
        "use_linear_in_transformer": config["use_linear_projection"],
    }  # fmt: skip


def to_vae_config(config: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's settings of an autoencoder with these of diffusers."""
    widths = config["block_out_channels"]
    dimensions = {
        "double_z": True, "z_channels": config["latent_channels"], "resolution": config["sample_size"],
        "in_channels": config["in_channels"], "out_ch": config["out_channels"], "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths], "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    return {"params": {"ddconfig": dimensions, "embed_dim": config["latent_channels"]}}


def to_vae_state(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """An autoencoder's weights under ComfyUI's names."""
    from comfy.diffusers_convert import convert_vae_state_dict

    levels, width = len(config["block_out_channels"]), config["block_out_channels"][-1]
    converted = {}
    for key, value in convert_vae_state_dict(state).items():
        if key.startswith("decoder.up."):  # counted there as if there were four levels
            level, rest = key.removeprefix("decoder.up.").split(".", 1)
            key = f"decoder.up.{int(level) - 4 + levels}.{rest}"
        converted[key] = value
    if not config["mid_block_add_attention"]:  # an attention of zeros adds nothing to its residual
        for part in ("encoder", "decoder"):
            for name in ("norm", "q", "k", "v", "proj_out"):
                shape = (width,) if name == "norm" else (width, width, 1, 1)
                converted[f"{part}.mid.attn_1.{name}.weight"] = torch.zeros(shape)
                converted[f"{part}.mid.attn_1.{name}.bias"] = torch.zeros(width)
    return converted


def _read(folder: Path, part: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    [file] = (folder / part).glob("*.safetensors")
    return {key: value.float() for key, value in load_file(file).items()}


def _regroup(model: nn.Module, groups: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):  # ComfyUI always makes 32
            module.num_groups = groups


def load_model(folder: Path) -> Any:
    """The UNet as a model patcher, with v-prediction and a terminal signal-to-noise ratio of zero."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models_base
    import comfy.utils

    config, vae = read_config(folder, "unet"), read_config(folder, "vae")

    class Latents(comfy.latent_formats.LatentFormat):
        scale_factor = vae["scaling_factor"]
        latent_channels = vae["latent_channels"]

    class Embedded(comfy.supported_models_base.BASE):
        unet_extra_config: ClassVar[dict[str, int]] = {
            "num_heads": config["attention_head_dim"],
            "num_head_channels": -1,
        }
        sampling_settings: ClassVar[dict[str, Any]] = {
            "beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012, "zsnr": True,
        }  # fmt: skip
        latent_format = Latents

        def model_type(self, state_dict: Any, prefix: str = "") -> Any:
            return comfy.model_base.ModelType.V_PREDICTION

        def inpaint_model(self) -> bool:
            return False  # it is taken for one by its count of channels

    settings = Embedded(to_unet_config(config))
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({})
    names = comfy.utils.unet_to_diffusers(settings.unet_config)
    model.load_model_weights({names[key]: value for key, value in _read(folder, "unet").items()})
    _regroup(model.diffusion_model, config["norm_num_groups"])
    return comfy.model_patcher.ModelPatcher(
        model.eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def load_clip(folder: Path) -> Any:
    """The text encoder with its tokenizer."""
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base
    import folder_paths

    config = read_config(folder, "text_encoder")
    length, width = config["max_position_embeddings"], config["hidden_size"]

    class TextModel(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            special = {
                "start": config["bos_token_id"],
                "end": config["eos_token_id"],
                "pad": config["pad_token_id"],
            }
            super().__init__(
                device=device, dtype=dtype, max_length=length, textmodel_json_config=config, special_tokens=special,
                return_projected_pooled=False, model_options=model_options or {},
            )  # fmt: skip
            words = self.operations.Embedding(config["vocab_size"], width, dtype=dtype, device=device)
            self.transformer.set_input_embeddings(words)  # ComfyUI makes CLIP's 49,408, whatever the settings say

    class Encoder(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=TextModel)

    class Words(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(
                tokenizer_path=str(folder / "tokenizer"), max_length=length, embedding_size=width,
                embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {},
            )  # fmt: skip

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=Words)

    target = comfy.supported_models_base.ClipTarget(Tokenizer, Encoder)
    clip = comfy.sd.CLIP(target, embedding_directory=folder_paths.get_folder_paths("embeddings"))
    state = _read(folder, "text_encoder")
    clip.load_sd({f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()})
    return clip


def load_vae(folder: Path) -> Any:
    """The autoencoder."""
    import comfy.sd

    config = read_config(folder, "vae")
    vae = comfy.sd.VAE(sd=to_vae_state(_read(folder, "vae"), config), config=to_vae_config(config))
    _regroup(vae.first_stage_model, config["norm_num_groups"])
    vae.latent_channels = config["latent_channels"]
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(config["block_out_channels"]) - 1)
    return vae


class LoadEmbeddedModel:
    """Gives an embedded model, as the demo adapts it, with empty latents of its shape."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node shows."""
        return {
            "required": {
                "model_name": (list(NAMES),),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
            }
        }

    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "LATENT")
    FUNCTION = "load"
    CATEGORY = "loaders/APT"

    def load(self, model_name: str, batch_size: int = 1) -> tuple[Any, Any, Any, dict[str, Tensor]]:
        """Model, CLIP, VAE, and empty latents `(batch_size, channels, 16, 16)` of pictures of 64 x 64 pixels.

        Raises:
            ValueError: for a name that is no embedded model.
        """
        folder = folder_of(model_name)
        unet = read_config(folder, "unet")
        latents = torch.zeros(batch_size, unet["in_channels"], unet["sample_size"], unet["sample_size"])
        return load_model(folder), load_clip(folder), load_vae(folder), {"samples": latents}
