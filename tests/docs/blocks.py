"""The Python of a document: its fenced blocks, put together into the files that their first lines name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"# ([a-z_]+\.py)\n")


def files_of(document: str) -> dict[str, str]:
    """File name to source. A block without a name goes on where the one before it ended; blocks with `...` in a call
    are excerpts and are left out."""
    found: dict[str, str] = {}
    current = ""
    for source in _FENCE.findall((ROOT / document).read_text()):
        named = _NAME.match(source)
        if named is None and "(...)" in source:
            continue
        current = named[1] if named else current
        assert current, f"{document}: a block before any file was named:\n{source[:200]}"
        found[current] = found.get(current, "") + source
    return found


def write_files(document: str, into: Path) -> dict[str, Path]:
    """The document's files, written."""
    written = {name: into / name for name in files_of(document)}
    for name, source in files_of(document).items():
        written[name].write_text(source)
    return written
