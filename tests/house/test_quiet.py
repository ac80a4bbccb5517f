"""What a newcomer's terminal does not show: notices of other libraries that nobody can act on."""

import logging
import subprocess
import sys

import pytest

from apt_diffusion.quiet import LOGGER, NOTICE, hide_torchvision_notices


@pytest.mark.slow
def test_importing_a_pipeline_says_nothing():
    code = "from apt_diffusion import StableDiffusionAPTPipeline, StableDiffusionXLAPTPipeline"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_only_the_one_notice_is_hidden():
    hide_torchvision_notices()
    hide_torchvision_notices()
    logger = logging.getLogger(LOGGER)
    mine = [rule for rule in logger.filters if getattr(rule, "__module__", "") == "apt_diffusion.quiet"]
    assert len(mine) == 1

    def passes(text):
        return bool(logger.filter(logging.LogRecord(LOGGER, logging.WARNING, "", 0, text, (), None)))

    assert passes("Something is wrong.") and not passes(f"`CLIPImageProcessor` {NOTICE} to `CLIPImageProcessorPil`.")
