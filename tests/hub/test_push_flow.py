"""What a push does to a repo: new, again, on top of another checkpoint, beside other people's commits."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub.server import Fault
from pushing import Pusher, entries, problem

Fresh = Callable[..., Path]


def value(outcome: dict[str, Any]) -> dict[str, Any]:
    assert "value" in outcome, outcome
    found: dict[str, Any] = outcome["value"]
    return found


def titles(me: Pusher, repo: str, revision: str = "main") -> list[str]:
    sha = me.hub.state.resolve(repo, revision)
    assert sha is not None
    return [commit.title for commit in me.hub.state.history(repo, sha)]


def test_a_new_repo_gets_everything_in_one_commit(me: Pusher, fresh: Fresh) -> None:
    folder = fresh()
    done = value(me.push(folder, "me/new", commit_message="the first"))
    assert titles(me, "me/new") == ["the first", "initial commit"]
    assert (done["repo_id"], done["url"], done["pr_url"]) == ("me/new", f"{me.hub.endpoint}/me/new", None)
    assert done["commit"] == me.hub.state.resolve("me/new", "main")
    assert done["bytes_uploaded"] == sum(file["size"] for file in done["files"])
    assert all(file["uploaded"] for file in done["files"])
    found = entries(me.hub, "me/new")
    assert set(found) == {file["path"] for file in done["files"]} | {".gitattributes"}
    for path in set(found) - {".gitattributes", "aoconvert.verify.json"}:
        assert me.hub.state.read("me/new", path) == (folder / path).read_bytes(), path
    # the card and its picture are in the folder now too
    assert {"README.md", "sqnr.svg"} <= set(found)
    # weights before the commit
    order = [entry.method + entry.path for entry in me.hub.log]
    last_upload = max(number for number, line in enumerate(order) if line.startswith("PUT/upload/"))
    assert last_upload < next(number for number, line in enumerate(order) if "/commit/" in line)


def test_again_there_is_nothing_to_do(me: Pusher, fresh: Fresh) -> None:
    folder = fresh()
    first = value(me.push(folder, "me/again"))
    seen = len(me.hub.log)
    again = value(me.push(folder, "me/again"))
    assert again["nothing_to_do"]
    assert (again["commit"], again["bytes_uploaded"]) == (first["commit"], 0)
    assert not any(file["uploaded"] for file in again["files"])
    assert {entry.method for entry in me.hub.log[seen:]} == {"GET"}


def test_only_what_changed_is_sent(me: Pusher, fresh: Fresh) -> None:
    folder = fresh()
    value(me.push(folder, "me/change"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    seen = len(me.hub.log)
    done = value(me.push(folder, "me/change"))
    assert [file["path"] for file in done["files"] if file["uploaded"]] == ["README.md"]
    assert "written by hand" in " ".join(done["warnings"])
    assert not [entry for entry in me.hub.log[seen:] if entry.method == "PUT"]
    assert me.hub.state.read("me/change", "README.md") == (folder / "README.md").read_bytes()
    assert len(titles(me, "me/change")) == 3


def test_weights_of_an_earlier_push_go_in_the_same_commit(me: Pusher, fresh: Fresh) -> None:
    value(me.push(fresh("older"), "me/next"))
    before = entries(me.hub, "me/next")
    me.hub.state.commit("me/next", {"LICENSE": b"mine", "sample.png": b"\0png"})
    done = value(me.push(fresh(), "me/next"))
    found = entries(me.hub, "me/next")
    assert "pytorch_model.bin" in before
    assert "pytorch_model.bin" not in found
    assert done["deleted"] == ["pytorch_model.bin"]
    assert {"LICENSE", "sample.png", "pytorch_model.bin.index.json"} <= set(found)
    assert len(titles(me, "me/next")) == 4


def test_weights_of_somebody_else_are_refused_or_replaced(me: Pusher, fresh: Fresh) -> None:
    state = me.hub.state
    state.create_repo("me/other", initial_commit=True)
    state.commit("me/other", {"model.safetensors": b"theirs", "handler.py": b"pass"})
    folder = fresh()
    refused = problem(me.push(folder, "me/other"), 5)
    assert "model.safetensors (--replace deletes" in refused["message"]
    assert set(entries(me.hub, "me/other")) == {".gitattributes", "model.safetensors", "handler.py"}
    done = value(me.push(folder, "me/other", replace=True))
    assert done["deleted"] == ["model.safetensors"]
    assert "handler.py" in " ".join(done["warnings"])
    assert "handler.py" in entries(me.hub, "me/other")


def test_a_branch_is_made_and_main_stays(me: Pusher, fresh: Fresh) -> None:
    done = value(me.push(fresh(), "me/branches", revision="int8/dev", tag="v1"))
    state = me.hub.state
    assert done["url"].endswith("/me/branches/tree/int8/dev")
    assert state.all_refs("me/branches")["refs/tags/v1"] == done["commit"] == state.resolve("me/branches", "int8/dev")
    assert set(entries(me.hub, "me/branches")) == {".gitattributes"}


def test_a_branch_that_begins_as_what_it_should_be(me: Pusher, fresh: Fresh) -> None:
    folder = fresh()
    value(me.push(folder, "me/same"))
    (folder / "README.md").write_text("# by hand\n")  # a rendered one says which branch its code opens
    first = value(me.push(folder, "me/same"))
    branch = value(me.push(folder, "me/same", revision="copy"))
    assert (branch["commit"], branch["nothing_to_do"], branch["bytes_uploaded"]) == (first["commit"], False, 0)
    assert value(me.push(folder, "me/same", revision="copy"))["nothing_to_do"]


def test_one_pull_request_whatever_happens(me: Pusher, fresh: Fresh) -> None:
    state, folder = me.hub.state, fresh()
    state.create_repo("me/pull", initial_commit=True)
    me.hub.faults.append(Fault("/commit/", lose_answer=True, times=1))
    first = value(me.push(folder, "me/pull", create_pr=True, commit_description="Please look."))
    again = value(me.push(folder, "me/pull", create_pr=True))
    assert first["pr_url"] == again["pr_url"] == f"{me.hub.endpoint}/me/pull/discussions/1"
    assert again["nothing_to_do"]
    (folder / "README.md").write_text("# by hand\n")
    changed = value(me.push(folder, "me/pull", create_pr=True))
    assert changed["pr_url"] == first["pr_url"]
    assert [ref for ref in state.all_refs("me/pull") if "/pr/" in ref] == ["refs/pr/1"]
    assert set(entries(me.hub, "me/pull")) == {".gitattributes"}
    # by its name too, and another manifest gets a pull request of its own
    assert value(me.push(folder, "me/pull", revision="refs/pr/1"))["nothing_to_do"]
    assert value(me.push(fresh("older"), "me/pull", create_pr=True))["pr_url"].endswith("/discussions/2")


def test_a_pull_request_to_a_repo_of_somebody_else(me: Pusher, fresh: Fresh) -> None:
    me.hub.state.create_repo("you/theirs", initial_commit=True)
    folder = fresh()
    refused = problem(me.push(folder, "you/theirs"), 5)
    assert "me may not write to you/theirs" in refused["message"]
    assert "--create-pr" in refused["hint"]
    done = value(me.push(folder, "you/theirs", create_pr=True))
    assert done["pr_url"].endswith("/you/theirs/discussions/1")
    assert value(me.push(folder, "you/theirs", create_pr=True))["nothing_to_do"]


def test_a_repo_is_private_when_asked(me: Pusher, fresh: Fresh) -> None:
    folder = fresh()
    value(me.push(folder, "private", private=True))
    settings = me.hub.state.settings("me/private")
    assert settings is not None
    assert settings.private
    assert value(me.push(folder, "me/private", private=True))["nothing_to_do"]
    refused = problem(me.push(folder, "me/private", private=False), 5)
    assert "is private, and --public was asked for" in refused["message"]


def test_a_collection_gets_the_repo_once(me: Pusher, fresh: Fresh) -> None:
    slug = "me/quantized-0123456789abcdef01234567"
    folder = fresh()
    refused = problem(me.push(folder, "me/listed", collection=slug), 5)
    assert f"the collection {slug} does not exist" in refused["message"]
    collection = {"slug": slug, "title": "Quantized", "owner": "me", "description": None, "items": []}
    more = {"position": 0, "private": False, "theme": "blue", "upvotes": 0, "lastUpdated": "2026-01-01T00:00:00.000Z"}
    me.hub.state.disk.write(me.hub.state.root / "collections.json", {slug: {**collection, **more}})
    value(me.push(folder, "me/listed", collection=slug))
    assert value(me.push(folder, "me/listed", collection=slug))["nothing_to_do"]
    raw = me.hub.state.disk.read(me.hub.state.root / "collections.json")
    assert [item["id"] for item in raw[slug]["items"]] == ["me/listed"]


def test_a_tag_stays_where_it_is(me: Pusher, fresh: Fresh) -> None:
    value(me.push(fresh("older"), "me/tags", tag="v1"))
    folder = fresh()
    refused = problem(me.push(folder, "me/tags", tag="v1"), 5)
    assert "has a tag v1 already, on another commit" in refused["message"]
    assert value(me.push(folder, "me/tags", tag="v2"))["commit"] == me.hub.state.refs("me/tags")["v2"]
    assert value(me.push(folder, "me/tags", tag="v2"))["nothing_to_do"]
    assert "v1 is a tag" in problem(me.push(folder, "me/tags", revision="v1"), 5)["message"]
    assert "main is a branch" in problem(me.push(folder, "me/tags", tag="main"), 5)["message"]


@pytest.mark.parametrize(
    ("path", "content", "says"),
    [
        ("LICENSE", b"new", None),
        ("config.json", b"{}", "another user committed in the meantime, and changed config.json"),
        ("model.safetensors", b"theirs", "has other weights"),
    ],
)
def test_somebody_commits_in_between(me: Pusher, fresh: Fresh, path: str, content: bytes, says: str | None) -> None:
    repo, state = "me/busy", me.hub.state
    state.create_repo(repo, initial_commit=True)
    me.hub.faults.append(Fault("/commit/", delay=0.5, times=1))
    outcomes: list[dict[str, Any]] = []
    folder = fresh()
    work = threading.Thread(target=lambda: outcomes.append(me.push(folder, repo)))
    work.start()
    while not me.hub.requests("/validate-yaml"):
        time.sleep(0.02)
    theirs = state.commit(repo, {path: content})
    work.join()
    assert next(entry.status for entry in me.hub.requests("/commit/")) in (409, 412)
    if says is None:
        done = value(outcomes[0])
        assert state.read(repo, path) == content
        assert done["commit"] == state.resolve(repo, "main")
        assert len(me.hub.requests("^/upload/", method="PUT")) == 2
    else:
        assert says in problem(outcomes[0], 5)["message"]
        assert state.resolve(repo, "main") == theirs


def test_what_is_not_as_sent_is_named(me: Pusher, fresh: Fresh) -> None:
    """A .gitignore in the repo makes the Hub's client leave files out without a word."""
    state = me.hub.state
    state.create_repo("me/ignored", initial_commit=True)
    state.commit("me/ignored", {".gitignore": b"generation_config.json\n"})
    outcome = problem(me.push(fresh(), "me/ignored"), 5)
    assert "generation_config.json is missing" in outcome["message"]
    assert ".gitignore" in outcome["hint"]


