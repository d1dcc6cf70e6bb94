"""Builds the index of one split: each image is opened once; later its size and time are asked for, or its folder's.

`build_index` lists the images of a source, decodes each once to learn whether it can be trained on, and remembers the
verdicts in a Parquet file. Files that cannot be decoded are set aside with their reason; training continues without
them.
"""

from __future__ import annotations

import os
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from ijckd_fast import signals
from ijckd_fast.console import progress_bar
from ijckd_fast.data.index.ask import AskDali
from ijckd_fast.data.index.check import CANNOT_BE_READ, By, Verdict, check_image
from ijckd_fast.data.index.index import Index, Odd, Paths, content_hash, stamps_of
from ijckd_fast.data.index.kept import Files, Names, cache_homes, load_files, report_path, save_files
from ijckd_fast.data.index.relist import relist
from ijckd_fast.data.index.said import DataSettings
from ijckd_fast.data.sources import (
    IMAGE_EXTENSIONS,
    Fields,
    InOrder,
    Listed,
    PassedOver,
    Place,
    Source,
    WholeFile,
    open_source,
    read_class_list,
)
from ijckd_fast.data.sources.passed_over import images_warning, listed, of_no_class, together
from ijckd_fast.errors import UserError
from ijckd_fast.files import remove_leftovers

FILES_PER_TASK = 64  # one task of the pool: long enough to hide the pool, short enough for a live progress bar
SAVE_EVERY = 300.0  # seconds of decoding that a killed scan loses at most


@dataclass(frozen=True, eq=False)
class Scan:
    """An index and what was seen on the way to it.

    all_facts  [M] of dtype FACTS, of every file that was listed; formats, variants: what they number
    rows     [M] bool: the files of this split, those left out too; None: all
    home     where the verdicts and the list of the bad files are kept; None where nothing could be written
    opened   files that were opened, and the seconds that took
    passed_over  files that are not read because of their names, or of where they lie, by kind
    layout   what kind of source it is: 'class folders'
    labels_from  what says the labels
    only_in_order  see Source.only_in_order
    """

    index: Index
    all_facts: np.ndarray
    formats: Names
    variants: Names
    home: Path | None
    opened: int
    opening_seconds: float
    passed_over: list[PassedOver]
    layout: str
    labels_from: str
    only_in_order: InOrder | None = None
    rows: np.ndarray | None = None

    @property
    def facts(self) -> np.ndarray:
        """[m] of dtype FACTS, of every file of this split, those left out too. Made when it is asked for: a training
        does not.
        """
        return self.all_facts if self.rows is None else self.all_facts[self.rows]


