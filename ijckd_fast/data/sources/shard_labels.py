"""The label of each image of a shard: from a member KEY.cls, from a field of KEY.json, or from the folder it is in."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ijckd_fast.data.sources.listing import some
from ijckd_fast.data.sources.passed_over import NO_CLASS, Tally
from ijckd_fast.errors import UserError

LABEL = "label"  # the field of KEY.json that is looked at where nobody says which
_SIDECARS = (".cls", ".json")
_NUMBER = re.compile(r"[+-]?\d{1,18}")


class Member(NamedTuple):
    """A file in an archive."""

    name: str  # as the archive has it
    offset: int  # bytes, of its content
    length: int
    content: bytes | None = None  # of a member that may hold a label, where it was read in passing


def may_hold_label(name: str) -> bool:
    """Whether a member of this name may say the label of an image."""
    return name.lower().endswith(_SIDECARS)


@dataclass(frozen=True)
class LabelKey:
    """Where the labels of a shard are.

    source  'cls', KEY.cls; 'json', a field of KEY.json; '' the first that there is of KEY.cls, the field `label` of
            KEY.json, and the image's folder
    field   with 'json': its name, or names with dots between them where objects lie in objects
    """

    source: str = ""
    field: str = LABEL

    @classmethod
    def parsed(cls, text: str | None) -> LabelKey:
        """From --label-key. UserError for anything but 'cls' and 'json:FIELD'."""
        if text is None:
            return cls()
        source, colon, field = text.partition(":")
        if (source, colon) == ("cls", "") or (source == "json" and field):
            return cls(source, field or LABEL)
        raise UserError(
            f"--label-key must be cls or json:FIELD, e.g. json:label or json:annotation.class, found {text!r}; name "
            "the member, or the field of KEY.json, that holds an image's class"
        )

    def __str__(self) -> str:
        return f"json:{self.field}" if self.source == "json" else self.source


class Labels(NamedTuple):
    """The labels of a shard, by its images' names after unpacking, in their order.

    found    a number or a class name; images of no class are not in it
    source   where they are from, in a few words; '' for no images
    """

    found: dict[str, str]
    source: str


def labels_of_shard(
    path: str,
    shard: str,
    members: Mapping[str, Member],
    images: Sequence[str],
    key: LabelKey,
    content: Callable[[Member], bytes],
    others: Tally,
) -> Labels:
    """See LabelKey.

    path, shard  the archive, absolute and relative to the data folder
    members      by their names after unpacking; images: those of them that are images
    content      reads a member
    others       takes the members that are neither image nor label, and images of no class: their label is negative
    raises       UserError: an image without a label, one label for two images, labels that disagree
    """
    reader = _Reader(path, members, content)
    wanted = key.source or ("cls" if reader.has(".cls") else "")
    if wanted == "cls":
        texts, where = {name: reader.cls(name) for name in images}, "KEY.cls"
        if not key.source:
            reader.require_same(texts)
    else:
        texts, where = {name: reader.field(name, key) for name in images}, f"{key.field} in KEY.json"
        if not wanted and not any(texts.values()):
            texts, where = {name: posixpath.basename(posixpath.dirname(name)) for name in images}, "folders"
        elif not wanted:
            reader.require_same_as_folders(texts)
    bare = [members[name].name for name in images if not texts[name]]
    if bare:
        raise UserError(_bare(path, bare, len(images), key, where, reader))
    found: dict[str, str] = {}
    for name in images:
        text = texts[name] or ""
        if where != "folders" and _NUMBER.fullmatch(text) and int(text) < 0:
            others.add(f"{shard}/{name}", NO_CLASS)
        else:
            found[name] = text
    seen = {*images, *reader.used}
    for name in members:
        if name not in seen:
            others.add(f"{shard}/{name}")
    return Labels(found, where if images else "")


class _Reader:
    """What the members beside the images say. used: the names of those that say something."""

    def __init__(self, path: str, members: Mapping[str, Member], content: Callable[[Member], bytes]) -> None:
        self._path, self._members, self._content = path, members, content
        self._by_stem: dict[str, dict[str, str]] = {suffix: {} for suffix in _SIDECARS}
        for name in members:
            stem, suffix = posixpath.splitext(name)
            if suffix.lower() in self._by_stem:
                self._by_stem[suffix.lower()][stem] = name
        self.used: dict[str, str] = {}  # by their names the image that each speaks of
        self._objects: dict[str, Any] = {}

    def has(self, suffix: str) -> bool:
        """Whether there is any such member."""
        return bool(self._by_stem[suffix])

    def beside(self, image: str, suffix: str) -> str | None:
        """The member of the image's own name but for the last extension, else that of its key: up to the first dot."""
        folder, _, base = image.rpartition("/")
        stems = self._by_stem[suffix]
        return stems.get(posixpath.splitext(image)[0]) or stems.get(posixpath.join(folder, base.partition(".")[0]))

    def _take(self, name: str, image: str) -> bytes:
        """The content of the label of an image. UserError where it was another one's."""
        other = self.used.setdefault(name, image)
        if other != image:
            raise UserError(
                f"{self._path} must have one image for each key, found {self._members[other].name!r} and "
                f"{self._members[image].name!r} with {self._members[name].name!r}; pack it again"
            )
        return self._text(name)

    def _text(self, name: str) -> bytes:
        member = self._members[name]
        return self._content(member) if member.content is None else member.content

    def cls(self, image: str) -> str | None:
        """What KEY.cls holds; None where there is none."""
        own = self.beside(image, ".cls")
        return None if own is None else self._take(own, image).decode(errors="replace").strip()

    def object(self, image: str) -> Any:
        """What KEY.json holds; None where there is none, or no JSON."""
        own = self.beside(image, ".json")
        if own is None:
            return None
        if own not in self._objects:
            try:
                self._objects[own] = json.loads(self._text(own))
            except ValueError:
                self._objects[own] = None
        return self._objects[own]

    def field(self, image: str, key: LabelKey) -> str | None:
        """What a field of KEY.json holds; None where there is none. UserError where one asked for is no label."""
        value = _in(self.object(image), key.field)
        own = self.beside(image, ".json")
        if value is None or own is None:
            return None
        text = _as_label(value)
        if text is None:
            if not key.source:
                return None
            raise UserError(
                f"{self._path}: {key.field!r} in {self._members[own].name!r} must be a whole number or a name, found "
                f"{json.dumps(value):.80}; name the field with the label by --label-key json:FIELD"
            )
        self._take(own, image)
        return text

    def require_same(self, labels: Mapping[str, str | None]) -> None:
        """UserError where KEY.json's own label is not that of KEY.cls. A name and a number cannot be compared."""
        for image, text in labels.items():
            value = _in(self.object(image), LABEL)
            other = None if value is None else _as_label(value)
            if text and other:
                cls, own = self.beside(image, ".cls"), self.beside(image, ".json")
                assert cls is not None
                assert own is not None
                if _disagree(text, other):
                    raise UserError(
                        f"{self._path}: the labels of {self._members[image].name!r} disagree, {text!r} in "
                        f"{self._members[cls].name!r} and {other!r} as {LABEL!r} in {self._members[own].name!r}; "
                        f"choose one by --label-key cls or --label-key json:{LABEL}, or pack it again"
                    )
                self.used.setdefault(own, image)

    def require_same_as_folders(self, labels: Mapping[str, str | None]) -> None:
        """UserError where the folder of an image and the name in its KEY.json are two classes."""
        for image, text in labels.items():
            folder = posixpath.basename(posixpath.dirname(image))
            if text and folder and not _NUMBER.fullmatch(text) and text != folder:
                raise UserError(
                    f"{self._path}: the labels of {self._members[image].name!r} disagree, its folder {folder!r} and "
                    f"{text!r} as {LABEL!r} in its KEY.json; choose the latter by --label-key json:{LABEL}, or pack it "
                    "again"
                )

    def fields(self, image: str) -> list[str]:
        """The names of the fields of KEY.json."""
        found = self.object(image)
        return list(found) if isinstance(found, dict) else []


