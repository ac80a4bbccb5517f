"""Which quantising libraries are here, and GGUF files of tiny models."""

import importlib.util

import pytest

from apt_diffusion.training.text_to_image.base_precision import LIBRARIES, quantised_maps


def need(precision: str) -> None:
    """Skips where the library is missing: `make test-quantised` installs all of them."""
    library = LIBRARIES[precision]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f'{library} is not installed: pip install "apt-diffusion[quantised]"')


def write_gguf(path, model, kind="Q8_0", quantised=None):
    """A model's weights as a GGUF file under diffusers' names, those of `quantised` maps in blocks."""
    names = {f"{name}.weight" for name in (quantised_maps(model) if quantised is None else quantised)}
    return write_gguf_state(path, model.state_dict(), names, kind)


def write_gguf_state(path, state, quantised, kind="Q8_0"):
    """Tensors as a GGUF file, those named in `quantised` in blocks."""
    import gguf

    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "tiny")
    for name, value in state.items():
        array = value.detach().float().contiguous().numpy()
        if name in quantised:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
