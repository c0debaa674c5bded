"""Build prose/000_00000.parquet, a small corpus of English prose with FineWeb's columns.

    python data/build_prose.py PYTHON_DOC.deb JARGON_TEXT.deb

The arguments are two Debian packages (`apt-get download python3.11-doc jargon-text`); README.md names the versions.
"""

import hashlib
import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from gzip import decompress
from pathlib import Path

import pyarrow
import pyarrow.parquet
from gpusup.trainer import bpe

OUT = Path(__file__).with_name("prose") / "000_00000.parquet"
MANUALS = re.compile(
    r"\./usr/share/doc/python3\.11/html/_sources/((?:tutorial|howto|faq|whatsnew|reference|using"
    r"|extending)/[\w.-]+)\.rst\.txt"
)
JARGON = "./usr/share/doc/jargon-text/jargon.txt.gz"
DOCUMENT_CHARS = 1500  # short sections and entries are joined up to this length
UNDERLINE = re.compile(r"([=\-*^~\"'#])\1{2,}\s*$")


def members(package: Path) -> Iterator[tuple[str, bytes, datetime]]:
    """Name, content and date of every regular file of a Debian package."""
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.isfile() and (file := tar.extractfile(member)):
                yield member.name, file.read(), datetime.fromtimestamp(member.mtime, UTC)


def prose_of_rst(source: str) -> Iterator[str]:
    """The running text of a manual page, one section at a time: no code, tables, lists of names or directives."""
    section: list[str] = []
    for block in re.split(r"\n\s*\n", source):
        lines = block.strip("\n").split("\n")
        if any(UNDERLINE.match(line) for line in lines):
            yield "\n\n".join(section)
            section = []
        elif not lines[0].startswith((" ", "\t", "..", "|", "+", ">>>", ":")):
            section.append(without_markup(" ".join(line.strip() for line in lines)))
    yield "\n\n".join(section)


def without_markup(text: str) -> str:
    """A paragraph of reStructuredText as it is read."""
    text = re.sub(r"^(?:[*\-#]|\d+\.|#\.)\s+", "", text)
    text = re.sub(r"\(Contributed by [^()]*(?:\([^()]*\)[^()]*)*\)|:(?:issue|gh|source):`[^`]*`", "", text)
    text = re.sub(r":[\w:+-]+:`[!~]?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`]*>`__?", r"\1", text)
    text = re.sub(r"``([^`]*)``|`([^`]*)`_?", lambda match: match[1] or match[2] or "", text)
    text = re.sub(r"\*\*?([^*\s][^*]*)\*\*?", r"\1", text)
    return re.sub(r"\s+", " ", text.replace("\\ ", "").replace("::", ":")).strip()


def prose_of_jargon(source: str) -> Iterator[str]:
    """The entries and essays of the Jargon File, one at a time."""
    entry: list[str] = []
    for block in re.split(r"\n\s*\n", source):
        text = re.sub(r"\s+", " ", re.sub(r"[{}]", "", block)).strip()
        if block.lstrip().startswith(":") or not block.startswith(" "):
            yield "\n\n".join(entry)
            entry = []
        entry.append(text.removeprefix(":"))
    yield "\n\n".join(entry)


def is_prose(paragraph: str) -> bool:
    """Whether it reads as sentences."""
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    return len(paragraph) >= 60 and letters / len(paragraph) > 0.88 and paragraph.count(" ") >= 8


def documents(sections: Iterator[str], seen: set[str]) -> Iterator[str]:
    """Sections joined to documents of a reasonable length, prose alone, no paragraph twice."""
    document: list[str] = []
    for section in sections:
        for paragraph in section.split("\n\n"):
            if is_prose(paragraph) and paragraph not in seen:
                seen.add(paragraph)
                document.append(paragraph)
        if sum(map(len, document)) >= DOCUMENT_CHARS:
            yield "\n\n".join(document)
            document = []
    if document:
        yield "\n\n".join(document)


def rows(packages: list[Path]) -> Iterator[dict[str, object]]:
    """One row for each document, with FineWeb's columns."""
    encoding, seen = bpe.gpt2(), set[str]()
    for package in packages:
        name = package.name.split("_")[0]
        for path, content, date in members(package):
            if match := MANUALS.fullmatch(path):
                url, sections = f"https://docs.python.org/3.11/{match[1]}.html", prose_of_rst(content.decode())
            elif path == JARGON:
                url, sections = "http://www.catb.org/jargon/", prose_of_jargon(decompress(content).decode())
            else:
                continue
            for text in documents(sections, seen):
                yield {
                    "text": text,
                    "id": f"<sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}>",
                    "dump": name,
                    "url": url,
                    "date": date.strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "file_path": path.removeprefix("."),
                    "language": "en",
                    "language_score": 1.0,
                    "token_count": len(encoding.encode_ordinary(text)),
                }


def main() -> None:
    """Write the corpus and say how large it is."""
    table = pyarrow.Table.from_pylist(list(rows([Path(argument) for argument in sys.argv[1:]])))
    pyarrow.parquet.write_table(table, OUT, compression="zstd", compression_level=19, row_group_size=250)
    text_bytes = sum(len(text.encode()) for text in table["text"].to_pylist())
    tokens = sum(table["token_count"].to_pylist())
    print(
        f"{OUT.name}: {table.num_rows} documents, {text_bytes:,} bytes of text, {tokens:,} tokens, "
        f"{OUT.stat().st_size:,} bytes, sha256 {hashlib.sha256(OUT.read_bytes()).hexdigest()}"
    )


if __name__ == "__main__":
    main()
