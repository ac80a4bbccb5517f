"""Where the tables and keys of a TOML text stand: the standard parser gives values only, errors should have lines."""

import re


class TomlLines:
    """Line numbers by table and key.

    A table has the name that leads to it, with the number of each `[[array]]`: `datasets[0].subsets[1]`. The name of
    the top is empty.

    Args:
        text: valid TOML.
    """

    def __init__(self, text: str) -> None:
        # Texts over several lines may hold what looks like a key.
        text = re.sub(r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'', lambda match: '""' + "\n" * match[0].count("\n"), text)
        self._found: dict[tuple[str, str], int] = {}
        self._counts: dict[str, int] = {}
        table = ""
        for number, line in enumerate(text.split("\n"), start=1):
            heading = re.match(r"\s*(\[\[?)\s*([\w.\s\"'-]+?)\s*\]", line)
            key = re.match(r"\s*[\"']?([\w-]+)[\"']?\s*(\.[^=]*)?=", line)
            if heading:
                table = self._enter([part.strip(" \"'") for part in heading[2].split(".")], heading[1] == "[[")
                self._found.setdefault((table, ""), number)
            elif key:
                self._found.setdefault((table, key[1]), number)

    def of(self, table: str, key: str = "") -> int:
        """The line of a key, or of its table's heading; 1 where neither has one."""
        within = f"{table}.{key}" if table else key
        places = (table, key), (within, ""), (f"{within}[0]", ""), (table, "")
        return next((self._found[place] for place in places if place in self._found), 1)

    def _enter(self, parts: list[str], is_array: bool) -> str:
        name = ""
        for index, part in enumerate(parts):
            name = f"{name}.{part}" if name else part
            if is_array and index == len(parts) - 1:
                self._counts[name] = self._counts.get(name, -1) + 1
            if name in self._counts:
                name = f"{name}[{self._counts[name]}]"
        return name
