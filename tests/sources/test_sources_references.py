import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoconvert.errors import SourceError
from aoconvert.sources import resolve
from aoconvert.sources.references import parse_repo


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("THUDM/CogVideoX-5b", ("THUDM/CogVideoX-5b", None)),
        ("gpt2", ("gpt2", None)),
        ("user/repo@v1.0", ("user/repo", "v1.0")),
        ("user/repo@refs/pr/3", ("user/repo", "refs/pr/3")),
        ("hf://user/repo", ("user/repo", None)),
        ("hf://user/repo@dev", ("user/repo", "dev")),
        ("hf://models/user/repo", ("user/repo", None)),
        ("https://huggingface.co/user/repo", ("user/repo", None)),
        ("https://huggingface.co/user/repo/tree/dev", ("user/repo", "dev")),
        ("https://huggingface.co/user/repo/tree/refs%2Fpr%2F1", ("user/repo", "refs/pr/1")),
    ],
)
def test_repo(reference: str, expected: tuple[str, str | None]) -> None:
    assert parse_repo(reference) == expected


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("/no/such", "no such folder: '/no/such'"),
        ("./no", "no such folder"),
        ("../no", "no such folder"),
        ("~/no", "no such folder"),
        ("~nobody", "no such folder"),
        ("models\\mine", "no such folder"),
        ("C:\\models", "no such folder"),
        ("a/b/c", "no such folder: 'a/b/c'"),
        ("/no/such@v1", "no such folder"),
        ("", "neither a folder nor a model"),
        ("a b", "neither a folder nor a model"),
        ("user/repo@", "neither a folder nor a model"),
        ("user/repo.git", "neither a folder nor a model"),
        ("a\nb", r"'a\\nb' is neither a folder"),
        ("x" * 5000, "neither a folder"),
        ("a\0b", "neither a folder"),
        ("hf://datasets/user/repo", "is a dataset, not a model"),
        ("hf://user/repo/transformer", "names a file or folder in a repo"),
        ("https://huggingface.co/user/repo/blob/main/x.json", "names a file or folder in a repo"),
        ("https://example.org/user/repo", "is not the address of a model on the Hub"),
        ("https://huggingface.co/", "is not the address of a model on the Hub"),
        ("https://[oops/user/repo", "is not the address of a model on the Hub"),
        ("s3://bucket/key", "is not the address of a model on the Hub"),
    ],
)
def test_not_a_model(reference: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        resolve(reference)
    assert len(caught.value.message) < 300
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 3


def test_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(SourceError) as caught:
        resolve("https://user:hf_sEcReT@huggingface.co/user/repo")
    assert "hf_sEcReT" not in f"{caught.value.message} {caught.value.hint}"
    assert "must not contain a user name or password" in caught.value.message


@given(st.text(max_size=30) | st.from_regex(r"(hf://|https://huggingface.co/)?[\w.@/%:\\~-]{0,20}", fullmatch=True))
def test_any_text_is_a_repo_or_a_source_error(reference: str) -> None:
    try:
        repo_id, revision = parse_repo(reference)
    except SourceError as error:
        assert error.message
        assert "\n" not in error.message
    else:
        assert 1 <= repo_id.count("/") + 1 <= 2
        assert revision is None or revision


def test_no_heavy_imports() -> None:
    """Importing the package, and resolving a folder, needs neither the Hub client nor torch."""
    code = (
        "import sys, aoconvert.sources as s; s.resolve('.').files();"
        "print(sorted({'huggingface_hub', 'torch', 'transformers', 'diffusers', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
