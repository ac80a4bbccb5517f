"""Keeps a command's terminal output to progress and results: silences library notices that a user cannot act on."""

import logging

# Without torchvision, transformers takes PIL's image processors, which are what this library uses: diffusers imports
# two at once, and each would announce it.
LOGGER = "transformers.utils.import_utils"
NOTICE = "requires torchvision (not installed); falling back"


def is_worth_showing(record: logging.LogRecord) -> bool:
    """A filter of `logging`: `False` for the notice on torchvision."""
    return NOTICE not in record.getMessage()


def hide_torchvision_notices() -> None:
    """Call it before diffusers is imported."""
    logging.getLogger(LOGGER).addFilter(is_worth_showing)  # adding the same filter again changes nothing