def build_index(
    root: str | Path,
    split: Literal["train", "val"],
    *,
    classes: Sequence[str] | None = None,
    class_list: str | Path | None = None,
    labels: str | Path | None = None,
    fields: Fields | None = None,
    itself: bool = False,
    workers: int = 0,
    verify: Literal["full", "fast"] = "full",
    refresh: bool = False,
    trust_folders: bool = False,
    progress: bool = False,
    cache_dir: str | Path | None = None,
    least_classes: int = 1,
    ask_dali: bool = True,
) -> Index:
    """Indexes a split of a data folder of any kind in ../sources. Decodes only what is new or has changed.

    classes    the class folders there must be, in the order of their labels, e.g. the train index's for val; default:
               sorted
    class_list a file that names them, one in a line, where there are no `classes`
    labels     a file that names the class of every image, see label_files.read_labels; for images that lie in
               the split's folder itself
    fields     where image and label of a sample stand, in shards and Parquet files; default: as these say themselves
    itself     where root has no such split, root is the folder of its images
    workers    threads that decode; 0 = one per core this process may use
    verify     'full' decodes every file to its last pixel; 'fast' reads header and trailer and decodes only what looks
               odd, so that damage inside a file goes unseen
    refresh    forget earlier verdicts
    trust_folders  take it that a folder holds what it held as long as its own times are the same, instead of asking for
               the length and time of every file: seconds for millions of files, but one rewritten in place goes unseen.
               Files left out before are looked at all the same
    progress   show a progress bar on stderr while folders are listed and files are decoded
    cache_dir  where to keep the index files; default root/.ijckd-index or, where that cannot be written, a folder below
               the user's cache directory ($XDG_CACHE_HOME, else ~/.cache)
    least_classes  fewer are refused before a file is opened: a classifier is trained on 2 or more
    ask_dali   decode images of odd variants (variants.py) by DALI too, where it is installed, to learn whether its
               pixels are Pillow's. Where they are not, or nobody asked, the DALI executor lets Pillow decode them.
               Neither which images are in the index nor its hash depends on it
    warns      once with the number of files left out and where their list is; of images that are passed over because
               of their names; of names that are equal but for their Unicode form; when a cached index is damaged
    raises     UserError: no such folder, no class folder, folders that lie one level too deep, a class without a
               readable image, classes unlike `classes` or the class list, labels unlike the images, a damaged shard
    """
    return scan(
        root,
        split,
        classes=classes,
        class_list=class_list,
        labels=labels,
        fields=fields,
        itself=itself,
        workers=workers,
        verify=verify,
        refresh=refresh,
        trust_folders=trust_folders,
        progress=progress,
        cache_dir=cache_dir,
        least_classes=least_classes,
        ask_dali=ask_dali,
    ).index


def scan(
    root: str | Path,
    split: Literal["train", "val"],
    *,
    classes: Sequence[str] | None = None,
    class_list: str | Path | None = None,
    labels: str | Path | None = None,
    fields: Fields | None = None,
    itself: bool = False,
    workers: int = 0,
    verify: Literal["full", "fast"] = "full",
    refresh: bool = False,
    trust_folders: bool = False,
    progress: bool = False,
    cache_dir: str | Path | None = None,
    least_classes: int = 1,
    ask_dali: bool = True,
    in_order: Callable[[InOrder, Iterator[Place]], None] | None = None,
    said: DataSettings | None = None,
) -> Scan:
    """build_index, with what a summary needs besides.

    in_order   called before anything is decoded where images can only be read one after the other, with what there is
               to say of that and with where they are; None: such images are refused
    said       the data folder that this is a split of, as the user gave it; default: root with the arguments above
    """
    said = said or DataSettings(root, class_list, labels, fields or Fields())
    root = Path(root).resolve()
    if split not in ("train", "val"):
        raise UserError(f"split must be 'train' or 'val', found {split!r}")
    if verify not in ("full", "fast"):
        raise UserError(f"verify must be 'full' or 'fast', found {verify!r}")
    source = open_source(root, split, labels, fields, itself)
    where = "the training data has"
    if classes is None and class_list is not None:
        classes, where = read_class_list(class_list), f"{class_list} lists"
    groups = source.groups(classes, where)
    if source.class_is_group:
        _require_classes(source, len(groups), least_classes)

    homes = cache_homes(root, cache_dir)
    for folder in homes:
        remove_leftovers(folder)
    known = Files.none() if refresh else load_files(homes, split)
    asked_before = known.labels_asked
    files = relist(source, groups, known, trust_folders or source.in_shards, progress)
    only_in_order = None if files.members is None else source.only_in_order(files.members["offset"])
    if only_in_order is not None:
        if in_order is None:
            raise _to_be_packed(source, only_in_order, said)
        in_order(only_in_order, _places(source, files))
    unused = source.content.passed_over(source.unused())
    passed = together([unused, *(group.passed_over for group in files.groups)])
    _require_images(source, files, passed)
    names, label_of = source.labels(_listed(files), classes)
    _require_classes(source, len(names), least_classes)
    if text := images_warning(source.content.folder, passed, IMAGE_EXTENSIONS):
        warnings.warn(text, stacklevel=3)
    dali = AskDali() if ask_dali else None
    unsure = ~files.facts["full"] & (verify == "full")
    todo = np.flatnonzero(~files.facts["known"] | unsure | (dali is not None and _to_be_compared(files, dali)))
    # os.path's: Path.is_file() raises where a home may not be looked into
    home = next((home for home in homes if os.path.isfile(report_path(home, split))), None)
    before, compared_with = files.facts[todo], known.compared_with

    def save() -> Path | None:
        if dali is not None and dali.loaded:
            files.compared_with = dali.versions
        return save_files(homes, split, files)

    began = time.perf_counter()
    with signals.noted() as asked:
        try:
            if len(todo):
                files.facts["known"][todo] = False
                _check_all(source, files, todo, verify == "full", dali, workers, progress, asked, save)
        finally:  # also when interrupted: what was decoded so far need not be decoded again
            seconds = time.perf_counter() - began
            newly_compared = dali is not None and dali.loaded and dali.versions != compared_with
            relabelled = files.labels_asked != asked_before
            if files.groups != known.groups or (files.facts[todo] != before).any() or newly_compared or relabelled:
                home = save()
    index = _assemble(source, names, files, label_of, home, said)
    labels_from = source.labels_from or ", ".join(dict.fromkeys(g.labels_from for g in files.groups if g.labels_from))
    return Scan(
        index,
        files.facts,
        files.formats,
        files.variants,
        home,
        len(todo),
        seconds,
        passed,
        source.title,
        labels_from,
        only_in_order,
    )


