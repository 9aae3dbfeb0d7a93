"""What each variant's repo says of the others: the release's record and the card that is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aoconvert import cards
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.manifest import MANIFEST_NAME, RELEASE_NAME
from aoconvert.checkpoint.release import Release, ReleasedModel, ReleasedVariant
from aoconvert.errors import AoconvertError, HubRefusal, Interrupted
from aoconvert.files import write_whole, writing
from aoconvert.hub.lookups import find_release, is_there
from aoconvert.releasing.publish import Publisher
from aoconvert.releasing.record import VariantRecord, failure_of, public_form
from aoconvert.releasing.release_file import ReleaseFile
from aoconvert.releasing.variants import PlannedVariant


@dataclass(frozen=True)
class Siblings:
    """Keeps the records and cards of a release's variants true.

    Attributes:
        path: of the release file.
        found: what is in it.
    """

    path: Path
    found: ReleaseFile

    def describe(self, records: Iterable[VariantRecord], made: VariantRecord | None = None) -> Release:
        """The release as it is published.

        Args:
            records: of all variants, in the order of the file.
            made: a variant that is about to be published, in place of what its repo holds.
        """
        forms = [
            _about_to_be(made, record.published) if made is not None and record.name == made.name else record.published
            for record in records
        ]
        return self._release(forms)

    def _release(self, forms: Iterable[ReleasedVariant | None]) -> Release:
        models = tuple(
            ReleasedModel(name=model.title, source=None if (self.path.parent / model.source).exists() else model.source)
            for model in self.found.all_models
        )
        variants = tuple(form for form in forms if form is not None)
        return Release(name=self.found.name, models=models, variants=variants)

    def forget_deleted(self, records: Sequence[VariantRecord], publisher: Publisher) -> Iterator[VariantRecord]:
        """The new records of those whose repos are gone.

        Args:
            records: of the variants that were not asked for.
            publisher: asks the Hub, and tells of each.
        """
        for record in records:
            known = record.published
            if known is None or known.repo_id is None:
                continue
            if not is_there(known.repo_id, publisher.options.token):
                reason = f"{known.repo_id} is not on the Hub any more, or this token cannot see it"
                _say_left_out(publisher, record, reason)
                yield record.model_copy(update={"published": None, "commit": None, "url": None})

    def recall(
        self, variants: Sequence[PlannedVariant], records: Mapping[str, VariantRecord], publisher: Publisher
    ) -> Iterator[VariantRecord]:
        """The new records of those that this machine knows nothing of, and whose repos say that they are published."""
        for each in variants:
            record = records[each.name]
            if record.published is not None or each.repo_id is None or "/" not in each.repo_id:
                continue
            release = find_release(each.repo_id, publisher.options.token)
            own = next((own for own in release.variants if _is_of(own, each)), None) if release is not None else None
            if release is not None and own is not None:
                publisher.sent[each.name] = release.dump()
                yield record.model_copy(update={**dict(own), "published": own})

    def update(
        self, variants: Sequence[PlannedVariant], records: Mapping[str, VariantRecord], publisher: Publisher
    ) -> Iterator[VariantRecord]:
        """Put the final record and the card made of it into each repo that lacks them.

        Returns:
            The new records of those where that failed; their weights stay published.

        Raises:
            Interrupted: what was sent stays.
        """
        release = self.describe(records.values())
        content = release.dump()
        for each in variants:
            record = records[each.name]
            if record.published is None or record.status == "failed" or publisher.sent.get(each.name) == content:
                continue
            if _digest(each.folder) != record.published.manifest_sha256:
                what = "is not there" if not each.folder.is_dir() else "holds something else than its repo"
                _say_left_out(publisher, record, f"{each.folder} {what}: run the release with this variant")
                continue
            failed = _update(each, record, release, publisher)
            if failed is not None:
                yield failed

    def write_cards(self, variants: Sequence[PlannedVariant], records: Mapping[str, VariantRecord]) -> None:
        """Write record and card into the folders of the variants, of which nothing is published now.

        Raises:
            WriteError: disk full.
        """
        forms = {each.name: _form_here(each, records[each.name]) for each in variants}
        content = self._release(forms.values()).dump()
        for each in variants:
            form = forms[each.name]
            if form is None or _digest(each.folder) != form.manifest_sha256:
                continue
            place = each.folder / RELEASE_NAME
            with writing(place):
                write_whole(place, content)
            if not cards.is_edited(each.folder):
                options = cards.CardOptions(license=each.license)
                cards.write(each.folder, cards.render(each.folder, options, repo_id=form.repo_id))


def _about_to_be(made: VariantRecord, before: ReleasedVariant | None) -> ReleasedVariant:
    """A variant that was made, at the place where it is already if it is the same."""
    form = public_form(made)
    if before is None or before.manifest_sha256 != form.manifest_sha256 or before.repo_id is None:
        return form
    if before.repo_id != form.repo_id and before.repo_id.rpartition("/")[2] != form.repo_id:
        return form
    return form.model_copy(update={"repo_id": before.repo_id, "url": before.url, "commit": before.commit})


def _form_here(each: PlannedVariant, record: VariantRecord) -> ReleasedVariant | None:
    """A variant as its folder holds it, where it may be published; else as its repo does."""
    good = record.verified and all(gate.passed for gate in record.gates)
    if good and record.status in ("made", "skipped") and record.manifest_sha256 == _digest(each.folder):
        return public_form(record)
    return record.published


def _is_of(found: ReleasedVariant, each: PlannedVariant) -> bool:
    """Whether a record that a repo holds is of this variant there."""
    return (found.name, found.model, found.repo_id) == (each.name, each.model.title, each.repo_id) and bool(
        found.commit
    )


def _update(
    each: PlannedVariant, record: VariantRecord, release: Release, publisher: Publisher
) -> VariantRecord | None:
    """Send record and card of one variant; gives its new record where that failed."""
    assert record.published is not None and record.published.repo_id is not None
    try:
        done = publisher.push(each, record.published.repo_id, release)
    except Interrupted:
        raise
    except AoconvertError as error:
        failure = failure_of(error)
        if record.status == "skipped" and isinstance(error, HubRefusal):  # somebody edited it there
            _say_left_out(publisher, record, error.message)
            return record.model_copy(update={"error": failure})
        publisher.on_event({"event": "failed", "variant": each.name, "error": failure.model_dump()})
        return record.model_copy(update={"status": "failed", "error": failure})
    if not done.nothing_to_do:
        notes = list(done.warnings) if record.status == "skipped" else []  # else they were told already
        said = {"variant": each.name, "repo_id": done.repo_id, "commit": done.commit, "url": done.url}
        publisher.on_event({"event": "card_updated", **said, "bytes_sent": done.bytes_sent, "warnings": notes})
    return None


def _say_left_out(publisher: Publisher, record: VariantRecord, reason: str) -> None:
    publisher.on_event({"event": "card_not_updated", "variant": record.name, "reason": reason})


def _digest(folder: Path) -> str | None:
    try:
        return file_sha256(folder / MANIFEST_NAME)
    except OSError:
        return None
