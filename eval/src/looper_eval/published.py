"""Records that others published, read and graded again: lm-evaluation-harness samples and inspect logs.

`looper-eval import samples_gsm8k.jsonl --name theirs --out DIR` makes a folder like that of a run, so that
`compare` and `report` work on it. Several files join one folder when they answer the same questions. How the
answers were asked for is not known here, so such a folder takes imports only. The scores in the file are kept
beside ours.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from looper_eval.dataset import Dataset, EvalQuestion, load_dataset, questions_digest
from looper_eval.engines import Answer
from looper_eval.generate import grade
from looper_eval.manifest import IMPORTED, ModelEntry, open_folder, read_manifest, read_questions
from looper_eval.models import ModelSpec
from looper_eval.summary import RECORDED
from looper_schemas.records import write_records
from looper_trainer.errors import UserError


class Sample(NamedTuple):
    """One published answer; `scores` by the names of the file's scorers."""

    question: str
    gold: str
    number: int
    answer: Answer
    scores: Mapping[str, bool]


def import_file(file: Path, spec_name: str, out: Path, dataset: str | None = None) -> None:
    """Write the answers in `file` into the folder `out` as the model `spec_name`.

    Args:
        dataset: whose questions to keep, in its order and with its ids; by default those of the folder, or of
            the file where the folder is new.

    Raises:
        UserError: the file is in neither format, or does not answer every question equally often.
    """
    content = _read(file)
    samples = _parse(file, content)
    questions = _questions(file, samples, out, dataset)
    groups = _by_question(file, samples, questions)
    per_question, *others = {len(group) for group in groups.values()}
    if others:
        raise UserError(f"{file}: answers some questions more often than others; mend or split it")
    identity = f"import:{hashlib.sha256(content).hexdigest()}"
    source = Dataset(dataset or file.name, questions_digest(questions), tuple(questions))
    entry = ModelEntry(place=file.name, identity=identity)
    if (out / "run.json").exists():
        found = read_manifest(out)
        if found.samples != per_question:
            raise UserError(f"{out}: holds {found.samples} answers to a question, {file} {per_question}")
        source = Dataset(found.dataset, found.dataset_digest, tuple(questions))
    manifest = open_folder(out, source, IMPORTED, {spec_name: entry}, per_question)
    digest = manifest.digest(spec_name)
    records = []
    for item in questions:
        for sample in groups[item.id]:
            record = grade(item, sample.answer, digest, sample.number)
            recorded = {f"{RECORDED}{name}": right for name, right in sample.scores.items()}
            records.append(record.model_copy(update={"graders": {**record.graders, **recorded}}))
    write_records(out / f"{spec_name}.jsonl", records)


def check_name(name: str) -> str:
    """`name` as a model's, refused as `--model` would."""
    from looper_eval.models import parse_models

    spec: ModelSpec = parse_models([f"{name}=import"])[0]
    return spec.name


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a samples file or a log") from None


def _parse(file: Path, content: bytes) -> list[Sample]:
    try:
        if zipfile.is_zipfile(file):
            return list(_inspect(_zipped(file)))
        try:
            whole = json.loads(content)
        except ValueError:
            whole = None
        if isinstance(whole, dict) and isinstance(whole.get("samples"), list):
            return list(_inspect(whole["samples"]))
        lines = content.decode("utf-8-sig").split("\n")
        return list(_lm_eval([json.loads(line) for line in lines if line.strip()]))
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"{file}: is neither lm-eval's samples JSONL nor an inspect log with samples ({error!r:.120})"
        ) from None


def _zipped(file: Path) -> Iterator[dict[str, Any]]:
    with zipfile.ZipFile(file) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("samples/") and name.endswith(".json"):
                yield json.loads(_entry(file, archive, name))


