"""The loopback Hub, asked by the unmodified client from processes of its own: what it does."""

from __future__ import annotations

import json
import re
from typing import Any

from fake_hub.asking import TOKEN, raw, run, sha256
from fake_hub.attributes import DEFAULT_GITATTRIBUTES
from fake_hub.fixtures import HubClient

# Uploads


def test_a_repo_is_made_filled_changed_and_read_back(hub_client: HubClient) -> None:
    found = run(
        hub_client,
        "url = api.create_repo('me/m', private=True)\n"
        "again = api.create_repo('me/m', exist_ok=True)\n"
        "api.auth_check('me/m', write=True)\n"
        "card = b'---\\nlicense: mit\\nlibrary_name: diffusers\\ntags: [a]\\n---\\nhi'\n"
        "files = {'README.md': card, 'd/c.json': b'{}', 'd/w.bin': b'w' * 300_000, 'empty.bin': b''}\n"
        "files['odd'] = b'\\0binary'\n"
        "first = api.create_commit('me/m', [add(*f) for f in files.items()], commit_message='one',\n"
        "                          commit_description='more')\n"
        "info = api.repo_info('me/m', files_metadata=True)\n"
        "second = api.create_commit('me/m', [add('d/c.json', b'[]'), Delete('odd')], commit_message='two')\n"
        "third = api.create_commit('me/m', [Delete('d/')], commit_message='three', parent_commit=second.oid)\n"
        "local = Path(api.snapshot_download('me/m', revision=first.oid, local_dir=work / 'down'))\n"
        "check = api.verify_repo_checksums('me/m', revision=first.oid, local_dir=local)\n"
        "result = {'url': str(url), 'again': str(again), 'commits': [first.oid, second.oid, third.oid],\n"
        "  'commit_url': first.commit_url, 'lfs': {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs},\n"
        "  'info': [info.private, info.sha, info.library_name, info.tags, info.card_data.license],\n"
        "  'log': [[c.commit_id, c.title, c.message, c.authors] for c in api.list_repo_commits('me/m')],\n"
        "  'same': {p: (local / p).read_bytes() == files[p] for p in files}, 'checked': check.checked_count,\n"
        "  'wrong': [check.mismatches, check.missing_paths, check.extra_paths]}",
    )
    endpoint = hub_client.hub.endpoint
    assert found["url"] == found["again"] == f"{endpoint}/me/m"
    first, second, third = found["commits"]
    assert found["commit_url"] == f"{endpoint}/me/m/commit/{first}"
    # binary by its content, LFS by its name; an empty file is never LFS
    assert found["lfs"] == {"d/w.bin": sha256(b"w" * 300_000), "odd": sha256(b"\0binary")}
    assert found["info"] == [True, first, "diffusers", ["diffusers", "a"], "mit"]
    titles = [[third, "three", ""], [second, "two", ""], [first, "one", "more"]]
    assert found["log"][:3] == [[*title, ["me"]] for title in titles]
    assert found["log"][3][1] == "initial commit"
    assert all(found["same"].values())
    assert (found["checked"], found["wrong"]) == (6, [[], [], []])
    state = hub_client.hub.state
    assert set(state.entries("me/m", third)) == {".gitattributes", "README.md", "empty.bin"}
    assert state.read("me/m", ".gitattributes") == DEFAULT_GITATTRIBUTES.encode()
    assert state.read("me/m", "d/w.bin", first) == b"w" * 300_000
    # the store is another origin, which gets no token
    puts = hub_client.hub.requests("", method="PUT")
    assert {(put.server, put.token) for put in puts} == {("store", None)}
    assert sorted(put.received for put in puts) == [7, 300_000]


