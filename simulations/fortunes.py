"""Real short texts: the fortunes of Debian, by language or by collection, as JSON lines for ``dataset = "text"``.

``python -m simulations.fortunes FOLDER`` writes ``train.jsonl`` and ``test.jsonl`` into ``FOLDER/language`` and
``FOLDER/topic``. They have the columns ``text`` and ``label``. The packages: ``apt-get install fortunes fortunes-de
fortunes-es fortunes-it fortunes-cs fortunes-eo``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/usr/share/games/fortunes")
LANGUAGES = {"cs": "cs", "de": "de", "eo": "eo", "es": "es", "it": "it"}
"""By language, the folder below ``ROOT``; English lies in ``ROOT`` itself."""
TOPICS = ("computers", "definitions", "food", "law", "men-women", "people", "politics", "science")
TOPICS += ("songs-poems", "work")
MOST = 1_500
"""Texts of a label at most, so that no language outweighs the others."""
SHORTEST, LONGEST = 20, 400
TEST_SHARE = 0.2


def main() -> None:
    """Write both data sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    english = {topic: ROOT / topic for topic in TOPICS}
    missing = [str(path) for path in english.values() if not path.is_file()]
    missing += [str(ROOT / name) for name in LANGUAGES.values() if not (ROOT / name).is_dir()]
    if missing:
        raise SystemExit(f"no {missing[0]}; apt-get install fortunes fortunes-de fortunes-es fortunes-it fortunes-cs")
    write(folder / "topic", {topic: list(texts([path])) for topic, path in english.items()})
    by_language = {name: list(texts(sorted((ROOT / part).glob("*.u8")))) for name, part in LANGUAGES.items()}
    write(folder / "language", {**by_language, "en": list(texts(sorted(english.values())))})


def texts(paths: list[Path]) -> Iterator[str]:
    """Texts of ``SHORTEST`` to ``LONGEST`` characters, each once, with runs of blanks made one."""
    seen = set()
    for path in paths:
        for part in re.split(r"(?m)^%.*$", path.read_bytes().decode(errors="ignore")):
            text = " ".join(part.split())
            if SHORTEST <= len(text) <= LONGEST and text not in seen:
                seen.add(text)
                yield text


def write(folder: Path, found: dict[str, list[str]]) -> None:
    """``MOST`` texts of each label; a text is of the test split by its own digest, so that the split never changes."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for label, each in found.items():
        for text in sorted(each, key=_digest)[:MOST]:
            split = "test" if int(_digest(text)[-6:], 16) < TEST_SHARE * 16**6 else "train"
            lines[split].append(json.dumps({"text": text, "label": label}, ensure_ascii=False))
    for split, rows in lines.items():
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
        print(f"{folder / split}.jsonl: {len(rows):,} texts of {len(found)} labels")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
