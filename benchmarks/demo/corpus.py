"""The demo model's corpus: public-domain books from Debian packages, split by whole book.

| source   | Debian packages                   | text                                             |
|----------|-----------------------------------|--------------------------------------------------|
| `kjv`    | bible-kjv, bible-kjv-text         | King James Version (1611), English               |
| `rv1909` | libsword-utils, sword-text-sparv  | Reina-Valera (1909), Spanish                     |
| `web`    | libsword-utils, sword-text-web    | World English Bible with Deuterocanon, English   |
| `austen` | r-cran-janeaustenr (the data only)| Jane Austen's six novels (1811-1817), English    |

    apt-get install --no-install-recommends bible-kjv bible-kjv-text \\
        libsword-utils sword-text-sparv sword-text-web
    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb austen
    python -m benchmarks.demo.corpus --out corpus \\
        --austen austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb

writes `train.json`, `validation.json` and `test.json`: lists of books, each with its chapters as
plain text. A chapter is a heading, then one verse or paragraph a line, without verse numbers.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import struct
import subprocess
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

SPLITS = ("train", "validation", "test")

# The same books in every translation, so that a translation never gives away the book that is
# tested. None of the tested ones is retold by another, as Kings is by Chronicles.
TEST_BOOKS = {"Ruth", "Esther", "Ecclesiastes", "James", "Persuasion"}
VALIDATION_BOOKS = {"Daniel", "I Peter", "Northanger Abbey"}
LEFT_OUT_BOOKS = {
    "Esther (Greek)",
    "Prayer of Azariah",
    "Susanna",
    "Bel and the Dragon",
}  # retell Esther and Daniel

AUSTEN_TITLES = [  # the order inside the R data file, which is alphabetical
    "Emma",
    "Mansfield Park",
    "Northanger Abbey",
    "Persuasion",
    "Pride and Prejudice",
    "Sense and Sensibility",
]


HELD_OUT = {  # shipped file -> source, what it is, most bytes (it is cut after a whole chapter)
    "heldout.en.txt": ("kjv", "English, King James Version", 100_000),
    "heldout.es.txt": ("rv1909", "Spanish, Reina-Valera 1909", 100_000),
    "heldout.prose.txt": ("austen", "English prose, *Persuasion*", 80_000),
}


@dataclass(frozen=True)
class Book:
    source: str
    title: str
    chapters: list[str]

    @property
    def split(self) -> str:
        if self.title in TEST_BOOKS:
            return "test"
        return "validation" if self.title in VALIDATION_BOOKS else "train"

    @property
    def text(self) -> str:
        """Chapters with a blank line between them, as the held-out files have them."""
        return "\n".join(self.chapters)


def chapter_text(heading: str, lines: list[str]) -> str:
    tidy = (re.sub(r"\s+", " ", line).strip() for line in lines)
    return "\n".join([heading, *(line for line in tidy if line)]) + "\n"


def sword_books(source: str, module: str, heading: str) -> list[Book]:
    """Books of a SWORD module; `heading` is a format of `book`, `own_name` and `chapter`.

    `mod2imp` prints one `$$$Book chapter:verse` line per entry, then the verse in OSIS markup.
    Footnotes and titles go with their text; every other tag goes without it. `book` is the English
    name; `own_name`, in the module's language, is the `x-usfm-h` milestone of chapter 0.
    """
    dump = subprocess.run(["mod2imp", module], capture_output=True, check=True, encoding="utf-8")
    verses: dict[str, dict[int, list[str]]] = {}
    own_name: dict[str, str] = {}
    for entry in dump.stdout.split("$$$")[1:]:
        key, _, osis = entry.partition("\n")
        place = re.fullmatch(r"(.+) (\d+):(\d+)", key)
        if place is None:
            continue
        book, chapter, verse = place[1], int(place[2]), int(place[3])
        if chapter == 0 and (name := re.search(r'n="([^"]*)" type="x-usfm-h"', osis)):
            own_name[book] = name[1]
        if chapter == 0 or verse == 0:
            continue
        osis = re.sub(r"<(note|title)\b[^>]*>.*?</\1>", " ", osis, flags=re.S)
        line = re.sub(r"<l(b|g)?\b[^>]*>", " ", osis)
        line = re.sub(r"<[^>]*>", "", line)
        line = re.sub(r"\s+([,.;:?!\u2019\u201d])", r"\1", html.unescape(line))
        verses.setdefault(book, {}).setdefault(chapter, []).append(line)
    books = []
    for book, chapters in verses.items():
        texts = []
        for number, lines in sorted(chapters.items()):
            title = heading.format(book=book, own_name=own_name.get(book), chapter=number)
            texts.append(chapter_text(title, lines))
        books.append(Book(source, book, texts))
    return books


def kjv_books(titles: list[str]) -> list[Book]:
    """The books as `bible -f` prints them ("Ge1:1 In the beginning"), with `titles` in order."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    printed = subprocess.run(command, capture_output=True, check=True, encoding="ascii").stdout
    verses: dict[str, dict[int, list[str]]] = {}
    for line in printed.splitlines():
        place = re.match(r"(\d?[A-Za-z]+)(\d+):(\d+) ", line)
        verses.setdefault(place[1], {}).setdefault(int(place[2]), []).append(line[place.end() :])
    books = []
    for title, chapters in zip(titles, verses.values(), strict=True):
        texts = [chapter_text(f"{title} {number}", lines) for number, lines in chapters.items()]
        books.append(Book("kjv", title, texts))
    return books


