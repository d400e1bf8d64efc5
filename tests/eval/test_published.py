"""Published records are read and graded again; both files were written by the harnesses themselves."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import pytest

from looper_eval.cli import main

PUBLISHED = Path(__file__).with_name("published")
SAMPLES, LOG = PUBLISHED / "lm_eval_samples.jsonl", PUBLISHED / "inspect_log.json"
GOLDS = ["7", "3,000", "18", "6"]


def imported(file: Path, out: Path, name: str = "theirs", *more: str) -> int:
    return main(["import", str(file), "--name", name, "--out", str(out), *more])


def records(out: Path, name: str = "theirs") -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def test_lm_eval_samples_keep_their_texts_and_scores_and_get_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imported(SAMPLES, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    rows = records(tmp_path / "out")
    texts = {row["doc_id"]: row["resps"][0][0] for row in map(json.loads, SAMPLES.read_text().splitlines())}
    assert [row["output"] for row in rows] == [texts[n] for n in range(4)]
    assert [row["gold_answer"] for row in rows] == GOLDS
    assert [row["final_answer"] for row in rows] == ["7", "3000", "18", "6"]
    assert all(row["correct"] for row in rows)
    # lm-eval's strict rule found `#### 7` alone; `$3,000` and `18.00` and a box it does not take.
    strict = [row["graders"]["recorded:strict-match"] for row in rows]  # type: ignore[index]
    assert strict == [True, False, False, False]
    (model,) = json.loads((tmp_path / "out" / "summary.json").read_text())["models"]
    assert model["recorded"]["strict-match"] == {"accuracy": 0.25, "differing": 3}
    assert model["recorded"]["flexible-extract"] == {"accuracy": 0.5, "differing": 2}
    assert "scores that came with the answers" in printed


def test_samples_saved_on_windows_are_read(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + SAMPLES.read_bytes().replace(b"\n", b"\r\n"))
    assert imported(file, tmp_path / "out") == 0
    assert [row["gold_answer"] for row in records(tmp_path / "out")] == GOLDS


def check_inspect(out: Path) -> None:
    rows = records(out)
    assert [row["finish_reason"] for row in rows] == ["stop", "stop", "stop", "length"]
    assert [row["tokens_out"] for row in rows] == [7, 8, 9, 10]
    assert [row["correct"] for row in rows] == [True, True, True, False]
    assert [row["graders"]["recorded:match"] for row in rows] == [True, True, True, False]  # type: ignore[index]
    assert [row["final_answer"] for row in rows] == ["7", "3000", "18", "6"]


def test_inspect_logs_are_read_as_json_and_zipped(tmp_path: Path) -> None:
    assert imported(LOG, tmp_path / "json") == 0
    check_inspect(tmp_path / "json")
    zipped = tmp_path / "log.eval"
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", "{}")
        for sample in json.loads(LOG.read_text())["samples"]:
            archive.writestr(f"samples/{sample['id']}_epoch_1.json", json.dumps(sample))
    assert imported(zipped, tmp_path / "eval") == 0
    check_inspect(tmp_path / "eval")


def test_inspect_logs_with_zstandard_entries_are_read_too(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    zipped = tmp_path / "log.eval"
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_STORED) as archive:
        for sample in json.loads(LOG.read_text())["samples"]:
            packed = zstandard.ZstdCompressor().compress(json.dumps(sample).encode())
            archive.writestr(f"samples/{sample['id']}_epoch_1.json", packed)
    # Method 93 into each header: it stands at byte 8 of a local one and at byte 10 of a central one.
    content = bytearray(zipped.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset : at + offset + 2] = struct.pack("<H", 93)
            at = content.find(signature, at + 4)
    zipped.write_bytes(content)
    assert imported(zipped, tmp_path / "eval") == 0
    check_inspect(tmp_path / "eval")


def test_two_harnesses_on_the_same_questions_are_compared_pair_by_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert imported(SAMPLES, out, "one") == 0
    assert imported(LOG, out, "two") == 0
    summary = json.loads((out / "summary.json").read_text())
    (pair,) = summary["pairs"]
    assert pair["table"] == {"both": 3, "only_a": 1, "only_b": 0, "neither": 0}
    assert summary["settings"]["preset"] == "imported"
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "how is not known here" in page
    assert main(["compare", str(out), "--grader", "lm-eval-strict"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [one["correct"] for one in summary["models"]] == [1, 1]
    capsys.readouterr()
    assert main(["card", str(out), "--name", "two"]) == 2
    assert "imported answers" in capsys.readouterr().err


def test_a_dataset_gives_ids_and_chooses_the_questions(tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    rows = [
        {"id": "mine/b", "question": "Bo is 12.  How old is he in 6 years?", "answer": "9 * 2\n#### 18"},
        {"id": "mine/a", "question": "Ann has 5 pens and buys 2. How many pens?", "answer": "#### 8"},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert imported(SAMPLES, tmp_path / "out", "theirs", "--dataset", str(data)) == 0
    found = records(tmp_path / "out")
    assert [(row["id"], row["gold_answer"], row["correct"]) for row in found] == [
        ("mine/b", "18", True), ("mine/a", "8", False),  # our gold, not the file's
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no answers"),
        (b"not json\n", "is neither lm-eval"),
        (b'{"question": "Q?", "answer": "1"}\n', "is neither lm-eval"),
        (b"\xff\xfe", "is neither lm-eval"),
        (b"PK\x03\x04broken", "is neither lm-eval"),
        (b'{"samples": [{"input": "Q?"}]}', "is neither lm-eval"),
        (b"[" * 10_000, "is neither lm-eval"),
    ],
    ids=range(7),
)
def test_other_files_are_refused_in_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, complaint: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    assert imported(file, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_sample_that_failed_is_missed_and_not_counted_as_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = json.loads(LOG.read_text())
    log["samples"][1]["error"] = {"message": "connection lost"}
    file = tmp_path / "log.json"
    file.write_text(json.dumps(log))
    assert imported(SAMPLES, tmp_path / "out", "one") == 0
    assert imported(file, tmp_path / "out", "two") == 2
    assert "has no answer to 1 of 4 questions" in capsys.readouterr().err


def test_imports_and_runs_never_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert imported(SAMPLES, out) == 0
    data = tmp_path / "q.jsonl"
    rows = [json.loads(line)["doc"] for line in SAMPLES.read_text().splitlines()[::2]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = ["run", "--model", "m=http://127.0.0.1:1/v1#m", "--dataset", str(data), "--out", str(out)]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(call) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