def _to_be_packed(source: Source, found: InOrder, said: DataSettings) -> UserError:
    """Why images that are read in their order are not trained on, and the command after which they are."""
    folder = Path(said.data_dir).resolve()
    packed = folder.parent / f"{folder.name}-packed"
    return UserError(
        f"the images in {source.content.called} must be stored as they are to be read in any order, as training reads "
        f"them, found {found.why}, where each costs its whole row group; pack them once, their bytes unchanged "
        f"({found.amount}): {said.command('pack', folder, packed, '--short', '0')}, then give --data-dir "
        f"{shlex.quote(str(packed))}"
    )


def _require_classes(source: Source, found: int, least: int) -> None:
    if found < least:
        remedy = (
            "put one folder of images per class into it"
            if source.class_is_group
            else "give images of more classes, or say which labels are meant"
        )
        raise UserError(
            f"a classifier needs at least {'two' if least == 2 else least} classes, but {source.content.called} has "
            f"{found}: {remedy}"
        )


def _require_images(source: Source, files: Files, passed: Sequence[PassedOver]) -> None:
    """UserError where shards hold nothing at all; where they hold images of no class, the source knows what to say."""
    if source.in_shards and not len(files.facts) and not of_no_class(passed):
        others = f", only {listed(passed)}" if passed else ""
        raise UserError(
            f"{source.content.called} must hold images, found none in {len(files.groups)} {source.title}{others}; "
            "fetch them again, or give another folder"
        )


def _to_be_compared(files: Files, dali: AskDali) -> np.ndarray:
    """[N] bool: images of odd variants that these versions of DALI and Pillow were not compared on."""
    odd = files.facts["known"] & (files.facts["variant"] > 0) & (files.facts["reason"] == 0)
    if not odd.any() or not dali.can_be_asked():
        return np.zeros_like(odd)
    if files.compared_with == dali.versions:
        odd &= files.facts["by"] == By.UNASKED
    return odd


def _listed(files: Files) -> Listed:
    """What the listings say, for the source to make labels of."""
    rows = [group.rows for group in files.groups]
    skipped = [of_no_class(group.passed_over) for group in files.groups]
    if files.members is None:
        return Listed(Paths(files.paths), rows, skipped, (), None)
    there = np.unique(files.members["label"])
    labels = [files.labels[number] for number in there]
    return Listed(Paths(files.paths), rows, skipped, labels, np.searchsorted(there, files.members["label"]))


