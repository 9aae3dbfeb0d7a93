"""Model cards: ``README.md`` and a picture of the error, out of a manifest and the verification that belongs to it."""

from aoconvert.cards.card import Card, CardOptions, has_text, is_edited, write
from aoconvert.cards.make import render
from aoconvert.checkpoint.manifest import CARD_NAME, PICTURE_NAME

__all__ = ["CARD_NAME", "PICTURE_NAME", "Card", "CardOptions", "has_text", "is_edited", "render", "write"]
