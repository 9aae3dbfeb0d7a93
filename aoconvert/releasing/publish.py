"""Publishes the variants that kept their gates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aoconvert import api
from aoconvert.checkpoint.manifest import MANIFEST_NAME, RELEASE_NAME
from aoconvert.errors import AoconvertError, Interrupted
from aoconvert.files import write_whole, writing
from aoconvert.hub.lookups import find_collection, find_weights_commit
from aoconvert.options.release import ReleaseOptions
from aoconvert.progress import Progress
from aoconvert.releasing.record import VariantRecord, failure_of, public_form
from aoconvert.releasing.release_file import ReleaseFile
from aoconvert.releasing.told import OnEvent, ProgressEvents
from aoconvert.releasing.variants import PlannedVariant

if TYPE_CHECKING:
    from aoconvert.checkpoint.release import Release
    from aoconvert.hub.types import Pushed


@dataclass
class Publisher:
    """Sends variants to the Hub, which is sent what it lacks.

    Attributes:
        found: the release file.
        options: of the release.
        progress: is told what is sent.
        on_event: is told of each variant.
        sent: variant → the release's record that its repo holds now.
        collections: owner → slug.
    """

    found: ReleaseFile
    options: ReleaseOptions
    progress: Progress
    on_event: OnEvent
    sent: dict[str, bytes] = field(default_factory=dict)
    collections: dict[str | None, str] = field(default_factory=dict)

    def publish(self, each: PlannedVariant, record: VariantRecord, release: Release) -> VariantRecord:
        """Publish a variant that was made.

        Args:
            each: the variant.
            record: of it.
            release: what was known of the others before this run; it goes with this one.

        Returns:
            Its record with the repo and the commit, or with what went wrong.

        Raises:
            Interrupted: what was sent stays.
        """
        assert each.repo_id is not None
        try:
            collection = self._find_collection(each.repo_id)
            done = self.push(each, each.repo_id, release, collection)
        except Interrupted:
            raise
        except AoconvertError as error:
            failure = failure_of(error)
            self.on_event({"event": "failed", "variant": each.name, "error": failure.model_dump()})
            return record.model_copy(update={"status": "failed", "error": failure})
        commit = done.commit
        if MANIFEST_NAME not in done.sent:  # the weights were there before, and younger commits hold the card alone
            commit = find_weights_commit(done.repo_id, self.options.token) or done.commit
        status = "unchanged" if done.nothing_to_do else "pushed"
        said = {"variant": each.name, "repo_id": done.repo_id, "commit": commit, "url": done.url}
        self.on_event({"event": status, **said, "bytes_sent": done.bytes_sent, "warnings": list(done.warnings)})
        where = {"repo_id": done.repo_id, "url": done.url, "commit": commit}
        record = record.model_copy(update={"status": status, **where})
        return record.model_copy(update={"published": public_form(record)})

    def push(self, each: PlannedVariant, repo_id: str, release: Release, collection: str | None = None) -> Pushed:
        """Bring a variant's repo to what its folder holds, together with the release's record.

        Raises:
            AoconvertError: as ``api.push``.
        """
        content = release.dump()
        place = each.folder / RELEASE_NAME
        with writing(place):
            write_whole(place, content)
        done = api.push(
            repo_id,
            each.folder,
            progress=ProgressEvents(self.progress, self.on_event, [each.name]),
            token=self.options.token,
            private=self.found.private,
            collection=collection,
            license=each.license,
        )
        self.sent[each.name] = content
        return done

    def _find_collection(self, repo_id: str) -> str | None:
        """The slug of the release's collection."""
        wanted = self.found.collection
        if wanted is None:
            return None
        owner = repo_id.partition("/")[0] if "/" in repo_id else None
        if owner not in self.collections:
            slug = find_collection(wanted, owner, self.options.token, private=self.found.private)
            self.collections[owner] = slug
        return self.collections[owner]
