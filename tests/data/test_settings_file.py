"""Files of settings: what is read of them, and what a stranger's may cost."""

import pytest

from apt_diffusion.data.settings_file import MOST_BYTES, read_text, read_toml, refuse


def test_text_and_values(tmp_path):
    file = tmp_path / "a.toml"
    file.write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert read_text("--x", file) == "a = 1\n" and read_toml("--x", file) == ({"a": 1}, "a = 1\n")


def test_what_cannot_be_read_is_told_with_its_flag(tmp_path):
    file = tmp_path / "a.toml"
    with pytest.raises(ValueError, match=r"--x: there is no file .*a\.toml"):
        read_text("--x", file)
    with pytest.raises(ValueError, match="there is no file"):
        read_text("--x", tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        read_text("--x", file)
    for text in ("a = ", "a = " + "[" * 100_000):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"--x: .* is no TOML"):
            read_toml("--x", file)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    file = tmp_path / "a.toml"
    with file.open("wb") as content:
        content.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match="larger than 1 MiB, which is no such file: not read"):
        read_toml("--x", file)


def test_all_mistakes_are_told_at_once(tmp_path):
    refuse("--x", "a.toml", [])
    with pytest.raises(ValueError, match=r"^--x: a\.toml has a mistake:\n  line 3: b$"):
        refuse("--x", "a.toml", [(3, "b")])
    with pytest.raises(ValueError, match=r"2 mistakes:\n  line 3: b\n  line 4: c$"):
        refuse("--x", "a.toml", [(3, "b"), (4, "c")])
