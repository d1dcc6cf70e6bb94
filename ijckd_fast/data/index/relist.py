"""What is in the groups of a source now, with the verdicts of an earlier scan that still hold."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ijckd_fast.console import progress_bar
from ijckd_fast.data.index.kept import FACTS, MEMBERS, Files, Group, Names
from ijckd_fast.data.sources import Listing, Source
from ijckd_fast.data.sources.listing import file_state, list_groups
from ijckd_fast.errors import UserError

_COMPARED = 8  # images of a shard


def relist(source: Source, groups: Sequence[str], known: Files, trust: bool, progress: bool) -> Files:
    """The images that are in `groups` of a source now, with the verdicts that still hold.

    known   of an earlier scan; its arrays may be reused and changed
    trust   take it that a group whose times are the same holds what it held
    raises  UserError where a group cannot be read; what the source raises
    """
    root = source.content.root
    trust = trust and known.labels_asked == source.labels_asked
    stamps = {group.folder: group.stamps for group in known.groups} if trust else {}
    try:
        with progress_bar(progress) as bar:
            line = bar.add_task(f"listing {source.content.split}", total=len(groups))
            listed = list_groups(
                str(root),
                groups,
                lambda group: stamps.get(group, ()),
                lambda n: bar.advance(line, n),
                source.list_group,
            )
    except OSError as error:
        raise UserError(
            f"the images in {source.content.folder} must be readable, found: {error}; fix it and run again"
        ) from error
    merged = _merge(source, known, groups, listed)
    merged.labels_asked = source.labels_asked
    first = 0
    for group, listing in zip(merged.groups, listed, strict=True):
        rows = slice(first, first := first + group.rows)
        # a file left out may have been replaced by a good one, or a link's target come back
        if listing is None and not source.in_shards:
            _look_again(root, merged, rows.start + np.flatnonzero(merged.facts["reason"][rows]))
    return merged


def _merge(source: Source, known: Files, folders: Sequence[str], listed: Sequence[Listing | None]) -> Files:
    if [group.folder for group in known.groups] == list(folders) and not any(listed):
        return known
    ends = np.cumsum([group.rows for group in known.groups], dtype=np.int64).tolist()
    before = {group.folder: (end - group.rows, group) for end, group in zip(ends, known.groups, strict=True)}
    paths: list[pa.LargeBinaryArray] = []
    facts: list[np.ndarray] = []
    members: list[np.ndarray] = []
    groups = []
    for folder, listing in zip(folders, listed, strict=True):
        first, group = before.get(folder, (0, Group(folder, 0, ())))
        old_paths, old_facts = known.paths.slice(first, group.rows), known.facts[first : first + group.rows]
        if listing is None:
            paths += old_paths.chunks
            facts.append(old_facts)
            if known.members is not None:
                members.append(known.members[first : first + group.rows])
        else:
            paths.append(listing.paths)
            facts.append(_said(listing, known) if listing.table else _remembered(listing, old_paths, old_facts))
            if source.in_shards and not _holds_what_it_did(source, folder, listing, facts[-1]):
                facts[-1] = _unknown(listing)
            group = Group(folder, len(listing.paths), listing.stamps, listing.passed_over, listing.labels_from)
            if listing.offsets is not None:
                numbers = _numbers(known.labels, listing.labels)
                members.append(np.rec.fromarrays([listing.offsets, numbers.astype(np.int32)], MEMBERS))
        groups.append(group)
    merged = pa.chunked_array([pa.concat_arrays(paths)] if paths else [], pa.large_binary())
    return Files(
        merged,
        np.concatenate([np.empty(0, FACTS), *facts]),
        groups,
        known.formats,
        known.reasons,
        np.concatenate(members).astype(MEMBERS) if members else None,
        known.labels,
        known.variants,
        known.compared_with,
    )


def _numbers(names: Names, labels: Sequence[str] | pa.DictionaryArray) -> np.ndarray:
    """[n] int64, what `names` calls the labels of a listing."""
    if isinstance(labels, pa.DictionaryArray):
        return names.numbers(labels)
    return np.array([names.number(label) for label in labels], np.int64)


def _said(listing: Listing, known: Files) -> np.ndarray:
    """[n] of FACTS as the listing's own table has them. known: has the numbers of formats."""
    assert listing.table is not None
    facts = np.zeros(len(listing.paths), FACTS)
    facts["length"], facts["mtime_ns"], facts["crc32"] = listing.lengths, listing.mtimes, listing.table.checksums
    facts["width"], facts["height"] = listing.table.sizes.T
    facts["format"] = known.formats.number(listing.table.format)
    facts["orientation"], facts["full"], facts["known"] = 1, True, True
    return facts


def _remembered(listing: Listing, old_paths: pa.ChunkedArray, old_facts: np.ndarray) -> np.ndarray:
    """[n] of FACTS for the files of a listing, known where a file has the length and time that it had."""
    facts = _unknown(listing)
    at = pc.fill_null(pc.index_in(listing.paths, value_set=old_paths), -1).to_numpy()
    rows = np.flatnonzero(at >= 0)
    old = old_facts[at[rows]]
    unknown = np.zeros(len(rows), bool) if listing.offsets is None else listing.offsets[rows] < 0  # without a look
    same = ((old["length"] == listing.lengths[rows]) | unknown) & (old["mtime_ns"] == listing.mtimes[rows])
    facts[rows[same]] = old[same]
    return facts


def _unknown(listing: Listing) -> np.ndarray:
    """[n] of FACTS for the files of a listing, none of which has been looked at."""
    facts = np.zeros(len(listing.paths), FACTS)
    facts["length"], facts["mtime_ns"] = listing.lengths, listing.mtimes
    return facts


def _holds_what_it_did(source: Source, shard: str, listing: Listing, facts: np.ndarray) -> bool:
    """Whether a few images of a shard have the checksums that are remembered of them [n].

    It is another file than it was, or was changed, and yet has its time: a copy, or other images of the same lengths.
    """
    assert listing.offsets is not None
    rows = np.flatnonzero(facts["known"] & (facts["reason"] == 0) & (facts["crc32"] != 0))
    if (listing.offsets[rows] < 0).any():
        rows = rows[:1]  # each costs what stands before it
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, _COMPARED).astype(np.int64))] if len(rows) else ():
        length, crc32, *size = (int(facts[name][row]) for name in ("length", "crc32", "width", "height"))
        path = os.path.join(source.content.root, shard)
        try:
            source.place_in_shard(path, int(listing.offsets[row]), length, crc32, (size[0], size[1])).read()
        except OSError as error:
            if error.errno is None:
                return False
    return True


def _look_again(root: Path, files: Files, rows: np.ndarray) -> None:
    """The verdicts of these rows hold if the files have the lengths and times they had."""
    for i in rows:
        state = file_state(root / os.fsdecode(files.paths[int(i)].as_py()))
        if state != (files.facts["length"][i], files.facts["mtime_ns"][i]):
            files.facts[i] = np.zeros((), FACTS)
            files.facts["length"][i], files.facts["mtime_ns"][i] = state