def r_character_vectors(path: Path) -> list[list[str]]:
    """Character vectors of an R lazy-load file.

    Each object: length of the plain bytes (big-endian uint32), a zlib stream. Inside, after the
    XDR header (format 3: 14 bytes, then the counted name of the encoding): type 16, the number of
    strings, then each string as (flags, length, bytes).
    """
    data, vectors = path.read_bytes(), []
    while data:
        stream = zlib.decompressobj()
        plain, data = stream.decompress(data[4:]), stream.unused_data
        (encoding_length,) = struct.unpack_from(">i", plain, 14)
        offset = 18 + encoding_length
        kind, count = struct.unpack_from(">ii", plain, offset)
        if kind & 0xFF != 16:
            raise ValueError(
                f"{path}: every object must be a character vector, got type {kind & 0xFF}"
            )
        offset += 8
        strings = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", plain, offset + 4)
            strings.append(plain[offset + 8 : offset + 8 + length].decode("utf-8"))
            offset += 8 + length
        vectors.append(strings)
    return vectors


def austen_books(path: Path) -> list[Book]:
    """Novels, hard-wrapped lines joined to one line a paragraph, cut at the chapter headings."""
    books = []
    for title, lines in zip(AUSTEN_TITLES, r_character_vectors(path), strict=True):
        blocks = re.split(r"\n\s*\n", "\n".join(lines))
        chapters: list[list[str]] = []
        for block in blocks:
            block = block.strip().replace("_", "")
            if re.match(r"(?i)chapter [ivxlc\d]+\b", block):
                chapters.append([])
            elif chapters and not re.match(r"(?i)(volume|finis|the end|\[|transcriber)", block):
                chapters[-1].append(block)
        texts = [
            chapter_text(f"{title}, chapter {i}", block) for i, block in enumerate(chapters, 1)
        ]
        books.append(Book("austen", title, texts))
    return books


def read_books(austen: Path) -> list[Book]:
    spanish = sword_books("rv1909", "spaRV1909eb", "{own_name}, capítulo {chapter}")
    english = sword_books("web", "engWEB2015eb", "{book}, chapter {chapter}")
    kjv = kjv_books([book.title for book in spanish])
    books = [*kjv, *spanish, *english, *austen_books(austen)]
    return [book for book in books if book.title not in LEFT_OUT_BOOKS]


def load_split(folder: Path, split: str) -> list[Book]:
    return [Book(**book) for book in json.loads((folder / f"{split}.json").read_text("utf-8"))]


def held_out_text(name: str, test_books: list[Book]) -> str:
    source, _, limit = HELD_OUT[name]
    text = ""
    for chapter in (c for book in test_books if book.source == source for c in book.chapters):
        longer = f"{text}\n{chapter}" if text else chapter
        if len(longer.encode()) > limit:
            break
        text = longer
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--austen", type=Path, required=True, help="its Rdata.rdb")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three JSON files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    books = read_books(args.austen)
    for split in SPLITS:
        chosen = [book for book in books if book.split == split]
        (args.out / f"{split}.json").write_text(
            json.dumps([asdict(book) for book in chosen], ensure_ascii=False), "utf-8"
        )
        for source in ("kjv", "rv1909", "web", "austen"):
            n_bytes = sum(len(book.text.encode()) for book in chosen if book.source == source)
            print(f"{split:10} {source:7} {n_bytes:9,} bytes")


if __name__ == "__main__":
    main()
