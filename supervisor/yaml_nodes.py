"""YAML as values with their positions, and only as much of YAML as a policy needs.

PyYAML's SafeLoader finds the nodes and where they are; what a scalar means is decided here, as YAML 1.2 has it (`22:00`
is text, `1e-4` a number, `012` is twelve) plus on/off and yes/no, which is how people write switches. Anchors, aliases,
tags and merge keys are refused: they make a file mean something else than it shows, and small files huge.
"""

import re
from typing import Any, NoReturn

import yaml
from msgspec import Struct
from yaml.events import AliasEvent

MAX_BYTES = 256 * 1024
MAX_DEPTH = 50
MAX_VALUES = 2000

Plain = bool | int | float | str | None


class At(Struct, frozen=True, order=True):
    """A place in the file, counted from 1, in characters."""

    line: int
    column: int


class Problem(Struct, frozen=True, order=True):
    at: At
    message: str
    """What is wrong; then, after a semicolon, what to do."""


class Scalar(Struct, frozen=True):
    at: At
    value: Plain
    text: str
    """As it stands in the file, without quotes."""
    quoted: bool = False


class Items(Struct, frozen=True):
    at: At
    items: tuple["Node", ...]


class Entry(Struct, frozen=True):
    key_at: At
    node: "Node"


class Map(Struct, frozen=True):
    at: At
    entries: dict[str, Entry]


class Refused(Struct, frozen=True):
    """Stands where something was refused that has been reported already."""

    at: At


Node = Scalar | Items | Map | Refused


class NotYaml(Exception):
    """Nothing can be read from the text on from here."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def read_yaml(data: bytes) -> tuple[Node | None, list[Problem]]:
    """The one document in `data`, None when there is none, and what had to be refused in it.

    The problems come in no particular order. What could be read is returned beside them, so that the caller can go on
    and report everything at once.
    """
    if len(data) > MAX_BYTES:
        return None, [Problem(At(1, 1), f"the file is larger than {MAX_BYTES // 1024} KiB; a policy is a few lines")]
    problems: list[Problem] = []
    try:
        text = _decode(data)
        root = _Composer(text, problems).only_root()
        return (None if root is None else _convert(root, problems)), problems
    except NotYaml as error:
        return None, [*problems, error.problem]


def resolve(text: str) -> Plain:
    """What an unquoted scalar means."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > 400:  # no number; int() of thousands of digits is slow and then refused
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if special := _SPECIAL.fullmatch(text):
        return float("".join(part or "" for part in special.groups()))
    return text


def _spellings(*words: str) -> tuple[str, ...]:
    return tuple(form for word in words for form in (word, word.capitalize(), word.upper()))


_WORDS: dict[str, Plain] = (
    dict.fromkeys(("", "~", *_spellings("null")))
    | dict.fromkeys(_spellings("true", "yes", "on"), True)
    | dict.fromkeys(_spellings("false", "no", "off"), False)
)
_INTEGER = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|()\.(nan|NaN|NAN)")

# What may not stand in a file, and the line breaks of YAML 1.1, which PyYAML still takes for line breaks: a comment
# would end at one, and its rest be read as settings.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_LINE_BREAK = re.compile("\r\n|\r|\n")


def _place(text: str, index: int) -> At:
    """Where the character `text[index]` is."""
    start, line = 0, 1
    for line_break in _LINE_BREAK.finditer(text, 0, index):
        start, line = line_break.end(), line + 1
    return At(line, index - start + 1)


def _decode(data: bytes) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; NotYaml at the first byte that is none."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise NotYaml(Problem(At(1, 1), "the file is UTF-16, not UTF-8; save it as UTF-8"))
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        message = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise NotYaml(Problem(_place(before, len(before)), message)) from None
    if bad := _FORBIDDEN.search(text):
        what = "a NUL character" if bad[0] == "\0" else f"the control character U+{ord(bad[0]):04X}"
        hint = "save the file as UTF-8" if bad[0] == "\0" and data[:4].count(b"\0") else "remove it"
        raise NotYaml(Problem(_place(text, bad.start()), f"{what} is not allowed; {hint}"))
    return text


