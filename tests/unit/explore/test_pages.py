"""Pages, the server that guards them, and the files that hold them."""

import html
import http.client
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from worded import HOSTILE, explorers

from packed import read_script
from protoclip.cli.explore import listen
from protoclip.config import DataConfig
from protoclip.explore.explorer import Explorer
from protoclip.explore.pages import Pages, format_ids
from protoclip.explore.serve import (
    MAX_BODY_BYTES,
    cookie_name,
    make_server,
    write_static,
    write_table,
)
from protoclip.results.table import shorten
from testing import save_to_bytes

TOKEN = "the-token"


@pytest.fixture(scope="module")
def served(two: list[Explorer]) -> Iterator[tuple[Any, int]]:
    """A server of both models, and its port."""
    listening = listen("127.0.0.1", 0)
    serving = make_server(Pages(two), host="127.0.0.1", token=TOKEN)
    thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
    thread.start()
    yield serving, listening.getsockname()[1]
    serving.should_exit = True
    thread.join()


@pytest.fixture
def port(served: tuple[Any, int]) -> int:
    return served[1]


def ask(
    port: int, path: str, *, method: str = "GET", body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A request that brings the token; header names have `_` for `-`."""
    given = {"Cookie": f"{cookie_name(TOKEN)}={TOKEN}"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, body, {name: value for name, value in given.items() if value})
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return found


MARKUP = ("<script", "<img src=x", "<h1>no", "<b>id", "<i>pairs", "\u202e", "\u2066", "\x1b")


def test_links_of_every_page_lead_to_pages_without_elements_of_others(port: int) -> None:
    """Captions, ids and questions are text, no page is long for a long caption, and each answer has
    its headers."""
    question = "/1/search.html?text=%22%27%3E%3Cscript%3Ealert(1)%3C/script%3E"
    seen, ahead = set[str](), ["/", "/images/large-3.webp", question]
    while ahead:
        path = ahead.pop()
        if path in seen or len(seen) > 400:
            continue
        seen.add(path)
        status, headers, body = ask(port, path)
        assert (status, headers["x-content-type-options"]) == (200, "nosniff"), path
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 's")
        # The next server shows other images at the same addresses, and sets another cookie.
        assert headers.get("vary") == "Cookie" or "max-age" not in headers.get("cache-control", "")
        if "text/html" not in headers["content-type"]:
            continue
        text = body.decode()
        own = re.sub(r'<script src="\.\./assets/[\w.]+" defer></script>', "", text)
        own = own.replace('<script type="application/json" id="map-data">', "")
        own = re.sub(r'data-id="[^"<>]*"', "", own)  # exact, for the selection; nobody sees it
        assert not [markup for markup in MARKUP if markup in own], path
        assert len(text) < 300_000
        for link in re.findall(r'(?:href|src|data-source)="([^"]+)"', text):
            if not link.startswith(("data:", "#")):
                target = urljoin(f"http://host{path}", html.unescape(link))
                ahead.append(target.removeprefix("http://host"))
    assert len(seen) > 60


@pytest.mark.parametrize(
    ("path", "other"),
    [
        ("/1/odd-loss.html?page=1", "../2/odd-loss.html"),
        ("/1/pair-5.html", "../2/pair-5.html"),
        ("/1/search.html?text=%22red%22+%26+%ff", "../2/search.html?text=%22red%22+%26+%EF%BF%BD"),
        ("/1/prototype-image-0.html", "../2/index.html"),  # its prototypes are others
    ],
)
def test_the_other_model_is_shown_on_the_same_page(path: str, other: str, port: int) -> None:
    assert f'<a href="{other}">show words-' in ask(port, path)[2].decode()


def test_the_first_page_says_how_healthy_the_data_are(two: list[Explorer]) -> None:
    """Each number leads to the page that lists what it counts."""
    atlas = replace(
        two[0].atlas,
        duplicates=np.array([[0, 1], [2, 3], [4, 5], [6, 7]]),
        duplicate_likeness=np.array([1, 0.96, 0.9, -0.99]),
        loss=np.where(np.arange(60) < 3, two[0].atlas.chance + 0.1, 0),
        prototype={**two[0].atlas.prototype, "image": np.minimum(np.arange(60) // 20, 5)},
    )
    site = Pages([replace(two[0], atlas=atlas)]).sites[0]
    health = re.search('<p id="health">(.*?)</p>', site.index(), re.DOTALL)
    assert health
    shown = re.sub("<[^>]*>", "", health[1])
    findings = "1 exact copy, 1 near-duplicate, 3 captions fit no better than chance"
    assert shown.startswith(f"{findings}; 2 of 6")
    links = ["duplicates.html?least=1", "duplicates.html", "odd-loss.html", "prototypes-image.html"]
    assert re.findall('href="(.*?)"', health[1]) == links
    assert "3 captions fit their image no better than one drawn by chance" in site.odd("loss")


def test_copies_saved_again_and_mirrored_images_are_told_apart(tmp_path: Path) -> None:
    """One that is mirrored may mean something else, so no button selects it."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((64, 64))
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    rows = []
    for name, shown, settings in (
        ("first", image, {"kind": "PNG"}),
        ("copy", image, {"kind": "WEBP", "lossless": True}),
        ("small", image.resize((48, 48)), {"kind": "JPEG", "quality": 60}),
        ("mirrored", mirrored, {"kind": "PNG"}),
    ):
        encoded = save_to_bytes(shown, **settings)
        rows.append({"sample_id": name, "image": encoded, "caption": "a thing"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    (explorer,) = explorers(DataConfig(train=str(tmp_path / "pairs.parquet")), cache=False)
    likeness = [explorer.pairs.correlate_images(0, other) for other in range(4)]
    assert likeness[:2] == [1, 1]
    assert 0.99 <= likeness[2] < 1
    assert likeness[3] < -0.99
    atlas = replace(
        explorer.atlas,
        duplicates=np.array([[0, 1], [0, 2], [0, 3]]),
        duplicate_likeness=np.array(likeness[1:]),
    )
    page = Pages([replace(explorer, atlas=atlas)]).sites[0].duplicates()
    headings = ["Exact copies", "Saved again: resized or recompressed", "Mirrored"]
    assert re.findall("<h2>(.*?)</h2>", page) == headings
    again = re.findall(r'class="card again".*?data-id="(\w+)"', page, re.DOTALL)
    assert again == ["copy", "small"]


def test_prototypes_are_sorted_over_all_pages(
    two: list[Explorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protoclip.explore.pages.PAGE_SIZE", 4)
    site = Pages(two).sites[0]
    for by, measure, sign in (("-tightness", "tightness", 1), ("size", "size", -1)):
        pages = [site.prototype_list("image", by, page) for page in (1, 2)]
        shown = [re.findall('="rowheader" data-value="(.*?)"', page) for page in pages]
        assert [len(numbers) for numbers in shown] == [4, 2]
        values = [
            getattr(site.prototypes["image"][int(number)], measure) for number in chain(*shown)
        ]
        assert values == sorted(values, key=lambda value: sign * value)
        assert f'href="?by={by}&amp;page=2"' in pages[0]


def test_a_paragraph_says_what_two_models_group_differently(two: list[Explorer]) -> None:
    """How many moved, from where to where by name, and the words of what moved."""

    def paragraph(pages: Pages) -> str:
        page = pages.sites[0].movement_page("image")
        (text,) = re.findall(r'<p id="difference">(.*?)</p>', page, re.DOTALL)
        return " ".join(re.sub("<[^>]*>", "", text).split())

    pages = Pages(two)
    moved, share_by_seed, words = pages.movements["image"]
    number, share = len(moved.pairs), 100 * len(moved.pairs) / moved.common
    count, one, other = moved.flows[0].tolist()
    names = pages.sites[0].name("image", one), pages.sites[1].name("image", other)
    for sentence in (
        f"words-1 and words-2 group the images of {number} of 60 pairs ({share:.1f}%) diff",
        f"{count} from {one}: {names[0]} to {other}: {names[1]}",
        f"Another seed of K-means alone moves {100 * share_by_seed:.1f}% in the first model.",
        f"more often than others: {words}.",
    ):
        assert sentence in paragraph(pages)
    assert words
    assert "group the images of all 60 pairs alike." in paragraph(Pages([two[0], two[0]]))


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *(("/3/index.html", 404), ("/1/pair-60.html", 404), ("/1/pair--1.html", 404)),
        *(("/1/prototype-image-999.html", 404), ("/1/prototypes-other.html", 404)),
        *(("/images/60.webp", 404), ("/images/-1.webp", 404), ("/images/huge-1.webp", 404)),
        *(("/1/odd-x.html", 404), ("/1/ids-image-0.exe", 404), ("/1/odd-loss.html?page=0", 404)),
        *(("/1/odd-loss.html?page=" + "9" * 5000, 404), ("/1/odd-loss.html?page=%D9%A1", 404)),
        *(("/images/" + "9" * 5000 + ".webp", 414), ("/assets/..%2f..%2fexplorer.py", 404)),
        *(("/../../../../etc/passwd", 404), ("/%2e%2e/%2e%2e/etc/passwd", 404)),
        *(("//etc/passwd", 404), ("/1/search.html", 200), ("/1/search.html?text=%ff", 200)),
        *(("/1/search.html?text=" + "a" * 50_000, 200), ("/1/odd-loss.html?page=999999", 200)),
        *(("/1/prototypes-image.html?by=x", 404), ("/1/prototypes-image.html?by=-number", 200)),
    ],
)
def test_odd_requests_end_well(path: str, status: int, port: int) -> None:
    found, _, body = ask(port, path)
    assert found == status
    assert b"root:" not in body
    assert b"Traceback" not in body


def test_a_page_after_the_last_one_is_the_last_one(port: int) -> None:
    body = ask(port, "/1/odd-loss.html?page=999999")[2].decode()
    assert 'class="card"' in body


def test_without_the_token_nothing_is_served(port: int) -> None:
    for path in ("/", "/1/index.html", "/images/3.webp", "/assets/explore.js", "/?token=other"):
        status, _, body = ask(port, path, Cookie="")
        assert status == 403
        assert body == b"Open the address that protoclip explore printed."
    assert ask(port, "/", Cookie=f"{cookie_name(TOKEN)}=other")[0] == 403


# A path that begins with two slashes would be an address of another host.
@pytest.mark.parametrize("path", ["/?token=T", "//evil.example/?token=T"])
def test_a_link_with_a_token_leads_to_the_first_page_on_this_host(path: str, port: int) -> None:
    status, headers, _ = ask(port, path.replace("=T", f"={TOKEN}"), Cookie="")
    assert (status, headers["location"]) == (303, "/")
    assert "HttpOnly" in headers["set-cookie"]
    assert "SameSite=lax" in headers["set-cookie"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1:8000.evil.example"}, 421),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 200),
        ({"Sec_Fetch_Site": "same-origin", "Sec_Fetch_Mode": "cors"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "cors"}, 403),
    ],
)
def test_foreign_hosts_and_sites_are_refused(
    headers: dict[str, str], status: int, port: int
) -> None:
    given = {name: value.format(port=port) for name, value in headers.items()}
    assert ask(port, "/1/index.html", **given)[0] == status
    if "Origin" in headers or "Sec_Fetch_Site" in headers:
        answered = ask(port, "/1/search-image", method="POST", body=b"x", **given)[0]
        assert answered == (200 if status == 200 and "navigate" not in given.values() else 403)


def test_search_by_image_has_limits(port: int, two: list[Explorer]) -> None:
    encoded = two[0].pairs.read_encoded(10)

    def post(body: Any = None, **headers: str) -> tuple[int, str]:
        status, _, found = ask(port, "/1/search-image", method="POST", body=body, **headers)
        return status, found.decode()

    status, text = post(encoded)
    assert status == 200
    assert two[0].pairs.caption(10) in text
    assert "Nearest to your image by the model" in text
    assert "?text=" not in text  # a link to another model would search for words
    status, text = post(b"<script>")
    assert status == 200
    assert "No search: not an image (not one of JPEG, PNG" in text
    assert ask(port, "/1/search-image", method="GET")[0] == 405
    assert post(encoded, Origin="http://evil.example")[0] == 403
    # What is too large is read and dropped, or its client would read no answer.
    assert post(bytes(MAX_BODY_BYTES + 1)) == (413, "an image may have at most 20,000,000 bytes")
    assert post(bytes(1_000_000) for _ in range(MAX_BODY_BYTES // 1_000_000 + 2))[0] == 413
    # Nor is an image decoded that would take gigabytes of memory.
    large = save_to_bytes(Image.new("1", (13_000, 13_000)))
    assert "13000 x 13000 pixels are more than" in post(large)[1]


def test_ids_are_files_that_training_reads(tmp_path: Path) -> None:
    from protoclip.data.split import read_ids

    ids = ['a,"b"', "=1+1", "c\nd", "\u202ee", " f "]
    for form in ("csv", "json"):
        path = tmp_path / f"ids.{form}"
        path.write_text(format_ids(ids, form), encoding="utf-8")
        assert read_ids("only", str(path)) == set(ids)


def test_pages_as_files(two: list[Explorer], tmp_path: Path) -> None:
    """All links lead to files, those of prototypes to what is packed into one, and nothing asks for
    the model."""
    number = write_static(two, tmp_path / "out")
    pages = {page: page.read_bytes() for page in (tmp_path / "out").rglob("*.html")}
    packed = {
        one: read_script(one.read_bytes())[1] for one in (tmp_path / "out").rglob("proto*.js")
    }
    for script, files in packed.items():
        pages |= {script.parent / name: content for name, content in files.items()}
    assert sum(page.suffix == ".html" for page in pages) == number
    for page, content in pages.items():
        if page.suffix != ".html":
            continue
        text = content.decode()
        assert "search.html" not in text
        assert "pair-" not in text
        for link in re.findall(r' (?:href|src|data-source)="([^"]+)"', text):
            there, _, inside = link.partition("#")
            if there and not there.startswith(("data:", "?")):
                file = (page.parent / there.partition("?")[0]).resolve()
                assert file.exists() or file in pages, (page, link)
                if inside:
                    assert inside in packed[file.parent / "prototypes.js"], (page, link)
    index = (tmp_path / "out" / "1" / "index.html").read_text(encoding="utf-8")
    held = re.search(r'<script type="application/json" id="map-data">([^<]*)</script>', index)
    assert held
    assert len(json.loads(held[1])["ids"]) == 60
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(OSError, match="not empty"):
        write_static(two, tmp_path / "out")


def test_a_model_is_called_by_the_last_part_of_its_path(
    two: list[Explorer], tmp_path: Path
) -> None:
    """The whole path is in a tooltip; a checkpoint has its run before it."""
    run, other = tmp_path / "a" / "mine-0", tmp_path / "b" / "mine-0"
    checkpoint = run / "checkpoints" / "step-3"
    for folder in (checkpoint, other):
        folder.mkdir(parents=True)
    (run / "config.toml").touch()

    def names(*paths: Path) -> list[str]:
        return Pages([replace(two[0], name=str(path)) for path in paths]).model_names

    assert names(run) == ["mine-0"]
    assert names(run, checkpoint) == ["mine-0", "mine-0, step-3"]
    assert names(run, other) == [shorten(str(run), 60), shorten(str(other), 60)]
    page = Pages([replace(two[0], name=str(run))]).sites[0].index()
    assert f'<strong title="{shorten(str(run))}">mine-0</strong>' in page


def test_the_table_for_embedding_atlas(two: list[Explorer], tmp_path: Path) -> None:
    assert write_table(two[0], tmp_path / "a.parquet") == 120
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.num_rows == 120
    assert {"x", "y", "text", "image", "sample_id", "modality"} <= set(table.column_names)
    assert table["modality"].to_pylist() == ["image"] * 60 + ["text"] * 60
    assert table["text"][2].as_py() == HOSTILE[2]
    assert table["image"][0].as_py()["bytes"][8:12] == b"WEBP"
    assert len(set(table["id"].to_pylist())) == 120