def test_an_arrived_object_is_not_sent_again(me: Pusher, fresh: Fresh) -> None:
    folder = fresh()
    me.hub.faults.append(Fault("/commit/", status=403))
    problem(me.push(folder, "me/resume"), 5)
    me.hub.faults.clear()
    first = len(me.hub.requests("^/upload/", method="PUT"))
    value(me.push(folder, "me/resume"))
    assert len(me.hub.requests("^/upload/", method="PUT")) == first == 2


def test_a_downloaded_snapshot_can_be_pushed_elsewhere(me: Pusher, fresh: Fresh, tmp_path: Path) -> None:
    """The Hub cache holds links to blobs; pushing must not change what is in them."""
    folder = fresh()
    value(me.push(folder, "me/one"))
    blobs = tmp_path / "models--me--one" / "blobs"
    snapshot = tmp_path / "models--me--one" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    for place in folder.rglob("*"):
        if place.is_file():
            target = blobs / place.name
            shutil.copy2(place, target)
            link = snapshot / place.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
    card = (blobs / "README.md").read_bytes()
    value(me.push(snapshot, "me/two"))
    assert b"me/two" in me.hub.state.read("me/two", "README.md")
    assert (blobs / "README.md").read_bytes() == card


def test_a_change_that_hides_is_found_before_anything_is_sent(me: Pusher, fresh: Fresh) -> None:
    """Same size, same time of change: only the SHA-256 tells."""
    folder = fresh()
    place = folder / "pytorch_model-00002-of-00002.bin"
    status = place.stat()
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))
    outcome = problem(me.push(folder, "me/hidden"), 3)
    assert "pytorch_model-00002-of-00002.bin is not the file that the manifest lists" in outcome["message"]
    assert me.hub.state.settings("me/hidden") is None
    assert {entry.method for entry in me.hub.log} == {"GET"}


