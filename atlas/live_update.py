"""Another version of a running model: what it may change, and what waits for it.

Versions of one layout have the same tensors at the same places of as many pages; what the pages
hold, their CRCs, the raw pages and the metadata may differ. An `Atlas` goes over from one to the
other between two passes, in this order:

    1  no pass begins, nothing is read ahead, what is queued has run      (`Atlas.exclusive`)
    2  the files are rewritten, if the new version takes the place of the old one
    3  shards that differ are given up, the new table of CRCs takes the old one's place, and shards
       come from the new version's file                                   (`Atlas.adopt`)
    4  what stays is brought in again, and what was computed from pages is computed anew

A page is checked against one table only, so whatever of this fails or is interrupted, a page of the
other version is an error and never an answer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np

from atlas.host_store import FileStore
from delta.checked_patch import check_patch
from delta.patch_file import PatchReader
from delta.sharded_update import ShardedUpdate
from delta.source_model import ShardedSource, open_source
from forge.buffers import forget_scratch
from forge.errors import GGUFShardError
from forge.sgmap import ShardMap
from forge.sharded_model import ShardedModel


class ModelUpdatedError(GGUFShardError):
    """A sequence of tokens cannot go on: it was begun with a version of the model that is gone."""

    def __init__(self) -> None:
        super().__init__("the model was updated: its sequence starts anew, at position 0")


class Follower(Protocol):
    """What has been computed from a model's pages and metadata, and must follow a new version."""

    def check(self, metadata: Mapping[str, Any]) -> None:
        """Raise GGUFShardError if a version with this metadata cannot be followed."""

    def follow(self, metadata: Mapping[str, Any]) -> None:
        """Compute anew; the Atlas has gone over to a version with this metadata."""


class UpdatableCache(Protocol):
    """What holds shards of a model."""

    def paused(self) -> AbstractContextManager[None]:
        """A context in which nothing is under way and nothing is read ahead."""

    def adopt(self, model: ShardedModel, changed: Sequence[int]) -> None:
        """Go over to another version of the model, of which these shards differ; the store, too."""


