"""What a push refuses before it asks the network, and what it never sends."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pushing import TOKEN, Pusher

from aoconvert.errors import AoconvertError, HubError, PlanError, UsageError
from aoconvert.hub import contents
from aoconvert.hub.access import ref_problem
from aoconvert.hub.push import push
from aoconvert.hub.secrets import secrets_in
from aoconvert.hub.types import PushOptions
from aoconvert.hub.upload_progress import FileWatch
from aoconvert.progress import Silent

Fresh = Callable[..., Path]


def refused(folder: Path, repo_id: str = "me/x", **options: Any) -> PlanError:
    """The refusal; the endpoint of these tests is nowhere, so the network was not asked."""
    with pytest.raises(PlanError) as found:
        push(folder, repo_id, PushOptions(token=TOKEN, **options), Silent())
    assert found.value.exit_code == 3
    assert TOKEN not in str(found.value)
    return found.value


def test_every_problem_is_listed_at_once(fresh: Fresh) -> None:
    folder = fresh()
    (folder / "aoconvert.verify.json").unlink()
    (folder / "generation_config.json").unlink()
    with (folder / "pytorch_model-00001-of-00002.bin").open("ab") as file:
        file.write(b"x")
    (folder / "model.safetensors").write_bytes(b"")
    error = refused(folder, "me/x/y", revision="a..b", tag="a b", commit_message="hf_" + "a" * 34)
    for part in (
        "'me/x/y' is not a name for a repo",
        "--revision 'a..b' is not a name for a branch",
        "--tag 'a b' is not a name for a tag",
        "generation_config.json is missing",
        "pytorch_model-00001-of-00002.bin has ",
        "not verified: there is no aoconvert.verify.json",
        "model.safetensors would be loaded in place of",
        "the commit message holds a Hugging Face token",
    ):
        assert sum(part in line for line in error.problems) == 1, (part, error.problems)
    assert len(error.problems) == 8
    assert "--allow-unverified" in (error.hint or "")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"ok": False, "checks": [{"name": "load", "status": "failed", "detail": "", "seconds": 0}]},
            "the verification failed: load",
        ),
        ({"manifest_sha256": "0" * 64}, "belongs to another aoconvert.json"),
        ({"manifest_sha256": None}, "belongs to another aoconvert.json"),
    ],
)
def test_a_verification_must_have_passed_and_belong_here(fresh: Fresh, change: dict[str, Any], says: str) -> None:
    folder = fresh()
    report = folder / "aoconvert.verify.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), **change}))
    assert [says in line for line in refused(folder).problems] == [True]


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_verification_that_is_none(fresh: Fresh, text: str) -> None:
    folder = fresh()
    (folder / "aoconvert.verify.json").write_text(text, encoding="latin-1")
    assert refused(folder).problems[0].startswith("not verified:")


def test_files_that_were_written_after_the_verification(me: Pusher, fresh: Fresh) -> None:
    folder = fresh()
    os.utime(folder / "config.json", (time.time() + 5,) * 2)
    assert "modified after the verification: config.json" in refused(folder).problems[0]
    assert "value" in me.push(folder, "me/x", rehash=True)  # the contents are what they were
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes().replace(b"opt", b"0pt"))
    assert "SHA-256 differs" in refused(folder, rehash=True).problems[0]


def test_a_link_out_of_the_folder(fresh: Fresh, tmp_path: Path) -> None:
    folder = fresh()
    (folder / "config.json").rename(tmp_path / "elsewhere.json")
    (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
    assert "config.json is a link that leaves the folder" in refused(folder).problems[0]


def test_a_card_by_hand_must_be_readable_and_is_not_changed(fresh: Fresh) -> None:
    folder = fresh()
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "the front matter of README.md cannot be read" in refused(folder).problems[0]
    (folder / "README.md").write_text(f"# mine\n\nlogin with {TOKEN}\n")
    assert refused(folder).problems == ("README.md line 3 holds the Hub token in use",)
    error = refused(folder, license="mit", metadata={"tags": ["a"]})
    assert "--license and --set-metadata would be lost" in error.problems[0]
    (folder / "README.md").write_bytes(b"\xff\xfe")
    assert refused(folder).problems == ("README.md is not UTF-8",)


def test_a_file_over_the_limit_of_the_hub(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "FILE_LIMIT", 20_000)
    assert "pytorch_model-00001-of-00002.bin" in refused(fresh()).problems[0]
    assert "--max-shard-size" in refused(fresh()).problems[0]


@pytest.mark.parametrize(
    "options",
    [
        {"create_pr": True, "revision": "dev"},
        {"create_pr": True, "tag": "v1"},
        {"revision": "refs/pr/3", "tag": "v1"},
        {"metadata": {"license_typo": "x"}, "dry_run": True, "token": None},
    ],
)
def test_options_that_exclude_each_other(fresh: Fresh, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        push(fresh(), "me/x", PushOptions(**{"token": TOKEN, **options}), Silent())


@pytest.mark.parametrize("name", [".", "nowhere", "file"])
def test_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AoconvertError) as found:
        push(tmp_path / name, "me/x", PushOptions(), Silent())
    assert found.value.exit_code == 3


@pytest.mark.parametrize("token", ["hf_a\nb", "hf a", "hf_é"])
def test_a_token_that_is_none(tmp_path: Path, token: str) -> None:
    with pytest.raises(HubError, match="characters that no token can have") as found:
        push(tmp_path, "me/x", PushOptions(token=token), Silent())
    assert token not in str(found.value)


# --- secrets

SECRETS = {
    "a Hugging Face token": "hf_" + "aB3" * 12,
    "a GitHub token": "ghp_" + "aB3" * 12,
    "an OpenAI key": "sk-proj-" + "a_B-" * 10 + "T3BlbkFJ" + "aB" * 10,
    "an AWS access key": "AKIA" + "IOSFODNN7EXAMPLE"[:16].replace("8", "7"),
    "a private key": "-----BEGIN RSA PRIVATE KEY-----",
    "the Hub token in use": "my-own-token",
}


@pytest.mark.parametrize("kind", SECRETS)
@given(before=st.integers(0, 50), newline=st.sampled_from(["\n", "\r\n"]), quote=st.sampled_from(['"', "'", " ", "="]))
def test_a_secret_is_found_on_its_line(kind: str, before: int, newline: str, quote: str) -> None:
    text = newline * before + f"key {quote}{SECRETS[kind]}{quote}{newline}more"
    assert secrets_in(text.encode(), "my-own-token") == [(before + 1, kind)]


@pytest.mark.parametrize(
    "text",
    ["hf_hub_download(repo_id, filename)", "sk-learn", "hf_" + "a" * 10, "ghp_short", "AKIAIMSHORT", "PRIVATE KEY"],
)
def test_what_only_looks_like_a_secret(text: str) -> None:
    assert secrets_in(text.encode(), None) == []


def test_secrets_in_files_that_are_sent(fresh: Fresh) -> None:
    """The manifest vouches for this file, so nothing else is wrong with the folder."""
    folder = fresh()
    path = folder / "generation_config.json"
    report = folder / "aoconvert.verify.json"
    manifest = folder / "aoconvert.json"
    old = path.read_bytes()
    new = old.replace(b"{", b'{\n "key": "%s",' % SECRETS["a GitHub token"].encode(), 1)
    path.write_bytes(new)
    from hashlib import sha256

    from aoconvert.checkpoint import manifest as manifests

    values = json.loads(manifest.read_text())
    [entry] = [entry for entry in values["copied"] if entry["path"] == path.name]
    entry |= {"size": len(new), "sha256": sha256(new).hexdigest()}
    manifest.write_text(manifests.dump(manifests.Manifest.model_validate(values)))
    digest = sha256(manifest.read_bytes()).hexdigest()
    report.write_text(json.dumps({**json.loads(report.read_text()), "manifest_sha256": digest}))
    assert refused(folder).problems == ("generation_config.json line 2 holds a GitHub token",)


# --- names, and the report


@given(st.text(max_size=20))
def test_no_name_of_a_branch_breaks_the_check(name: str) -> None:
    for option in ("--revision", "--tag"):
        assert all("\n" not in line and option in line for line in ref_problem(option, name))


@pytest.mark.parametrize("name", ["main", "int8/dev", "v1.0", "a-b_c"])
def test_names_of_branches(name: str) -> None:
    assert ref_problem("--revision", name) == ref_problem("--tag", name) == []
    assert ref_problem("--revision", "refs/pr/12") == []
    assert ref_problem("--tag", "refs/pr/12") != []


def test_the_published_report_names_no_place_of_this_machine(tmp_path: Path) -> None:
    report = {"path": str(tmp_path), "checks": [{"detail": f"{tmp_path}/a and {Path.home()}/b"}], "ok": True, "n": 1}
    sent = contents.public_report(report, tmp_path, "me/x")
    assert str(tmp_path).encode() not in sent
    assert f"{Path.home()}/".encode() not in sent
    assert json.loads(sent) == {"path": "me/x", "checks": [{"detail": "./a and ~/b"}], "ok": True, "n": 1}


# --- the progress bar


def test_reading_is_seen_from_outside(tmp_path: Path) -> None:
    place = tmp_path / "weights"
    place.write_bytes(bytes(1000))
    seen: list[int] = []
    with FileWatch({place: 1000}, lambda count, _: seen.append(count)), place.open("rb", buffering=0) as file:
        for size in (300, 200):
            file.read(size)
            time.sleep(0.5)
        file.seek(0)  # a retry: what was sent already does not count again
        file.read(400)
        time.sleep(0.5)
    assert seen == [300, 200, 500]


def test_after_a_failure_nothing_more_is_reported(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(10))
    seen: list[int] = []
    with pytest.raises(ValueError), FileWatch({tmp_path / "weights": 10}, lambda count, _: seen.append(count)):
        raise ValueError
    assert seen == []