def test_unverified_when_allowed(me: Pusher, fresh: Fresh) -> None:
    """The verification of the checkpoint before goes with it, and so do its other files."""
    value(me.push(fresh("older"), "me/hasty"))
    folder = fresh()
    (folder / "aoconvert.verify.json").unlink()
    done = value(me.push(folder, "me/hasty", allow_unverified=True))
    assert done["deleted"] == ["aoconvert.verify.json", "pytorch_model.bin"]
    assert "not verified" in " ".join(done["warnings"])


def test_files_that_nobody_vouches_for_stay_here(me: Pusher, fresh: Fresh) -> None:
    folder = fresh()
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden").write_text("mine")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"")
    done = value(me.push(folder, "me/notes"))
    said = [line for line in done["warnings"] if line.startswith("not sent")]
    assert said == ["not sent, because the manifest does not list them: notes.txt"]
    assert not {"notes.txt", ".hidden", "__pycache__/x.pyc"} & set(entries(me.hub, "me/notes"))


# --- whose repo it is


def test_a_dataset_of_the_same_name_is_no_obstacle(me: Pusher, fresh: Fresh) -> None:
    me.hub.state.create_repo("datasets/me/same", initial_commit=True)
    value(me.push(fresh(), "me/same"))


@pytest.mark.parametrize(("role", "says"), [("read", "is only 'read' in org"), ("contributor", None), ("write", None)])
def test_repos_of_an_organisation(me: Pusher, fresh: Fresh, role: str, says: str | None) -> None:
    me.hub.state.add_org("org", {"me": role})
    outcome = me.push(fresh(), "org/new")
    if says is None:
        value(outcome)
    else:
        assert says in problem(outcome, 5)["message"]


