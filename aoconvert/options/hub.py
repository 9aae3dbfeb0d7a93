"""How the Hub is asked: what every command has that reads a model from there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeAlias

from aoconvert.options.fields import FOLDER, SWITCH, Option

Revision: TypeAlias = Annotated[
    str | None, Option("Branch, tag or commit of a Hub repo.", recorded=1, pattern="[0-9a-f]{40}")
]
Token: TypeAlias = Annotated[str | None, Option("Hub token; it is never stored.", envvar="HF_TOKEN")]
CacheDir: TypeAlias = Annotated[Path | None, Option("Hub cache folder.", FOLDER)]
LocalFilesOnly: TypeAlias = Annotated[bool, Option("Use only the Hub cache, not the network.", SWITCH)]


@dataclass(frozen=True)
class HubOptions:
    """Where a repo's files come from.

    Attributes:
        revision: branch, tag or commit hash; ``None`` for the default branch.
        token: for a private or gated repo; ``None`` uses what the Hub client finds. It is in no repr.
        cache_dir: the Hub cache; ``None`` uses the Hub client's.
        local_files_only: never use the network.
    """

    revision: Revision = None
    token: Token = field(default=None, repr=False)
    cache_dir: CacheDir = None
    local_files_only: LocalFilesOnly = False


DEFAULT_HUB = HubOptions()


class FromHub:
    """Options with the fields of :class:`HubOptions` among their own."""

    revision: str | None
    token: str | None
    cache_dir: Path | None
    local_files_only: bool

    @property
    def hub(self) -> HubOptions:
        """How the Hub is asked for the checkpoint, or for the source of one."""
        return HubOptions(self.revision, self.token, self.cache_dir, self.local_files_only)
