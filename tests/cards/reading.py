"""A card as its readers read it: the front matter as the Hub does, the body as Markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from markdown_it import MarkdownIt
from markdown_it.token import Token

from aoconvert.cards.hub_names import KEYS, LICENSES, TASKS


@dataclass(frozen=True)
class Page:
    front: dict[str, Any]
    body: str
    tokens: list[Token]

    @property
    def headings(self) -> list[str]:
        places = [place for place, token in enumerate(self.tokens) if token.type == "heading_open"]
        return [f"{self.tokens[place].tag} {self.tokens[place + 1].content}" for place in places]

    def fences(self, language: str) -> list[str]:
        return [token.content for token in self.tokens if token.type == "fence" and token.info == language]

    @property
    def shape(self) -> list[str]:
        """The document's blocks, without what is in them."""
        return [token.type for token in self.tokens if token.type != "inline"]

    @property
    def inline(self) -> list[Token]:
        return [child for token in self.tokens for child in token.children or ()]

    @property
    def html(self) -> set[str]:
        blocks = [token.content for token in self.tokens if token.type == "html_block"]
        return {line for text in blocks for line in text.splitlines() if line} | {
            token.content for token in self.inline if token.type == "html_inline"
        }

    @property
    def links(self) -> set[str]:
        return {str(token.attrs["href"]) for token in self.inline if token.type == "link_open"}

    @property
    def shown(self) -> str:
        """What a reader sees, without code blocks."""
        return "\n".join(
            "".join(child.content for child in token.children or () if child.type != "html_inline")
            for token in self.tokens
            if token.type == "inline"
        )


def read(text: str) -> Page:
    """Parse a card; its front matter must be one that the Hub takes."""
    found = REGEX_YAML_BLOCK.search(text)
    assert found is not None
    front = yaml.safe_load(found[2])
    assert ModelCard(text).data.to_dict() == front
    check_front(front)
    body = text[found.end() :]
    return Page(front, body, MarkdownIt("gfm-like", {"linkify": False, "html": True}).disable("linkify").parse(body))


def check_front(front: dict[str, Any]) -> None:
    """Keys and values as the Hub's documentation gives them."""
    assert set(front) <= set(KEYS)
    assert None not in front.values()
    assert front["tags"] and len(set(front["tags"])) == len(front["tags"])
    assert all(isinstance(tag, str) and re.fullmatch(r"[\w.+: -]+", tag) for tag in front["tags"])
    assert front["library_name"] in ("diffusers", "transformers")
    if "license" in front:
        assert front["license"] in LICENSES
    if "license_name" in front:
        assert re.fullmatch(r"[a-z0-9-.]+", front["license_name"])
    if "pipeline_tag" in front:
        assert front["pipeline_tag"] in TASKS
    languages = front.get("language", [])
    for code in [languages] if isinstance(languages, str) else languages:
        assert re.fullmatch(r"[a-z]{2,3}(-\w+)?", code)
    if "base_model" in front:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", front["base_model"])
        assert front["base_model_relation"] == "quantized"
