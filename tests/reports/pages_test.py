"""Pages are well-formed, hold nothing foreign, and show every character as it was given."""

import base64
import html.parser

import hypothesis
import matplotlib.figure
import pytest
from hypothesis import strategies as st

from policymix.reports import pages

VOID = {"meta", "img", "br"}


class Reader(html.parser.HTMLParser):
    """Checks that tags nest; keeps the text, and the attributes of every tag."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_a_page_nests_and_loads_nothing():
    figure = matplotlib.figure.Figure(figsize=(1, 1))
    png = pages.png(figure)
    parts = [
        pages.paragraph("said", dim=True),
        pages.table([["a", "1"], ["b", "2"]], ["", "n"], ["mark", ""]),
        pages.picture(png, 'a "picture"'),
    ]
    reader = read(pages.page("title", [("", parts), ("second", [pages.paragraph("more")])]))
    names = [tag for tag, _ in reader.tags]
    assert names.count("h1") == 1
    assert names.count("h2") == 1
    assert not {"script", "link", "iframe"} & set(names)
    image = next(attrs for tag, attrs in reader.tags if tag == "img")
    assert image["alt"] == 'a "picture"'
    head, _, data = image["src"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == png
    assert png.startswith(b"\x89PNG")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert not any("http" in str(attrs.get("src", attrs.get("href"))) for _, attrs in reader.tags)


@hypothesis.given(st.text(st.characters(exclude_categories=["C"]), max_size=30))
def test_what_is_shown_is_what_was_given(text):
    for made in (
        pages.paragraph(text),
        pages.table([[text]], ["head"]).replace("head", ""),
        pages.page("", [(text, [])]),
    ):
        assert "".join(read(made).text).strip() == text.strip()


def test_a_path_that_looks_like_a_tag_stays_a_path():
    path = '/runs/<script>alert("x")</script>&amp;'
    text = pages.page(path, [(path, [pages.paragraph(path), pages.table([[path]], [path])])])
    assert "<script" not in text
    assert "".join(read(text).text).count(path) == 6  # title, h1, h2, p, th, th


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        (["1", "2.50000"], True),
        (["88 [80, 93]", "100 [94, 100]"], True),
        (["", "1,200"], True),
        (["1", "of push-v3"], False),
        (["push-v3"], False),
    ],
)
def test_columns_of_numbers_stand_to_the_right(cells, right):
    text = pages.table([["name", cell] for cell in cells], ["", "column"])
    assert ('class="number"' in text) == right


def test_empty_columns_are_left_out():
    text = pages.table([["a", "", "1"], ["b", "", "2"]], ["name", "nothing", "n"])
    assert "nothing" not in text
    assert read(text).text.count("1") == 1
