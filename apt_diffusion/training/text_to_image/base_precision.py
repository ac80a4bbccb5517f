"""The frozen denoiser in 4 or 8 bits (`--base_precision`): training only reads its weights.

Only the linear maps of attention and feed-forward are quantised, which hold most weights of a large model. Embeddings,
the output, and the maps from timesteps to norms' scales and shifts stay as they are: their errors reach every token. A
GGUF file decides for itself.
"""

import argparse
import importlib.util
import logging
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...io.single_file import MOST_TENSORS
from .. import sharding

if TYPE_CHECKING:
    from .stable_diffusion import StableDiffusionBase

logger = logging.getLogger(__name__)

LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao", "gguf": "gguf"}
GGUF_SUFFIX = ".gguf"
NOT_QUANTISED = re.compile("norm|mod|ada|embed", re.IGNORECASE)  # names inside a block, as `norm1.linear`, `img_mod.1`
NF4_BLOCK = 64  # weights that share a scale
SHOWN = 3  # names in a message


def base_precision(text: str) -> str:
    """The type of the flag: `nf4`, `int8`, `fp8`, or the path of a GGUF file."""
    if text in ("nf4", "int8", "fp8") or text.endswith(GGUF_SUFFIX):
        return text
    raise argparse.ArgumentTypeError(
        f"must be nf4, int8 or fp8, whose weights pass gradients on, or the path of a GGUF file, got {text}."
    )


def check_precision(precision: str) -> None:
    """Whether a denoiser can be loaded so.

    Raises:
        ValueError: in a run whose base is cut into shards.
        ImportError: where a library is missing.
        FileNotFoundError: where the GGUF file is.
    """
    if sharding.is_asked_for():
        raise ValueError(
            "--base_precision and the launcher's shards (--use_fsdp, DeepSpeed's stage 3) exclude each other: "
            "quantised weights cannot be cut. Leave one of them out."
        )
    library = LIBRARIES["gguf" if precision.endswith(GGUF_SUFFIX) else precision]
    if importlib.util.find_spec(library) is None:
        raise ImportError(f'--base_precision {precision} needs {library}: `pip install "apt-diffusion[quantised]"`.')
    if precision.endswith(GGUF_SUFFIX) and not Path(precision).is_file():
        raise FileNotFoundError(f"--base_precision: there is no file {precision}.")


def quantised_maps(model: nn.Module) -> list[str]:
    """Names of the linear maps of attention and feed-forward in a denoiser's repeated blocks."""
    kinds = set(model._repeated_blocks or model._no_split_modules or ())
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in kinds]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for block in blocks
        if name.startswith(f"{block}.") and not NOT_QUANTISED.search(name.removeprefix(block))
    ]