def _entry(file: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry of a log; newer ones use Zstandard, which zipfile reads from Python 3.14 on."""
    try:
        return archive.read(name)
    except NotImplementedError:
        pass
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{file}: is compressed with Zstandard; pip install 'looper-eval[inspect]', or convert it with "
            "`inspect log convert --to json`"
        ) from None
    found = archive.getinfo(name)
    with file.open("rb") as data:
        data.seek(found.header_offset)
        header = data.read(30)  # APPNOTE 4.3.7: name and extra field stand between header and data
        data.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
        packed = data.read(found.compress_size)
    return bytes(zstandard.ZstdDecompressor().decompressobj().decompress(packed))


def _lm_eval(rows: Iterable[dict[str, Any]]) -> Iterator[Sample]:
    """One line for each document and filter; the answers of all filters are the same."""
    by_document: dict[Any, dict[str, Any]] = {}
    scores: dict[Any, dict[str, bool]] = {}
    for row in rows:
        by_document.setdefault(row["doc_id"], row)
        name = str(row.get("filter", "none"))
        if "exact_match" in row:
            scores.setdefault(row["doc_id"], {})[name] = float(row["exact_match"]) == 1.0
    for document, row in by_document.items():
        doc = row["doc"]
        question = doc.get("question") or doc.get("problem") or doc["input"]
        gold = str(doc.get("answer") or row["target"])
        texts = row["resps"][0]
        for number, text in enumerate([texts] if isinstance(texts, str) else texts):
            recorded = scores.get(document, {}) if number == 0 else {}
            yield Sample(str(question), gold, number, Answer(str(text), None, None), recorded)


_STOPS: dict[str, Literal["stop", "length"]] = {
    "stop": "stop", "max_tokens": "length", "model_length": "length",
}  # fmt: skip


def _inspect(samples: Iterable[dict[str, Any]]) -> Iterator[Sample]:
    for sample in samples:
        if sample.get("error"):
            continue  # no answer: it is missed below, and never counted as wrong
        output = sample["output"]
        choices = output.get("choices") or []
        text = _text(choices[0]["message"]["content"]) if choices else str(output.get("completion") or "")
        stop = _STOPS.get(str(choices[0].get("stop_reason"))) if choices else None
        usage = output.get("usage") or {}
        target = sample["target"]
        yield Sample(
            question=_asked(sample["input"]),
            gold=str(target[0] if isinstance(target, list) else target),
            number=int(sample.get("epoch", 1)) - 1,
            answer=Answer(text, stop, usage.get("output_tokens")),
            scores={
                name: score["value"] in ("C", 1, True) for name, score in (sample.get("scores") or {}).items()
            },
        )


def _asked(given: str | list[dict[str, Any]]) -> str:
    if isinstance(given, str):
        return given
    return next(_text(message["content"]) for message in reversed(given) if message["role"] == "user")


def _text(content: str | list[dict[str, Any]]) -> str:
    """A message's text; what a model thinks apart from it is no part of the answer."""
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content if part.get("type") == "text")


def _questions(
    file: Path, samples: Sequence[Sample], out: Path, dataset: str | None
) -> Sequence[EvalQuestion]:
    if not samples:
        raise UserError(f"{file}: holds no answers")
    if dataset is not None:
        return load_dataset(dataset).questions
    if (out / "run.json").exists():
        return read_questions(out)
    found: dict[str, EvalQuestion] = {}
    for sample in samples:
        solution, _, gold = sample.gold.rpartition("####")
        number = f"{file.stem}/{len(found)}"
        item = EvalQuestion(
            id=number, question=sample.question, answer=gold.strip(), solution=solution.strip()
        )
        found.setdefault(_same(sample.question), item)
    return list(found.values())


def _by_question(
    file: Path, samples: Sequence[Sample], questions: Sequence[EvalQuestion]
) -> dict[str, list[Sample]]:
    key: Callable[[Sample], str] = lambda sample: _same(sample.question)  # noqa: E731
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(key(sample), []).append(sample)
    missing = [item for item in questions if _same(item.question) not in groups]
    if missing:
        raise UserError(
            f"{file}: has no answer to {len(missing)} of {len(questions)} questions, the first of them "
            f"{missing[0].id}; import files that answer the same questions"
        )
    found = {}
    for item in questions:
        group = sorted(groups[_same(item.question)], key=lambda sample: sample.number)
        if [sample.number for sample in group] != list(range(len(group))):
            raise UserError(f"{file}: answers {item.id} twice; remove one of the answers")
        found[item.id] = group
    return found


def _same(question: str) -> str:
    return " ".join(question.split())