def _check_all(
    source: Source,
    files: Files,
    todo: np.ndarray,
    full: bool,
    dali: AskDali | None,
    workers: int,
    progress: bool,
    asked: signals.Asked,
    save: Callable[[], object],
) -> None:
    """Fills in the facts of rows `todo` [n], or of those that were decoded before a signal `asked` to end.

    Threads suffice: Pillow decodes outside the interpreter lock.
    """

    ends = np.cumsum([group.rows for group in files.groups])

    def check(rows: np.ndarray, paths: list[bytes]) -> tuple[np.ndarray, list[Verdict | OSError]]:
        checked: list[Verdict | OSError] = []
        for row, path in zip(rows.tolist(), paths, strict=True):
            if asked.signum:
                break
            try:
                checked.append(check_image(_place(source, files, ends, row, path), full, dali, source.in_shards))
            except OSError as error:
                checked.append(error)
        return rows[: len(checked)], checked

    def tasks() -> Iterator[tuple[np.ndarray, list[bytes]]]:
        for first in range(0, len(todo), FILES_PER_TASK):
            if asked.signum:
                break
            rows = todo[first : first + FILES_PER_TASK]
            yield rows, [files.paths[int(i)].as_py() for i in rows]

    threads = workers or len(os.sched_getaffinity(0))
    waiting = tasks()
    with (
        progress_bar(progress) as bar,
        ThreadPoolExecutor(threads) as pool,
        warnings.catch_warnings(),  # here and not in the threads, which share the filters
    ):
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata and large images; huge ones are an error
        line = bar.add_task("checking files", total=len(todo))
        saved = time.monotonic()
        try:
            running = {pool.submit(check, *task) for task in islice(waiting, 4 * threads)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(check, *task) for task in islice(waiting, len(done))}
                for future in done:
                    rows, checked = future.result()
                    for row, verdict in zip(rows.tolist(), checked, strict=True):
                        _note(files, row, verdict)
                    bar.advance(line, len(rows))
                if asked.save or time.monotonic() - saved > SAVE_EVERY:
                    asked.save = False  # of this scan: the training after it has its own
                    save()
                    saved = time.monotonic()
        finally:  # interrupted: do not wait for what has not begun
            pool.shutdown(cancel_futures=True)


def _place(source: Source, files: Files, ends: np.ndarray, row: int, path: bytes) -> Place:
    """Where the image in a row lies. ends: of the groups' rows; path: of the row, relative to the root."""
    root = source.content.root
    if not source.in_shards:
        return WholeFile(os.path.join(root, os.fsdecode(path)))
    assert files.members is not None
    shard = files.groups[int(np.searchsorted(ends, row, side="right"))].folder
    fact = files.facts[row]
    checksum = int(fact["crc32"]) or None  # where it has been looked at before, it is to be what it was
    return source.place_in_shard(
        os.path.join(root, shard),
        int(files.members["offset"][row]),
        int(fact["length"]),
        checksum,
        (int(fact["width"]), int(fact["height"])),
    )


def _places(source: Source, files: Files) -> Iterator[Place]:
    """Of all images, in their order."""
    ends = np.cumsum([group.rows for group in files.groups])
    for row in range(len(files.facts)):
        yield _place(source, files, ends, row, files.paths[row].as_py())


def _note(files: Files, row: int, verdict: Verdict | OSError) -> None:
    """Writes down what a look at one image said."""
    if isinstance(verdict, OSError):
        # It may be fixed without a change of the file (chmod, a mount): not to be remembered.
        reason = files.reasons.number(f"{CANNOT_BE_READ}: {verdict.strerror}")
        files.facts[row] = (-1, -1, 0, 0, 1, 0, reason, 0, By.DALI, 0, False, True)
        return
    width, height, kind, orientation, why, whole, variant, by, crc32, read = verdict
    length, mtime_ns = files.facts[["length", "mtime_ns"]][row]
    length = length or read  # where its listing could not know it
    numbers = files.formats.number(kind), files.reasons.number(why), files.variants.number(variant)
    files.facts[row] = (length, mtime_ns, width, height, orientation, *numbers, by, crc32, whole, True)


