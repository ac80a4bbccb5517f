"""Presets, drawing settings saved under a name: the studio's own, and those that a visitor saves."""

import json

from ..io.atomic import write_text
from .library import Library
from .recipe import Settings, checked

MAX_PRESETS = 20
MAX_NAME = 40
BUILT_IN: dict[str, Settings] = {
    "Quick look": {"steps": 8, "count": 1},
    "Four to choose from": {"steps": 15, "count": 4},
    "Careful": {"steps": 40, "count": 1},
}


class Presets:
    """Everybody's own presets, each visitor's in a file of their own.

    Args:
        library: knows the visitors' folders.
    """

    def __init__(self, library: Library) -> None:
        self.library = library

    def of(self, visitor: str) -> dict[str, Settings]:
        """Those that come with the studio, then the visitor's."""
        file = self.library.visitor_folder(visitor) / "presets.json"
        own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return BUILT_IN | own

    def get(self, visitor: str, name: str) -> Settings:
        """One of them; `ValueError` for an unknown name."""
        presets = self.of(visitor)
        if name not in presets:
            raise ValueError("This preset is not there any more: choose another one.")
        return presets[name]

    def keep(self, visitor: str, name: str, settings: Settings) -> str:
        """Keeps settings under a name, in place of those of the same name; returns the name.

        Raises:
            ValueError: for no name, one of the studio's, or too many presets.
        """
        name = " ".join("".join(c for c in name if c.isprintable()).split())
        if not 1 <= len(name) <= MAX_NAME:
            raise ValueError(f"Give the preset a name of at most {MAX_NAME} characters.")
        if name in BUILT_IN:
            raise ValueError(f"“{name}” comes with the studio: choose another name.")
        own = {key: value for key, value in self.of(visitor).items() if key not in BUILT_IN}
        if name not in own and len(own) >= MAX_PRESETS:
            raise ValueError(f"You have {MAX_PRESETS} presets, as many as one may have: delete one first.")
        self._write(visitor, own | {name: checked(settings)})
        return name

    def delete(self, visitor: str, name: str) -> None:
        """Deletes one of the visitor's own; `ValueError` for any other."""
        own = {key: value for key, value in self.of(visitor).items() if key not in BUILT_IN}
        if name not in own:
            raise ValueError("Only your own presets can be deleted.")
        del own[name]
        self._write(visitor, own)

    def _write(self, visitor: str, own: dict[str, Settings]) -> None:
        write_text(self.library.visitor_folder(visitor) / "presets.json", json.dumps(own, ensure_ascii=False))
