"""Which quantising libraries are here, and GGUF files of tiny models."""

import importlib.util

import pytest

from apt_diffusion.training.text_to_image.base_precision import LIBRARIES, quantised_maps


def need(precision: str) -> None:
    """Skips where the library is missing: only gguf is among the tests' dependencies."""
    library = LIBRARIES[precision]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f'{library} is not installed: pip install "apt-diffusion[quantised]"')


def write_gguf(path, model, kind="Q8_0", quantised=None, dropped=()):
    """A model's weights as a GGUF file, those of `quantised` maps in blocks."""
    import gguf

    kind = gguf.GGMLQuantizationType[kind]
    quantised = quantised_maps(model) if quantised is None else quantised
    writer = gguf.GGUFWriter(path, "tiny")
    for name, value in model.state_dict().items():
        if name in dropped:
            continue
        array = value.detach().float().numpy()
        if name.removesuffix(".weight") in quantised:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