def _in(found: Any, field: str) -> Any:
    """The value of a field, as its whole name says, or its parts between dots, one object deeper each; None without."""
    if isinstance(found, dict) and field in found:
        return found[field]
    for part in field.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def _as_label(value: Any) -> str | None:
    """A JSON value as a label; None for what is neither a whole number nor a name."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return str(int(value))


def _disagree(one: str, other: str) -> bool:
    numbers = [int(text) if _NUMBER.fullmatch(text) else None for text in (one, other)]
    if None in numbers:
        return numbers == [None, None] and one != other
    return numbers[0] != numbers[1]


def _bare(path: str, bare: Sequence[str], images: int, key: LabelKey, where: str, reader: _Reader) -> str:
    """What to say of images without a label."""
    fields = next((found for name in bare if (found := reader.fields(posixpath.normpath(name)))), [])
    if key.source == "json":
        have = f", whose fields are {some(fields)}" if fields else ", of which there is none or no JSON"
        return (
            f"{path} must have the field {key.field!r} in a member KEY.json beside each image, but {len(bare)} of "
            f"{images} images have none ({some(bare)}){have}; name the field with the label by --label-key json:FIELD"
        )
    folders = " or by the folder it is in" if where == "folders" and not key.source else ""
    named = f"; KEY.json has {some(fields)}: name one by --label-key json:FIELD, or" if fields else ";"
    return (
        f"{path} must name the class of each image, in a member KEY.cls beside it{folders}, but {len(bare)} have none "
        f"({some(bare)}){named} pack it again"
    )