def load_quantised(base: "StableDiffusionBase", precision: str, dtype: torch.dtype) -> nn.Module:
    """The base's frozen denoiser, quantised; what is not stays in `dtype`, in which all of it computes.

    Args:
        base: whose `denoiser` it is.
        precision: checked by `check_precision`; a GGUF file also by `check_gguf`.
        dtype: of the other weights.
    """
    if precision.endswith(GGUF_SUFFIX):
        model = _from_gguf(base, precision, dtype)
    elif precision == "nf4":
        model = _in_nf4(base.denoiser(dtype), dtype)
    else:
        model = base.denoiser(dtype, quantization_config=_torchao_config(base, precision))
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.register_forward_pre_hook(cast_as_autocast)
    # All processes read the same file, and gloo has no types of 8 bits to send.
    names = [name for name, _ in model.named_parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    whole = sum(parameter.numel() for parameter in base.skeletons()[base.denoiser_part].parameters()) * dtype.itemsize
    logger.info("The frozen %s takes %.1f MiB, %.1f MiB without --base_precision.", base.denoiser_part,
                bytes_of(model) / 2**20, whole / 2**20)  # fmt: skip
    return model


def bytes_of(model: nn.Module) -> int:
    """Memory of a model's parameters, of quantised ones with their scales."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        inner = getattr(parameter, "tensor_data_names", None)
        tensors = [parameter.data] if inner is None else [getattr(parameter, name) for name in inner]
        tensors += [] if state is None else [state.absmax]
        total += sum(tensor.nbytes for tensor in tensors)
    return total


def cast_as_autocast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A pre-hook that does for quantised weights what autocast does for others only: the input in its type."""
    kind = args[0].device.type
    if not torch.is_autocast_enabled(kind):
        return None
    return (args[0].to(torch.get_autocast_dtype(kind)), *args[1:])


def _torchao_config(base: "StableDiffusionBase", precision: str) -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig

    kind = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[precision]
    # By whole names: `modules_to_not_convert` takes parts of names, and `proj_out` stands in blocks, too.
    maps = quantised_maps(base.skeletons()[base.denoiser_part])
    return TorchAoConfig(FqnToConfig({name: kind() for name in maps}))


def _in_nf4(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """By hand on every device: diffusers' `BitsAndBytesConfig` refuses a CPU."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}  # as diffusers has it
    maps = {name: model.get_submodule(name) for name in quantised_maps(model)}
    # On CPUs with AVX-512, bitsandbytes 0.50 unpacks blocks wrongly that go from one row into the next.
    whole = {name: linear for name, linear in maps.items() if linear.in_features % NF4_BLOCK == 0}
    if len(whole) < len(maps):
        left = len(maps) - len(whole)
        logger.info("%d of %d maps keep their weights: their rows are no whole blocks of nf4.", left, len(maps))
    for name, linear in whole.items():
        has_bias = linear.bias is not None
        with torch.device("meta"):
            small = Linear4bit(linear.in_features, linear.out_features, has_bias, dtype, **kind)
        small.weight = Params4bit(linear.weight.data, requires_grad=False, module=small, **kind)
        small.bias = linear.bias
        small.compute_type_is_set = True
        # In evaluation it would bring its weights into a layout that has no gradients, and leave them so.
        small.support_avx512bf16_for_cpu = False
        model.set_submodule(name, small.to(linear.weight.device))
    return model


# GGUF


def _from_gguf(base: "StableDiffusionBase", path: str, dtype: torch.dtype) -> nn.Module:
    from diffusers import GGUFQuantizationConfig

    return base.denoiser_class.from_single_file(
        path,
        config=base.path,
        subfolder=base.denoiser_part,
        config_revision=base.revision,
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        dtype=dtype,
    )


def check_gguf(path: str, skeleton: nn.Module, base_name: str) -> None:
    """Whether a GGUF file holds the weights of a denoiser, seen on its header.

    Args:
        path: the file.
        skeleton: the denoiser without weights.
        base_name: for messages.

    Raises:
        ValueError: for a file that is damaged, of another model, or quantised as diffusers cannot read.
    """
    found = _gguf_header(path, skeleton)
    wanted = skeleton.state_dict()
    other = sorted(name for name in wanted if name not in found or found[name].shape != wanted[name].shape)
    if other:
        raise ValueError(
            f"{path} is not of the {type(skeleton).__name__} of {base_name}: {len(other)} of its "
            f"{len(wanted)} weights are missing or of another shape ({_some(other)}). Give a file made from this base."
        )
    linear = {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    other = sorted(name for name, tensor in found.items() if tensor.dtype == torch.uint8 and name not in linear)
    if other:
        raise ValueError(
            f"{path} has quantised weights that are no linear maps ({_some(other)}), which diffusers cannot use: "
            "give a file that has them in F32 or F16."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _gguf_header(path: str, skeleton: Any) -> dict[str, torch.Tensor]:
    """Weights without values by the names that diffusers gives them, quantised ones as `uint8`.

    `ValueError` for what diffusers cannot read.
    """
    import gguf
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    with open(path, "rb") as file:
        letters, *counts = struct.unpack("<4s4xQQ", file.read(24).ljust(24, b"\0"))
    if letters == b"GGUF" and max(counts) > MOST_TENSORS:
        raise ValueError(f"{path} announces {max(counts)} entries, more than any base model has: it is not read.")
    try:
        tensors = gguf.GGUFReader(path).tensors
    except Exception as error:  # of many kinds: it reads whatever the first bytes say
        raise ValueError(f"{path} is no GGUF file, or damaged ({error}).") from error
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    known = (*plain, *SUPPORTED_GGUF_QUANT_TYPES)
    unknown = sorted({tensor.tensor_type.name for tensor in tensors} - {kind.name for kind in known})
    if unknown:
        raise ValueError(
            f"{path} has weights of the type {' and '.join(unknown)}, which diffusers cannot read; it reads "
            f"{', '.join(sorted(kind.name for kind in known))}."
        )
    found = {}
    for tensor in tensors:
        dtype = torch.float32 if tensor.tensor_type in plain else torch.uint8
        found[tensor.name] = torch.empty([int(size) for size in reversed(tensor.shape)], dtype=dtype, device="meta")
    if set(found) == set(skeleton.state_dict()):
        return found
    kind = type(skeleton).__name__  # else the layout of the model's makers
    if kind not in SINGLE_FILE_LOADABLE_CLASSES:
        raise ValueError(f"diffusers reads no GGUF files of a {kind}: use --base_precision nf4, int8 or fp8.")
    convert = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
    try:
        return convert(checkpoint=found, config=dict(skeleton.config))
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not of a {kind}: its weights have other names ({type(error).__name__}: {error})."
        ) from error
