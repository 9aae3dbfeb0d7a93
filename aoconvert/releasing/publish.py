"""Publishes the variants that kept their gates."""

from __future__ import annotations

from dataclasses import dataclass

from aoconvert import api
from aoconvert.errors import AoconvertError, Interrupted
from aoconvert.options.release import ReleaseOptions
from aoconvert.progress import Progress
from aoconvert.releasing.record import VariantRecord, failure_of
from aoconvert.releasing.release_file import ReleaseFile
from aoconvert.releasing.told import OnEvent, ProgressEvents
from aoconvert.releasing.variants import PlannedVariant


@dataclass
class Publisher:
    """Sends variants to the Hub, which is sent what it lacks.

    Attributes:
        found: the release file.
        options: of the release.
        progress: is told what is sent.
        on_event: is told of each variant.
    """

    found: ReleaseFile
    options: ReleaseOptions
    progress: Progress
    on_event: OnEvent

    def publish(self, each: PlannedVariant, record: VariantRecord) -> VariantRecord:
        """Publish a variant that was made; gives its record with the repo and the commit, or with what went wrong.

        Raises:
            Interrupted: what was sent stays.
        """
        assert each.repo_id is not None
        try:
            done = api.push(
                each.repo_id,
                each.folder,
                progress=ProgressEvents(self.progress, self.on_event, [each.name]),
                token=self.options.token,
                private=self.found.private,
                collection=self.found.collection,
                license=each.license,
            )
        except Interrupted:
            raise
        except AoconvertError as error:
            failure = failure_of(error)
            self.on_event({"event": "failed", "variant": each.name, "error": failure.model_dump()})
            return record.model_copy(update={"status": "failed", "error": failure})
        said = {"variant": each.name, "repo_id": done.repo_id, "commit": done.commit, "url": done.url}
        status = "unchanged" if done.nothing_to_do else "pushed"
        self.on_event({"event": status, **said, "bytes_sent": done.bytes_sent, "warnings": list(done.warnings)})
        where = {"repo_id": done.repo_id, "url": done.url, "commit": done.commit}
        return record.model_copy(update={"status": status, **where})