def test_what_is_there_is_not_sent_again(hub_client: HubClient) -> None:
    found = run(
        hub_client,
        "for repo in 'me/a', 'me/b': api.create_repo(repo)\n"
        "(work / 'w.bin').write_bytes(b'w' * 100_000); (work / 'c.json').write_bytes(b'{}')\n"
        "up = lambda repo, **more: api.upload_folder(repo_id=repo, folder_path=work, **more)\n"
        "first = up('me/a')\n"
        "same = up('me/a')\n"
        "elsewhere = up('me/a', path_in_repo='x')\n"
        "other = up('me/b')\n"
        "api.create_commit('me/a', [add('README.md', b'---\\ntags: []\\n---')], commit_message='m', create_pr=True)\n"
        "slim = up('me/a', delete_patterns='*.json', allow_patterns='w.bin')\n"
        "result = [first.oid, same.oid, elsewhere.oid, len(api.list_repo_commits('me/a')),\n"
        "          sorted(api.list_repo_files('me/a'))]",
    )
    assert found[0] == found[1] != found[2]
    assert found[3:] == [4, [".gitattributes", "w.bin", "x/w.bin"]]
    # repos do not share objects: one for each
    paths = [put.path.split("/")[2:5] for put in hub_client.hub.requests("", method="PUT")]
    assert paths == [["models", "me", "a"], ["models", "me", "b"]]
    commits = hub_client.hub.requests("/me/a/commit/")
    assert [commit.query for commit in commits] == ["", "", "create_pr=1", ""]


def test_parts(hub_client: HubClient) -> None:
    content = bytes(range(256)) * 1000
    hub_client.hub.state.set_options(multipart_above=100_000, part_size=100_000)
    run(
        hub_client,
        "api.create_repo('me/m')\n"
        "(work / 'w.bin').write_bytes(bytes(range(256)) * 1000)\n"
        "api.upload_file(repo_id='me/m', path_in_repo='w.bin', path_or_fileobj=work / 'w.bin')",
    )
    assert hub_client.hub.state.read("me/m", "w.bin") == content
    sizes = [put.received for put in hub_client.hub.requests("/parts/", server="store")]
    assert sizes == [100_000, 100_000, 56_000]
    (done,) = hub_client.hub.requests("complete_multipart")
    assert (done.token, done.status) == (None, 200)
    status, answer = raw(hub_client, "POST", "/api/complete_multipart/models/me/m/guess?signature=0")
    assert (status, answer["error"]) == (403, "The address is not signed, or no longer good")


def test_ignored_files_and_cards_the_hub_refuses(hub_client: HubClient) -> None:
    found = run(
        hub_client,
        "api.create_repo('me/m')\n"
        "api.create_commit('me/m', [add('.gitignore', b'*.log\\n/tmp/'), add('a.log', b'1'), add('tmp/x', b'1'),\n"
        "                           add('b/tmp', b'1')], commit_message='m')\n"
        "def card(text):\n"
        "    with warnings.catch_warnings(record=True) as seen:\n"
        "        warnings.simplefilter('always')\n"
        "        files = [add('README.md', text.encode())]\n"
        "        outcome = tried(lambda: api.create_commit('me/m', files, commit_message='m'))\n"
        "    return outcome.get('text') if isinstance(outcome, dict) else [str(w.message) for w in seen]\n"
        "cards = ['license: gpl-42', 'base_model: a b', 'tags: a', 'a: [', 'a: 1\\na: 2', 'base_model_relation: x',\n"
        "         'widget: 1', '- 1',\n"
        "         'license: other\\nbase_model: [a/b, c]\\nbase_model_relation: quantized\\nlanguage: en']\n"
        "listed = sorted(api.list_repo_files('me/m'))\n"
        "result = [listed, [card(f'---\\n{c}\\n---\\nx') for c in cards], card('# no head')]",
    )
    assert found[0] == [".gitattributes", ".gitignore", "b/tmp"]
    refused, last = found[1][:-1], found[1][-1]
    wanted = [
        "license",
        "base_model",
        '"tags" must be',
        "YAML",
        "duplicated",
        "relation",
        "widget",
        "must be an object",
    ]
    for text, word in zip(refused, wanted, strict=True):
        assert text.startswith("Invalid metadata in README.md.\n- ") and word in text
    assert last == []
    assert len(found[2]) == 1 and "empty or missing yaml metadata" in found[2][0]