def _assemble(
    source: Source, classes: tuple[str, ...], files: Files, labels: np.ndarray, home: Path | None, said: DataSettings
) -> Index:
    """labels: [N] int64 of every file, good or bad."""
    folder, split = source.content.folder, source.content.split
    bad = np.flatnonzero(files.facts["reason"])
    quarantined = [(os.fsdecode(files.paths[int(i)].as_py()), files.reasons[files.facts["reason"][i]]) for i in bad]
    _require_images_in_every_class(source, classes, files, labels, bad, quarantined)
    if quarantined:
        listed = f"; all are listed in {report_path(home, split)}" if home else ""
        warnings.warn(
            f"{len(bad)} of {len(labels)} files in {folder} cannot be used and are left out, e.g. "
            f"{quarantined[0][0]}: {quarantined[0][1]}{listed}",
            stacklevel=4,
        )
    paths, facts, members = files.paths, files.facts, None
    if files.members is not None:
        shard = np.repeat(np.arange(len(files.groups)), [group.rows for group in files.groups])
        members = np.stack([shard, files.members["offset"], facts["length"], facts["crc32"]], 1)
    if len(bad):
        good = facts["reason"] == 0
        paths, facts, labels = paths.filter(pa.array(good)), facts[good], labels[good]
        members = None if members is None else members[good]
    sizes = np.stack([facts["width"], facts["height"]], 1)
    digest = content_hash(split, classes, Paths(paths), labels, sizes, facts["length"])
    shards = () if members is None else tuple(group.folder for group in files.groups)
    return Index(
        str(source.content.root),
        split,
        classes,
        Paths(paths),
        labels,
        sizes,
        quarantined,
        digest,
        shards,
        members,
        source.place_in_shard,
        _odd(files, facts),
        stamps_of(facts["length"], facts["mtime_ns"]) if members is None else None,
        source.blocks,
        source.content.called,
        sum(of_no_class(group.passed_over) for group in files.groups),
        said,
    )


def _odd(files: Files, facts: np.ndarray) -> Odd | None:
    """facts: of the good images."""
    if not facts["variant"].any():
        return None
    there, variant = np.unique(np.append(facts["variant"], 0), return_inverse=True)  # 0 first: plain
    names = tuple(files.variants[int(number)] for number in there)
    return Odd(names, variant[:-1].astype(np.int32), facts["by"] != By.DALI)


def _require_images_in_every_class(
    source: Source,
    classes: tuple[str, ...],
    files: Files,
    labels: np.ndarray,
    bad: np.ndarray,
    quarantined: list[tuple[str, str]],
) -> None:
    """labels [N] of every file; bad: the rows of those left out, which are `quarantined`."""
    left = np.bincount(labels, minlength=len(classes)) - np.bincount(labels[bad], minlength=len(classes))
    empty = np.flatnonzero(left == 0)
    if not len(empty):
        return
    name = classes[empty[0]]
    unreadable = [quarantined[i] for i in np.flatnonzero(labels[bad] == empty[0])]
    passed = together([files.groups[empty[0]].passed_over]) if source.class_is_group else []
    why = (
        f"its {len(unreadable)} image files are unreadable ({unreadable[0][0]}: {unreadable[0][1]})"
        if unreadable
        else f"it has no image file, only {listed(passed)}, which are not read: expected {', '.join(IMAGE_EXTENSIONS)}"
        if passed
        else "it has no image file"
    )
    others = f" and {len(empty) - 1} other classes" if len(empty) > 1 else ""
    raise UserError(
        f"every class of {source.content.folder} needs at least one readable image, but {name!r}{others} has none: "
        f"{why}; "
        "add images or remove the class from both splits"
    )
