"""`from_single_file` of the APT pipelines: files are recognised, and configurations found, before weights load."""

from pathlib import Path
from typing import Any

from ..convert.single_file import PIPELINES, find_configuration, marks_of
from ..io.single_file import read_checkpoint

# Other classes, as those for inpainting, take files that these checks do not know.
CHECKED = {name for names in PIPELINES.values() for name in names}


class SingleFileMixin:
    """For pipeline classes of diffusers that have `from_single_file`."""

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | Path, **kwargs: Any) -> Any:
        """As the stock method. Offline, `config` is a folder in diffusers' layout with settings and tokenizers.

        Raises:
            FileNotFoundError: where the file's configuration is neither here nor to be had.
            ValueError: for a file that is no base, or one of another pipeline.
        """
        stock: Any = super()
        name, file = cls.__name__.replace("APT", ""), Path(pretrained_model_link_or_path).expanduser()
        if name not in CHECKED or not file.is_file() or kwargs.keys() & {"original_config", "original_config_file"}:
            return stock.from_single_file(str(pretrained_model_link_or_path), **kwargs)
        checkpoint = read_checkpoint(file)
        if name not in PIPELINES[checkpoint.kind]:
            right = PIPELINES[checkpoint.kind][0].replace("Pipeline", "APTPipeline")
            raise ValueError(f"{file} is a {checkpoint.kind}: load it with {right}.")
        kwargs["config"] = str(find_configuration(checkpoint, kwargs.get("config")))
        pipeline = stock.from_single_file(str(file), **kwargs)
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, **marks_of(checkpoint))
        return pipeline