def test_commits_that_the_hub_refuses(hub_client: HubClient) -> None:
    state = hub_client.hub.state
    state.add_user("me", TOKEN)
    state.create_repo("me/m", initial_commit=True)
    tip = state.refs("me/m")["main"]
    header = {"key": "header", "value": {"summary": "s"}}

    def commit(*operations: dict[str, Any], first: dict[str, Any] = header, ref: str = "main") -> tuple[int, str]:
        body = "\n".join(json.dumps(line) for line in (first, *operations))
        status, answer = raw(hub_client, "POST", f"/api/models/me/m/commit/{ref}", body.encode())
        return status, answer.get("error", "")

    def file(path: str, content: str = "YQ==") -> dict[str, Any]:
        return {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}

    lfs = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": "ab" * 32, "size": 3}}
    for operation, word in [
        (lfs, "pointed to a file that does not exist. Offending file: w.bin"),
        (file("../x"), "Invalid path"),
        (file("a/.git/config"), "Invalid path"),
        (file("x", "not base64!"), "Invalid content"),
        (file("x", "AAAA"), "binary files"),
        (file(".gitattributes/x"), "both a file and a folder"),
        (file("README.md", "LS0tCmE6IFsKLS0tCg=="), "Invalid metadata"),
        ({"key": "copy", "value": {"path": "a"}}, "Unknown operation"),
    ]:
        status, text = commit(file("good"), operation)
        assert (status, word in text) == (400, True), (operation, text)
    assert commit(first={"key": "header", "value": {}})[0] == 400
    assert commit(file("x"), ref="nowhere")[0] == 404
    stale = {"key": "header", "value": {"summary": "s", "parentCommit": "0" * 40}}
    assert commit(file("x"), first=stale) == (412, "A commit has happened since. Please refresh and try again.")
    assert state.refs("me/m")["main"] == tip
    found = run(
        hub_client,
        "one = lambda op, **more: tried(lambda: api.create_commit('me/m', [op], commit_message='m', **more))\n"
        f"result = [one(Delete('no')), one(Delete('no/')), one(add('x', b'1'), parent_commit='{'1' * 40}'),\n"
        "          one(add('x', b'1'), revision='no')]",
    )
    kinds = [("RemoteEntryNotFoundError", 404)] * 2 + [("HfHubHTTPError", 412), ("RevisionNotFoundError", 404)]
    assert [(item["error"], item["status"]) for item in found] == kinds
    assert "is_folder=True/False" in found[0]["text"]


# Refs, listings, pull requests, collections


def test_branches_and_tags(hub_client: HubClient) -> None:
    hub_client.hub.state.create_repo("me/m", initial_commit=True)
    first = hub_client.hub.state.refs("me/m")["main"]
    found = run(
        hub_client,
        "put = lambda ref: api.upload_file(repo_id='me/m', path_in_repo='a', path_or_fileobj=b'1', revision=ref).oid\n"
        "api.create_branch('me/m', branch='feature/x'); api.create_branch('me/m', branch='feature/x', exist_ok=True)\n"
        "sha = put('feature/x')\n"
        "api.create_tag('me/m', tag='v1', revision='feature/x', tag_message='first')\n"
        "api.create_tag('me/m', tag='v1', exist_ok=True)\n"
        "api.create_branch('me/m', branch='old', revision=api.repo_info('me/m').sha)\n"
        "refs = api.list_repo_refs('me/m')\n"
        "commits = lambda found: {ref.ref: ref.target_commit for ref in found}\n"
        "result = [sha, commits(refs.branches), commits(refs.tags), [ref.name for ref in refs.branches],\n"
        "          api.repo_info('me/m', revision='v1').sha]\n"
        "api.delete_tag('me/m', tag='v1'); api.delete_branch('me/m', branch='old')\n"
        "branch = lambda name, **more: api.create_branch('me/m', branch=name, **more)\n"
        "result += [tried(call)['status'] for call in (\n"
        "  lambda: branch('feature/x'), lambda: api.delete_branch('me/m', branch='main'),\n"
        "  lambda: api.delete_branch('me/m', branch='old'), lambda: api.delete_tag('me/m', tag='v1'),\n"
        "  lambda: branch('a..b'), lambda: branch('b', revision='no'),\n"
        "  lambda: api.create_tag('me/m', tag='a b'), lambda: put('v1'))]",
    )
    sha, branches, tags, names, tagged, *statuses = found
    assert branches == {"refs/heads/main": first, "refs/heads/feature/x": sha, "refs/heads/old": first}
    assert names == ["feature/x", "main", "old"]
    assert tags == {"refs/tags/v1": sha}
    assert tagged == sha
    assert statuses == [409, 403, 404, 404, 400, 404, 400, 404]
    assert set(hub_client.hub.state.all_refs("me/m")) == {"refs/heads/main", "refs/heads/feature/x"}