class _Composer(yaml.SafeLoader):
    """PyYAML's nodes, with what is not supported reported where it stands instead of being carried out."""

    REFUSED_TAG = "refused"

    def __init__(self, text: str, problems: list[Problem]) -> None:
        super().__init__(text)
        self.text = text
        self.problems = problems
        self.depth = 0
        self.values = 0

    def only_root(self) -> yaml.Node | None:
        """The only document's root. NotYaml with the scanner's complaint, in words that say what to do."""
        try:
            return self.get_single_node()
        except yaml.MarkedYAMLError as error:
            raise NotYaml(self._explain(error)) from None
        except (ValueError, OverflowError):  # PyYAML on "\UFFFFFFFF"
            self._stop(At(self.line + 1, self.column - 1), "an escape that is no character; write the character itself")
        finally:
            self.dispose()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        at = _at(event.start_mark)
        self.values += 1
        if self.values > MAX_VALUES:
            self._stop(at, f"more than {MAX_VALUES} keys and values; a policy is a few lines")
        is_alias = isinstance(event, AliasEvent)  # by name, since the stubs give an alias fewer attributes than it has
        if is_alias:
            self.get_event()  # type: ignore[no-untyped-call]
            self._report(at, f"aliases such as {_short('*' + event.anchor)} are not supported; write the value out")
            return yaml.ScalarNode(self.REFUSED_TAG, "", event.start_mark, event.end_mark)
        refused = self._refuse_anchor_and_tag(event, at)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self._stop(at, f"nested more than {MAX_DEPTH} levels deep; a policy needs five")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        if refused and node is not None:
            node.tag = self.REFUSED_TAG
        return node

    def _refuse_anchor_and_tag(self, event: Any, at: At) -> bool:
        tag: str | None = event.tag
        if event.anchor is not None:
            self._report(at, f"anchors such as {_short('&' + event.anchor)} are not supported; remove it")
            event.anchor = None
        if tag is None:
            return False
        shown = tag.replace("tag:yaml.org,2002:", "!!")
        self._report(
            at, f"tags such as {_short(shown)} are not supported; remove it, and quote the value if it is text"
        )
        event.tag = None
        return True

    def _report(self, at: At, message: str) -> None:
        self.problems.append(Problem(at, message))

    def _stop(self, at: At, message: str) -> NoReturn:
        raise NotYaml(Problem(at, message))

    def _explain(self, error: yaml.MarkedYAMLError) -> Problem:
        problem, mark = error.problem or "", error.problem_mark or error.context_mark
        at = At(1, 1) if mark is None else _at(mark)
        lines = _LINE_BREAK.split(self.text)
        line = lines[at.line - 1] if at.line <= len(lines) else ""
        indent = line[: len(line) - len(line.lstrip(" \t"))]
        if "\t" in indent:
            return Problem(At(at.line, indent.index("\t") + 1), "a tab indents this line; replace it with spaces")
        if error.context_mark is not None and (
            "end of stream" in problem or "<stream end>" in problem or "document separator" in problem
        ):
            opened = self.text[error.context_mark.index : error.context_mark.index + 1]
            return Problem(_at(error.context_mark), f"the {opened} opened here is never closed; close it")
        for part, message in _EXPLANATIONS:
            if part in problem:
                return Problem(at, message)
        where = f"{error.context}: " if error.context else ""
        return Problem(at, f"not valid YAML, {_short(where + problem, 160)}; correct this line")


_EXPLANATIONS = (
    ("character '\\t'", "a tab stands here; replace it with a space"),
    ("another document", "a second document begins here; a policy is one document, so remove the '---'"),
    ("expected '<document start>'", "this belongs to nothing above; indent it like the keys it stands beside"),
    ("mapping values are not allowed", "a ':' cannot stand here; check the indentation, or quote the text it is in"),
    ("could not find expected ':'", "a key without ':'; write 'key: value'"),
    ("expected <block end>", "this line is indented unlike the lines it stands beside; align them"),
    ("expected ',' or", "a ',' is missing before this; separate the parts with commas"),
    ("that cannot start any token", "a text cannot begin with this character; quote the text"),
    ("tag handle", "tags are not supported; remove it"),
    ("incompatible YAML", "only YAML 1 is known; remove the %YAML line"),
)


def _at(mark: Any) -> At:
    return At(mark.line + 1, mark.column + 1)


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[:most] + "..."


def _convert(node: yaml.Node, problems: list[Problem]) -> Node:
    at = _at(node.start_mark)
    if node.tag == _Composer.REFUSED_TAG:
        return Refused(at)
    if isinstance(node, yaml.SequenceNode):
        return Items(at, tuple(_convert(item, problems) for item in node.value))
    if isinstance(node, yaml.MappingNode):
        return _convert_map(node, problems)
    assert isinstance(node, yaml.ScalarNode)
    if node.style is not None:
        return Scalar(at, node.value, node.value, quoted=True)
    return Scalar(at, resolve(node.value), node.value)


def _convert_map(node: yaml.MappingNode, problems: list[Problem]) -> Map:
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        key_at = _at(key_node.start_mark)
        value = _convert(value_node, problems)
        if isinstance(value, Scalar) and not value.text and not value.quoted:
            value = Scalar(key_at, None, "")  # nothing is written: the key is the place to look at
        key = key_node.value
        if key_node.tag == _Composer.REFUSED_TAG and not key:  # an alias; a key with a tag is known without it
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(Problem(key_at, "a key must be a word, not a list or a map; write 'key: value'"))
        elif key == "<<" and key_node.style is None:
            problems.append(Problem(key_at, "merge keys '<<' are not supported; write the keys out"))
        elif key in entries:
            first = entries[key].key_at.line
            problems.append(Problem(key_at, f"{_short(repr(key))} is given twice, first on line {first}; remove one"))
        else:
            entries[key] = Entry(key_at, value)
    return Map(_at(node.start_mark), entries)