def test_a_hidden_repo_of_somebody_else(me: Pusher, fresh: Fresh) -> None:
    me.hub.state.create_repo("you/secret", private=True, initial_commit=True)
    assert "does not exist (or is hidden)" in problem(me.push(fresh(), "you/secret"), 5)["message"]


def test_a_token_for_some_repos(me: Pusher, fresh: Fresh) -> None:
    """What a fine-grained token may do is only known when it is tried; nothing is left behind."""
    state, folder = me.hub.state, fresh()
    state.add_user("me", "hf_some", role="fineGrained", scopes={"me/mine": ["repo.write", "repo.content.read"]})
    state.create_repo("me/mine", initial_commit=True)
    value(me.push(folder, "me/mine", token="hf_some"))
    outcome = problem(me.push(folder, "me/new", token="hf_some"), 5)
    assert "may not write there (403): You don't have the rights to create a model" in outcome["message"]
    assert state.settings("me/new") is None


def test_a_pull_request_that_is_not_there(me: Pusher, fresh: Fresh) -> None:
    me.hub.state.create_repo("me/none", initial_commit=True)
    outcome = problem(me.push(fresh(), "me/none", revision="refs/pr/7"), 5)
    assert outcome["message"] == "me/none (revision refs/pr/7): the branch, tag or pull request does not exist"