def test_listings_come_in_pages(hub_client: HubClient) -> None:
    state = hub_client.hub.state
    state.create_repo("me/m")
    for number in range(3):
        state.commit("me/m", {f"d{number}/{name}": b"%d" % number for name in "ab"}, title=f"number {number}")
    state.set_options(page_size=2)
    found = run(
        hub_client,
        "tree = lambda *a, **k: [f.path for f in api.list_repo_tree('me/m', *a, **k)]\n"
        "info = api.get_paths_info('me/m', ['d0', 'd2/a', 'no'], expand=True)\n"
        "result = [tree(), tree('d1'), tree(recursive=True), [c.title for c in api.list_repo_commits('me/m')],\n"
        "          [[i.path, type(i).__name__, i.last_commit.title] for i in info],\n"
        "          tried(lambda: tree('no'))['error'], len(list(api.list_repo_files('me/m')))]",
    )
    folders = ["d0", "d1", "d2"]
    everything = [path for folder in folders for path in (folder, f"{folder}/a", f"{folder}/b")]
    assert found[:3] == [folders, ["d1/a", "d1/b"], everything]
    assert found[3] == ["number 2", "number 1", "number 0"]
    assert found[4] == [["d0", "RepoFolder", "number 0"], ["d2/a", "RepoFile", "number 2"]]
    assert found[5:] == ["RemoteEntryNotFoundError", 6]
    pages = [entry.query for entry in hub_client.hub.requests("/tree/main$") if "recursive=true" in entry.query]
    assert [re.sub(".*cursor=", "", query) for query in pages[1:5]] == ["2", "4", "6", "8"]


def test_pull_requests(hub_client: HubClient) -> None:
    state = hub_client.hub.state
    state.add_user("you", "hf_you")
    state.create_repo("me/m", initial_commit=True)
    found = run(
        hub_client,
        "you = HfApi(token='hf_you')\n"
        "one = you.create_commit('me/m', [add('a.txt', b'1\\n')], commit_message='One', create_pr=True)\n"
        "two = you.create_pull_request('me/m', title='Second', description='why')\n"
        "you.create_commit('me/m', [add('a.txt', b'2\\n')], commit_message='change', revision=two.git_reference)\n"
        "stranger = tried(lambda: HfApi(token='hf_reads').create_commit('me/m', [add('a', b'')], commit_message='m',\n"
        "                                                             revision=two.git_reference))\n"
        "talk = api.create_discussion('me/m', title='Only talk')\n"
        "api.comment_discussion('me/m', 1, 'good')\n"
        "before = api.get_discussion_details('me/m', 1)\n"
        "api.merge_pull_request('me/m', 1)\n"
        "after, other = (api.get_discussion_details('me/m', n) for n in (1, 2))\n"
        "conflict = tried(lambda: api.merge_pull_request('me/m', 2))\n"
        "api.change_discussion_status('me/m', 2, 'closed')\n"
        "result = [one.pr_url, one.pr_revision, two.status, two.git_reference, stranger['status'], before.diff,\n"
        "  [e.type for e in before.events], before.status, after.status, other.conflicting_files, conflict['status'],\n"
        "  [[d.num, d.status, d.author, d.is_pull_request] for d in api.get_repo_discussions('me/m')],\n"
        "  [d.num for d in api.get_repo_discussions('me/m', discussion_status='open')],\n"
        "  after.merge_commit_oid, api.repo_info('me/m').sha,\n"
        "  [r.ref for r in api.list_repo_refs('me/m', include_pull_requests=True).pull_requests]]",
    )
    assert found[0] == f"{hub_client.hub.endpoint}/me/m/discussions/1"
    assert found[1:5] == ["refs/pr/1", "draft", "refs/pr/2", 401]
    assert found[5].splitlines()[0] == "diff --git a/a.txt b/a.txt" and found[5].endswith("+1")
    assert found[6:11] == [["comment", "commit", "comment"], "open", "merged", ["a.txt"], 409]
    assert found[11] == [[3, "open", "me", False], [2, "closed", "you", True], [1, "merged", "you", True]]
    assert found[12] == [3]
    assert found[13] == found[14]
    assert found[15] == ["refs/pr/1", "refs/pr/2"]
    assert state.read("me/m", "a.txt") == b"1\n"
    assert state.read("me/m", "a.txt", "refs/pr/2") == b"2\n"


