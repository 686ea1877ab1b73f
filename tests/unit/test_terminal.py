"""What is shown or kept of URLs."""

import pytest

from protoclip.terminal import counted, visible, without_secrets


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://me:word@host/{0..9}.tar?token=abc", "https://***@host/{0..9}.tar?***"),
        ("https://host/a.png?sig=a%2Fb+c==: no such file", "https://host/a.png?***: no such file"),
        ("sample 'a' (https://host/a.png?x=1): cut", "sample 'a' (https://host/a.png?***): cut"),
        ("https://host/a?b=1,id_column=c", "https://host/a?***,id_column=c"),
        ("wds:https://me@host/a?b=1,class_column=c", "wds:https://***@host/a?***,class_column=c"),
        (
            "curl -s 'https://me:a@b@host/a.tar?c=1' x",
            "curl -s 'https://***@host/a.tar?***' x",
        ),
        ("s3://KEY:WO/RD@bucket/a.tar", "s3://***@bucket/a.tar"),
        ("https://me:w?rd@host/a.tar", "https://***@host/a.tar"),
        ("https://[::1]:80/a#token=b", "https://[::1]:80/a?***"),
        (
            'train = "https://a/b?c"\nroot = "https://d@e/f"',
            'train = "https://a/b?***"\nroot = "https://***@e/f"',
        ),
        # Nothing is secret here.
        ("https://host:8080/a@main/b.tar", "https://host:8080/a@main/b.tar"),
        ("hf://datasets/me/pairs@main/a.parquet", "hf://datasets/me/pairs@main/a.parquet"),
        ("why? me@home", "why? me@home"),
    ],
)
def test_urls_lose_user_password_and_query(text: str, kept: str) -> None:
    assert without_secrets(text) == kept
    assert without_secrets(kept) == kept
    assert "\n" in text or visible(text) == kept


@pytest.mark.parametrize(("number", "text"), [(1, "1 pair"), (0, "0 pairs"), (2000, "2,000 pairs")])
def test_a_noun_agrees_with_its_number(number, text):
    assert counted(number, "pair") == text
