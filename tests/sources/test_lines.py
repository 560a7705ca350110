from __future__ import annotations

from typing import Any

import pytest

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.lines import read_lines


def read(
    place: Any, name: str, content: str | bytes, **options: Any
) -> list[tuple[str, str | None]]:
    storage.write_bytes(
        f"{place}/{name}", content if isinstance(content, bytes) else content.encode()
    )
    return [
        (line.path, line.label)
        for line in read_lines(f"{place}/{name}", SourceSettings(uri="unused", **options))
    ]


TWO = [("a 1.jpg", "0"), ("b/2.png", "1")]


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        # comments at the top
        ("x.txt", "# made by, a script\n# again\na 1.jpg 0\nb/2.png 1\n", {}),
        ("x.csv", "# made by; a script\npath,label\na 1.jpg,0\nb/2.png,1\n", {}),
        # plain text
        ("x.txt", "a 1.jpg 0\nb/2.png\t1\n", {}),  # the first line has no tab
        ("x.txt", "\n\n  a 1.jpg   0  \r\n\r\nb/2.png 1", {}),
        ("x", "a 1.jpg 0\nb/2.png 1", {}),
        # tables without a header: the path is first, the label second
        ("x.txt", "a 1.jpg\t0\nb/2.png\t1\n", {}),
        ("x.txt", "a 1.jpg,0\nb/2.png,1\n", {}),
        ("x.tsv", "a 1.jpg\t0\nb/2.png\t1\n", {}),
        ("x.csv", '"a 1.jpg","0"\r\nb/2.png, 1 \r\n', {}),
        ("x.CSV", "a 1.jpg;0\nb/2.png;1\n", {}),
        ("x.csv", "a 1.jpg\t0\nb/2.png\t1\n", {}),
        ("x.csv", "a 1.jpg,0,more\n\n,,\nb/2.png,1\n", {}),
        ("x.csv", b"\xef\xbb\xbfa 1.jpg,0\nb/2.png,1", {}),
        ("x.csv", "a 1.jpg,0\nb/2.png,1".encode("utf-16"), {}),
        # tables with a header: columns are found by name
        ("x.csv", "path,label\na 1.jpg,0\nb/2.png,1\n", {}),
        ("x.txt", "path,label\na 1.jpg,0\nb/2.png,1\n", {}),
        ("x.csv", ",Label,FileName\n0,0,a 1.jpg\n1,1,b/2.png\n", {}),
        ("x.csv", "id,filename,category\nx,a 1.jpg,0\ny,b/2.png,1\n", {}),
        ("x.csv", "path,target,label\na 1.jpg,x,0\nb/2.png,y,1\n", {}),
        ("x.csv", "image,file,label\nx,a 1.jpg,0\ny,b/2.png,1\n", {}),
        (
            "x.csv",
            "id,picture,label\n7,a 1.jpg,0\n8,b/2.png,1\n",
            {},
        ),  # the column that ends like an image
        ("x.csv", "picture,kind\na 1.jpg,0\nb/2.png,1\n", {"label_column": "kind"}),
        ("x.csv", "path,picture,label\nx,a 1.jpg,0\ny,b/2.png,1\n", {"path_column": "picture"}),
        ("x.csv", "key,y\na 1.jpg,0\nb/2.png,1\n", {"path_column": "key", "label_column": "y"}),
    ],
)
def test_two_lines(tmp_path: Any, name: str, content: str | bytes, options: dict[str, Any]) -> None:
    assert read(tmp_path, name, content, **options) == TWO


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/a/airfield/1.jpg 0", ("/a/airfield/1.jpg", "0")),
        ("my photo.jpg", ("my photo.jpg", None)),
        ("my photo.jpg cat", ("my photo.jpg", "cat")),
        ("my.jpg copy.JPG", ("my.jpg copy.JPG", None)),
        ("my.jpg copy.jpg -1", ("my.jpg copy.jpg", "-1")),
        ("1.jpeg tench, Tinca tinca", ("1.jpeg", "tench, Tinca tinca")),
        ("no/ending 12", ("no/ending", "12")),
        ("no/ending cat", ("no/ending cat", None)),
        ("12", ("12", None)),
        ("ü \u3042.webp\u30005", ("ü \u3042.webp", "5")),
    ],
)
def test_a_line_of_text_is_split_where_a_label_begins(
    tmp_path: Any, line: str, expected: tuple[str, str | None]
) -> None:
    assert read(tmp_path, "x.txt", line) == [expected]


def test_quotes_hold_delimiters_and_quotes(tmp_path: Any) -> None:
    found = read(tmp_path, "x.csv", 'path,label\n"a, ""b"".jpg","x ""y"\n')
    assert found == [('a, "b".jpg', 'x "y')]