class UseLock:
    """A lock for a model in use; a context manager that a thread may enter again.

    Threads take it in turn: whoever waits is next, even if the thread that has it asks for it again
    at once, as one that runs pass after pass does. A plain lock would be its own for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = threading.Lock()  # whoever has it waits for the other one
        self._owner = 0
        self._depth = 0

    def __enter__(self) -> None:
        this_thread = threading.get_ident()
        if self._owner != this_thread:  # a number that only this thread writes here
            with self._next:
                self._lock.acquire()
            self._owner = this_thread
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = 0
            self._lock.release()


class LiveModel:
    """A model whose pages are cached, and which may be updated while it is in use.

    Parameters
    ----------
    store
        Where shards come from.

    Attributes
    ----------
    shard_cache
        What they are cached in; set by the heir, and fed from `store`.
    version
        How often another version of the model has taken the place of the one before (`adopt`).
    followers
        What depends on the version beside the cache.
    """

    shard_cache: UpdatableCache

    def __init__(self, store: FileStore) -> None:
        self._store = store
        self._use = UseLock()
        self.version = 0
        self.followers: list[Follower] = []

    @property
    def model(self) -> ShardedModel:
        """The open sharded model, the present version of it."""
        return self._store.model

    @property
    def map(self) -> ShardMap:
        """The map of the present version."""
        return self.model.map

    def in_use(self) -> UseLock:
        """A context for a pass, from its first shard to its result: while it is entered, no other
        thread runs a pass or updates the model. A thread may enter it again."""
        return self._use

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """A context for rewriting the model's files, up to and including `adopt`: while it is
        entered, there is no pass under way on another thread, and nothing is read ahead.

        Raises
        ------
        GGUFShardError
            If a GPU has met a page that does not hold and nobody has been told yet.
        """
        with self._use, self.shard_cache.paused():
            yield

    def check_update(self, shard_map: ShardMap, metadata: Mapping[str, Any]) -> None:
        """Refuse a version of the model that cannot be adopted; to be asked before its files take
        the place of the present ones.

        Parameters
        ----------
        shard_map, metadata
            The version's map and its source's metadata.

        Raises
        ------
        GGUFShardError
            If it differs in more than what pages hold, or a follower cannot follow.
        """
        check_layout(self.map, shard_map)
        try:
            for follower in self.followers:
                follower.check(metadata)
        except GGUFShardError as error:
            raise GGUFShardError(f"{shard_map.source[0].name}: {error}") from None

    def adopt(self, model: ShardedModel) -> None:
        """Go over to another version of the model: before it every result is the old one's, after
        it the new one's. Shards that differ are given up; pinned ones are brought in again.

        Parameters
        ----------
        model
            The open version, of the same layout, in files of its own or in those of the old one,
            rewritten in place. From now on it is closed with the Atlas; the old one is closed here.

        Raises
        ------
        CorruptPageError
            If a page of what stays fails its check twice. The new version has been adopted all the
            same; the page's shard is read when it is wanted next.
        GGUFShardError
            If the version cannot be adopted (`check_update`), or its header does not hold. Then
            nothing has changed, and closing it is left to the caller.
        """
        with self.exclusive():
            old, metadata = self.model, model.source_header().metadata
            self.check_update(model.map, metadata)
            changed = changed_shards(old, model)
            self.version += 1  # first: should this be interrupted, no sequence goes on
            try:
                self.shard_cache.adopt(model, changed)
            finally:
                if self.model is model:
                    old.close()
            for follower in self.followers:
                follower.follow(metadata)

    def apply_delta(
        self, patch: str | os.PathLike[str], *, reverse: bool = False, progress: bool = False
    ) -> None:
        """Update the model with a patch while it is in use: its files, and what is cached of them.

        The patch is held against the files and the result against the patch's SHA-256 while the
        model goes on answering; only the writing of what has changed holds it up.

        Parameters
        ----------
        patch
            A patch whose base this model was sharded from (`delta.diff.create_patch`).
        reverse
            Go from the patch's target back to its base.
        progress
            Show progress bars on stderr.

        Raises
        ------
        GGUFShardError
            If the patch is damaged or for another model, adds or removes pages, or the files cannot
            be written: the present version goes on answering.
        CorruptPageError
            If what was written cannot be read back (`adopt`).
        """
        path = self.model.map_path
        with ExitStack() as stack:
            stack.callback(forget_scratch)  # memory is the model's
            reader = stack.enter_context(PatchReader(patch))
            base = stack.enter_context(open_source(path))
            assert isinstance(base, ShardedSource)
            if base.model.map != self.map:
                raise GGUFShardError(f"{path}: is another version of the model than the one in use")
            bound = check_patch(reader, base, reverse, progress)
            update = ShardedUpdate.plan(bound, base.model)
            if update is None:
                raise GGUFShardError(
                    f"{reader.path}: adds or removes pages: a running model keeps its layout"
                )
            with update:
                update.build(progress)
                self.check_update(update.map, bound.headers[0].metadata)
                with self.exclusive():
                    update.commit()
                    self._adopt_or_close(ShardedModel(path))

    def _adopt_or_close(self, model: ShardedModel) -> None:
        try:
            self.adopt(model)
        except BaseException:
            if self.model is not model:
                model.close()
            raise


def check_layout(old: ShardMap, new: ShardMap) -> None:
    """Refuse a version of a model that lies in its pages in another way.

    Raises
    ------
    GGUFShardError
        If they differ in more than what pages hold; the message names the first such thing.
    """
    before, after = _layout(old), _layout(new)
    for what in {**before, **after}:
        if before.get(what) != after.get(what):
            raise GGUFShardError(
                f"{new.source[0].name}: {what}: {after.get(what, 'none')}, not "
                f"{before.get(what, 'none')}: a running model keeps its layout"
            )


def _layout(shard_map: ShardMap) -> dict[str, str]:
    """All that says what is where."""
    layout = {
        "pages per shard": f"{shard_map.pages_per_shard}",
        "memory layout": shard_map.atlas.memory_layout,
        "pages": f"{shard_map.n_pages}",
    }
    for tensor in shard_map.tensors:
        name = f"tensor {tensor.name!r}"
        layout[name] = f"{tensor.ggml_type.name} {list(tensor.shape)}"
        for i, s in enumerate(tensor.slices):
            layout[f"{name}, slice {i}"] = f"{s.pages} pages from {s.first_page} on, zone {s.zone}"
    return layout


def changed_shards(old: ShardedModel, new: ShardedModel) -> list[int]:
    """Shards that differ between two versions of one layout, by the digests in their maps and by
    their tables of CRCs; nothing is read."""
    pages = np.flatnonzero(old.page_crc32 != new.page_crc32)
    changed = set((pages >> old.map.shard_shift).tolist())
    digests = zip(old.map.shard_xxh3_64, new.map.shard_xxh3_64, strict=True)
    changed.update(shard for shard, (before, after) in enumerate(digests) if before != after)
    return sorted(changed)
