"""Collections of the loopback Hub: ``collections.json`` holds them by slug, as the Hub sends them."""

from __future__ import annotations

import re
from typing import Any

from fake_hub.access import caller, may_create, open_repo, repo_key, writer
from fake_hub.browse import object_id
from fake_hub.state import HubState, now
from fake_hub.wire import Exchange, Failure, Routes

routes = Routes()


def _read(state: HubState) -> dict[str, Any]:
    found: dict[str, Any] = state.disk.read(state.root / "collections.json", {})
    return found


def _write(state: HubState, collections: dict[str, Any]) -> None:
    state.disk.write(state.root / "collections.json", collections)


def _find(exchange: Exchange, slug: str, *, write: bool = False) -> dict[str, Any]:
    """A collection to read or to change. Raises Failure."""
    state = exchange.site.state
    token = caller(exchange)
    found: dict[str, Any] | None = _read(state).get(slug)
    owner = slug.split("/")[0]
    member = token is not None and state.accounts.role(token.user, owner) is not None
    if found is None or (found["private"] and not member):
        raise Failure(404, None, f"Collection not found: {slug}")
    if write and not may_create(state, writer(exchange), owner):
        raise Failure(403, None, f"You don't have the rights to change collections of {owner}")
    return found


def _save(exchange: Exchange, collection: dict[str, Any]) -> None:
    state = exchange.site.state
    collection["lastUpdated"] = now()
    _write(state, {**_read(state), collection["slug"]: collection})


@routes.add("GET", "api/collections")
def listing(exchange: Exchange) -> None:
    state, token = exchange.site.state, caller(exchange)
    owners = exchange.params.get("owner")
    found = [
        {key: value for key, value in collection.items() if key != "position"}
        for collection in _read(state).values()
        if (owners is None or collection["owner"] in owners)
        and (not collection["private"] or (token and state.accounts.role(token.user, collection["owner"])))
    ]
    exchange.page(found, state.options.page_size)


@routes.add("POST", "api/collections")
def create(exchange: Exchange) -> None:
    body, token, state = exchange.json_body(), writer(exchange), exchange.site.state
    title, namespace = body.get("title"), body.get("namespace") or token.user
    if not isinstance(title, str) or not 0 < len(title) < 60:
        raise Failure(400, None, "the title must have 1 to 59 characters")
    if not may_create(state, token, namespace):
        raise Failure(403, None, f'You don\'t have the rights to create a collection under "{namespace}"')
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    slug = f"{namespace}/{words}-{object_id(f'{namespace} {title}')}"
    made: dict[str, Any] = {
        "slug": slug,
        "title": title,
        "owner": namespace,
        "description": body.get("description"),
        "items": [],
        "position": 0,
        "private": bool(body.get("private")),
        "theme": "blue",
        "upvotes": 0,
    }
    with state.disk.lock():
        if slug in _read(state):
            raise Failure(409, None, "This collection already exists", more={"slug": slug})
        _save(exchange, made)
    exchange.answer(made)


@routes.add("GET", "api/collections/{namespace}/{name}")
def get(exchange: Exchange, namespace: str, name: str) -> None:
    exchange.answer(_find(exchange, f"{namespace}/{name}"))


@routes.add("PATCH", "api/collections/{namespace}/{name}")
def change(exchange: Exchange, namespace: str, name: str) -> None:
    body = exchange.json_body()
    with exchange.site.state.disk.lock():
        found = _find(exchange, f"{namespace}/{name}", write=True)
        found |= {key: body[key] for key in ("title", "description", "position", "private", "theme") if key in body}
        _save(exchange, found)
    exchange.answer({"data": found})


@routes.add("DELETE", "api/collections/{namespace}/{name}")
def delete(exchange: Exchange, namespace: str, name: str) -> None:
    state = exchange.site.state
    with state.disk.lock():
        _find(exchange, f"{namespace}/{name}", write=True)
        _write(state, {slug: found for slug, found in _read(state).items() if slug != f"{namespace}/{name}"})
    exchange.answer({})


@routes.add("POST", "api/collections/{namespace}/{name}/items")
def add_item(exchange: Exchange, namespace: str, name: str) -> None:
    body = exchange.json_body()
    item = body.get("item") or {}
    kind, item_id = item.get("type"), item.get("id")
    with exchange.site.state.disk.lock():
        found = _find(exchange, f"{namespace}/{name}", write=True)
        if kind in ("model", "dataset", "space"):
            user, _, repo_name = str(item_id).partition("/")
            open_repo(exchange, repo_key(f"{kind}s", user, repo_name))
        else:
            raise Failure(400, None, f"items of type {kind} are not known here")
        if any((held["type"], held["id"]) == (kind, item_id) for held in found["items"]):
            raise Failure(409, None, "This item is already in the collection")
        made = {"_id": object_id(f"{kind} {item_id}"), "id": item_id, "type": kind, "position": len(found["items"])}
        if body.get("note") is not None:
            made["note"] = {"text": body["note"], "html": ""}
        found["items"].append(made)
        _save(exchange, found)
    exchange.answer(found)


@routes.add("DELETE", "api/collections/{namespace}/{name}/items/{item}")
def delete_item(exchange: Exchange, namespace: str, name: str, item: str) -> None:
    with exchange.site.state.disk.lock():
        found = _find(exchange, f"{namespace}/{name}", write=True)
        kept = [held for held in found["items"] if held["_id"] != item]
        if len(kept) == len(found["items"]):
            raise Failure(404, None, "This item is not in the collection")
        _save(exchange, {**found, "items": kept})
    exchange.answer({})
