"""Texts that a model would cut are found before training and named with what they lose."""

import pytest
from conftest import make_tokenizer

from apt_diffusion.data.text_length import kept_and_lost, warn_of_cut_texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("words"))


def test_what_is_lost_is_what_the_tokenizer_cuts(tokenizer):
    texts = ["short", "x" * 6, "x" * 7, "red circle", "a b c d e f g h"]
    found = kept_and_lost(texts, tokenizer, max_length=8)  # six, with start and end; here a letter is a token
    for text in texts:
        whole, read = tokenizer(text)["input_ids"], tokenizer(text, truncation=True, max_length=8)["input_ids"]
        assert (text in found) == (whole != read)
        if text in found:
            assert list(found[text][0]) == read[1:-1]
    assert found["red circle"][1] == "cle" and found["a b c d e f g h"][1] == "g h"


def test_one_warning_for_all(tokenizer, caplog):
    texts = [(f"file {letter}", f"{letter} word that is too long") for letter in "abcde"]
    warn_of_cut_texts([*texts, ("file f", "fits")], tokenizer, 12)
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("5 of 6 texts are longer than the 12 tokens that the model reads, and their ends")
    assert message.count("loses") == 3 and "file a loses" in message and message.endswith("; .... Shorten them.")
    caplog.clear()
    warn_of_cut_texts([("file f", "fits")], tokenizer, 12)
    assert not caplog.records