def test_collections(hub_client: HubClient) -> None:
    state = hub_client.hub.state
    state.add_user("you", "hf_you")
    state.create_repo("me/m", initial_commit=True)
    found = run(
        hub_client,
        "made = api.create_collection('My Models', description='all', private=True)\n"
        "again = api.create_collection('My Models', exists_ok=True)\n"
        "add_item = lambda a=api, item='me/m', **more: a.add_collection_item(made.slug, item, 'model', **more)\n"
        "filled = add_item(note='good')\n"
        "calls = [add_item, lambda: add_item(item='me/no'), lambda: add_item(HfApi(token='hf_you')),\n"
        "         lambda: api.get_collection('me/no-0'), lambda: api.create_collection('x', namespace='you')]\n"
        "result = [made.slug, again.slug, [[i.item_id, i.item_type, i.note] for i in filled.items],\n"
        "          [tried(call)['status'] for call in calls], len(add_item(exists_ok=True).items)]\n"
        "api.update_collection_metadata(made.slug, title='Other', private=False)\n"
        "api.delete_collection_item(made.slug, filled.items[0].item_object_id)\n"
        "seen = HfApi(token='hf_you').get_collection(made.slug)\n"
        "result += [seen.title, len(seen.items), [c.slug for c in api.list_collections(owner='me')]]\n"
        "api.delete_collection(made.slug)\n"
        "result.append(list(api.list_collections()))",
    )
    slug = found[0]
    assert re.fullmatch("me/my-models-[0-9a-f]{24}", slug)
    assert found[1:] == [slug, [["me/m", "model", "good"]], [409, 404, 404, 404, 403], 1, "Other", 0, [slug], []]


# Xet


def test_xet(hub_client: HubClient) -> None:
    content = bytes(range(256)) * 2000
    state = hub_client.hub.state
    state.create_repo("me/m", initial_commit=True)
    push = (
        "(work / 'w.bin').write_bytes(bytes(range(256)) * 2000)\n"
        "up = lambda **more: tried(lambda: api.upload_folder(repo_id='me/m', folder_path=work, **more).oid)\n"
    )
    on = {"HF_HUB_DISABLE_XET": "0"}
    refused = run(hub_client, push + "result = up()", env=on)
    assert refused["error"] == "ConnectionError"
    state.xet = True
    look = (
        "file, = api.get_paths_info('me/m', 'w.bin')\n"
        "result = [up() if file is None else None, file.xet_hash,\n"
        "          Path(api.hf_hub_download('me/m', 'w.bin')).read_bytes() == bytes(range(256)) * 2000]"
    )
    found = run(hub_client, push + "up(); proposed = up(path_in_repo='x', create_pr=True)\n" + look, env=on)
    assert re.fullmatch("[0-9a-f]{64}", found[1]) and found[2]
    hub = hub_client.hub
    assert not hub.requests("", server="store") and not hub.requests("objects/batch")
    assert hub.requests("xorbs", server="cas") and hub.requests("xet-read-token")
    assert "/api/models/me/m/commit/refs/pr/1" in {entry.path for entry in hub.requests("/commit/")}
    # a client without Xet gets the same file from the store, and need not send it again
    assert not state.blob(sha256(content)).exists()
    assert run(hub_client, push + look, env={"HF_HOME": str(hub_client.home / "other")})[2]
    assert [entry.body_bytes for entry in hub.requests("/lfs/", server="store")] == [len(content)]
    run(hub_client, push + "api.delete_file('w.bin', 'me/m'); result = up()")
    assert not hub.requests("", method="PUT")
    assert raw(hub_client, "GET", "/api/models/me/m/xet-write-token/main", token="hf_no")[0] == 401