@pytest.mark.parametrize("name", ["x.tsv", "x.txt"])
def test_a_quotation_mark_is_a_letter_between_tabs(tmp_path: Any, name: str) -> None:
    classes = ['"Lena" apple', '"', "plain", 'a "b" c']
    lines = [(f"{number}.jpg", classes[number % 4]) for number in range(80)]
    content = "".join(f"{path}\t{label}\n" for path, label in lines)
    assert read(tmp_path, name, content) == lines


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('path,label\na.jpg,x\nb.jpg,"y\nc.jpg,z"\nd.jpg,x\n', "line 3: a quoted cell"),
        ('a.jpg,"x\r\nb.jpg,y"\r\n', "line 1: a quoted cell"),
        ('note,path,label\n"two\nlines",a.jpg,x\n', "line 2: a quoted cell"),
        ('a.jpg,x\n\nb.jpg,"y\n', "line 3: a quoted cell"),
    ],
)
def test_a_cell_that_swallows_a_line_end_is_refused(tmp_path: Any, content: str, line: str) -> None:
    with pytest.raises(SourceError, match=line):
        read(tmp_path, "x.csv", content)


def test_several_splits_in_a_column_are_refused(tmp_path: Any) -> None:
    rows = "a.jpg,x,train\nb.jpg,y,Training\n"
    assert len(read(tmp_path, "x.csv", "path,label,Split\n" + rows)) == 2
    with pytest.raises(
        SourceError, match=r"line 4: column 'Split' is 'val', .* split train; write"
    ):
        read(tmp_path, "x.csv", "path,label,Split\n" + rows + "c.jpg,x,val\n")
    content = "path,label,Split\n" + rows + "c.jpg,x,val\n"
    assert len(read(tmp_path, "x.csv", content, include="a*")) == 3  # chosen by their paths later
    assert read(tmp_path, "x.csv", content, label_column="split")[2] == ("c.jpg", "val")
    # other values are no splits, and without a header the column has no name
    assert len(read(tmp_path, "x.csv", "path,label,split\na.jpg,x,0\nb.jpg,x,1\nc.jpg,x,\n")) == 3
    assert len(read(tmp_path, "x.csv", "a.jpg,x,train\nb.jpg,x,test\n")) == 2


def test_missing_cells(tmp_path: Any) -> None:
    assert read(tmp_path, "x.csv", "label,path\n3,a.jpg\n,b.jpg\n4\n5,\n") == [
        ("a.jpg", "3"),
        ("b.jpg", None),
        ("", "4"),
        ("", "5"),
    ]
    assert read(tmp_path, "y.csv", "path\na.jpg\nb.jpg") == [("a.jpg", None), ("b.jpg", None)]
    assert read(tmp_path, "z.csv", "a.jpg\nb.jpg,\n") == [("a.jpg", None), ("b.jpg", None)]
    assert read(tmp_path, "e.csv", "") == [] == read(tmp_path, "e.txt", "\n \n")


def test_a_first_line_with_an_image_is_no_header(tmp_path: Any) -> None:
    assert read(tmp_path, "x.csv", "a.jpg,label\nb.jpg,class\n") == [
        ("a.jpg", "label"),
        ("b.jpg", "class"),
    ]
    assert read(tmp_path, "y.csv", "x/1,2\nx/2,3\n") == [("x/1", "2"), ("x/2", "3")]


def test_lines_are_counted_as_an_editor_does(tmp_path: Any) -> None:
    for name, content in (
        ("x.csv", "path,label\n\n\na b.jpg,1\n,2\n"),
        ("x.txt", "\na b.jpg 1\n\nc 2"),
    ):
        storage.write_bytes(f"{tmp_path}/{name}", content.encode())
    settings = SourceSettings(uri="unused")
    assert [line.number for line in read_lines(f"{tmp_path}/x.csv", settings)] == [4, 5]
    assert [line.number for line in read_lines(f"{tmp_path}/x.txt", settings)] == [2, 4]


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("path,kind\na.jpg,1\n", {}, "no column 'label' among path, kind; set source.label_column"),
        (
            "path,label\na.jpg,1\n",
            {"path_column": "key"},
            "no column 'key' among path, label; set source.path_column",
        ),
        ("a.jpg,1\n", {"path_column": "key"}, "no column 'key' in its first line"),
        ('path,label\n"a.jpg,1\n' + "b.jpg,1\n" * 20_000, {}, "line 2: .*is a quote not closed"),
    ],
)
def test_what_cannot_be_understood_is_said(
    tmp_path: Any, content: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        read(tmp_path, "x.csv", content, **options)


def test_a_list_is_read_in_few_requests(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    fetch = storage.streams.Ranges._fetch
    monkeypatch.setattr(
        storage.streams.Ranges,
        "_fetch",
        lambda self, length: asked.append(length) or fetch(self, length),
    )
    for name, text in (("x.csv", "dé/%06d.jpg,%d\n"), ("x.txt", "dé/%06d.jpg %d\n")):
        with monkeypatch.context() as patch:
            patch.setattr("raypipe.sources.lines.READ_BYTES", 100_000)
            patch.setattr(storage.files, "LOCAL_BLOCK", 100_000)  # as an object store is read
            found = read(
                tmp_path, name, "".join(text % (number, number) for number in range(50_000))
            )
        assert found == [(f"dé/{number:06d}.jpg", str(number)) for number in range(50_000)]
        size = (tmp_path / name).stat().st_size
        assert (
            size <= sum(asked) <= size + 100_000 and len(asked) <= size / 100_000 + 2
        )  # the first twice
        asked.clear()


def test_bytes_that_are_no_text_are_shown(tmp_path: Any) -> None:
    assert read(tmp_path, "x.txt", b"\xff.jpg 1\n") == [("\\xff.jpg", "1")]
