"""`looper prepare-data`: GSM8K as two record files, one to train on and one to develop on.

The split depends on the seed and the questions alone, not on the order of the source, and equal questions
stay on one side, so that no development question has been trained on. GSM8K's test split is for the eval
harness; this stage refuses it unless told otherwise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from looper_schemas.answers import normalise_answer
from looper_schemas.records import Problem, read_objects, what_is_wrong, write_records
from looper_trainer.config import StageConfig, save_resolved
from looper_trainer.errors import DataError

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_NAMES_TEST = re.compile(r"(?<![a-z])test(?![a-z])", re.IGNORECASE)


class PrepareDataConfig(StageConfig):
    """Prepare GSM8K: from the hub, or from a local file."""

    input: Annotated[
        Path | None, Field(description="JSONL file, or folder with train.jsonl; without it, the hub")
    ] = None
    dataset: Annotated[str, Field(description="dataset on the hub")] = "openai/gsm8k"
    subset: Annotated[str, Field(description="its configuration")] = "main"
    split: Annotated[str, Field(description="its split")] = "train"
    output: Annotated[Path, Field(description="folder for <name>_train.jsonl and <name>_dev.jsonl")] = Path(
        "data"
    )
    name: Annotated[str, Field(pattern=r"^[\w.-]+$", description="begins file names and ids")] = "gsm8k"
    dev_fraction: Annotated[float, Field(gt=0, lt=1, description="share of the problems kept for dev")] = 0.2
    seed: Annotated[int, Field(ge=0, description="of the split")] = 0
    limit: Annotated[int | None, Field(ge=2, description="use only the first N problems")] = None
    strip_annotations: Annotated[bool, Field(description="drop calculator annotations <<...>>")] = True
    allow_test: Annotated[bool, Field(description="permit a test split, which eval is meant for")] = False


def run(config: PrepareDataConfig) -> None:
    """Write `<output>/<name>_train.jsonl` and `<output>/<name>_dev.jsonl`.

    Raises:
        RecordError, DataError: the source is missing, empty, a test split, or holds a line that is no
            problem or has an earlier one's id.
    """
    split, where, rows = _source(config)
    problems: list[Problem] = []
    ids: set[str] = set()
    for number, row in rows:
        if config.limit is not None and len(problems) == config.limit:
            break
        at = f"{where}:{number + 1}"
        problem = parse_problem(row, f"{config.name}/{split}/{number}", at, config.strip_annotations)
        if problem.id in ids:
            raise DataError(f"{at}: the id {problem.id!r} is used twice; give each problem its own")
        ids.add(problem.id)
        problems.append(problem)
    if not problems:
        raise DataError(f"{where}: holds no problems; write at least two JSON lines")
    train, dev = split_problems(problems, config.dev_fraction, config.seed)
    if not train or not dev:
        raise DataError(f"{where}: {len(problems)} problems are too few for a train and a dev part; add some")
    train_file = config.output / f"{config.name}_train.jsonl"
    dev_file = config.output / f"{config.name}_dev.jsonl"
    write_records(train_file, train)
    write_records(dev_file, dev)
    save_resolved(config, config.output, f"{config.name}_config")
    print(f"{len(problems)} problems of {where}: {len(train)} to {train_file}, {len(dev)} to {dev_file}")


def parse_problem(row: object, problem_id: str, where: str, strip_annotations: bool = True) -> Problem:
    """A `Problem` from one line of GSM8K (`question`, `answer` ending in `#### n`) or one of our own records.

    Args:
        row: the decoded line.
        problem_id: the id for a line that brings none.
        where: file and line, for the error message.
        strip_annotations: drop calculator annotations such as `<<48/2=24>>` from the solution.

    Raises:
        DataError: not an object with a question and a numeric answer.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: is no JSON object; mend or remove this line")
    question, answer = row.get("question"), row.get("answer")
    if isinstance(answer, int | float):
        answer = str(answer)
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: has no question; mend or remove this line")
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"{where}: has no answer; mend or remove this line")
    if isinstance(row.get("cot"), str):
        cot, final = row["cot"], answer
    elif "####" in answer:
        cot, _, final = answer.rpartition("####")
    else:
        raise DataError(f"{where}: the answer has no final line '#### n'; mend or remove this line")
    number = _plain_number(final)
    if number is None:
        raise DataError(f"{where}: the final answer {final.strip()!r} is no number; mend or remove this line")
    if strip_annotations:
        cot = _ANNOTATION.sub("", cot)
    given = row.get("id")
    try:
        return Problem(
            id=given if isinstance(given, str) and given else problem_id,
            question=question.strip(),
            answer=number,
            cot=cot.strip(),
        )
    except ValidationError as error:
        raise DataError(f"{where}: {what_is_wrong(error)}") from None


def split_problems(
    problems: Iterable[Problem], dev_fraction: float, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """`problems` as (train, dev), each in the given order; dev is the first to reach its share.

    Questions that are equal but for case and white space form one group, which is never divided. Groups
    are ranked by a hash of seed and question, so that a source in another order splits in the same way.
    """
    problems = list(problems)
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(_rank(problem.question, seed), []).append(problem)
    wanted = max(1, round(dev_fraction * len(problems)))
    in_dev: set[str] = set()
    size = 0
    for rank in sorted(groups):
        if size >= wanted:
            break
        in_dev.add(rank)
        size += len(groups[rank])
    train = [problem for problem in problems if _rank(problem.question, seed) not in in_dev]
    dev = [problem for problem in problems if _rank(problem.question, seed) in in_dev]
    return train, dev


def _rank(question: str, seed: int) -> str:
    same = " ".join(question.casefold().split())
    return hashlib.sha256(f"{seed}\n{same}".encode()).hexdigest()


def _plain_number(final: str) -> str | None:
    """`final` as written where it is a plain decimal, without thousands separators; else normalised."""
    plain = final.strip().replace(",", "")
    if re.fullmatch(r"-?\d+(\.\d+)?", plain):
        return plain
    return normalise_answer(final)


def _source(config: PrepareDataConfig) -> tuple[str, str, Iterator[tuple[int, Any]]]:
    """(name of the split, what to call the source, numbered rows)."""
    if config.input is None:
        if _NAMES_TEST.search(config.split) and not config.allow_test:
            raise DataError(f"split {config.split} is for evaluation; use train, or say --allow-test")
        return config.split, f"{config.dataset} ({config.split})", enumerate(_from_hub(config))
    file = config.input / "train.jsonl" if config.input.is_dir() else config.input
    if not file.is_file():
        raise DataError(f"{file}: no such file; name a JSONL file or a folder with train.jsonl")
    if _NAMES_TEST.search(file.stem) and not config.allow_test:
        raise DataError(f"{file}: a test file is for evaluation; use train data, or say --allow-test")
    return file.stem, str(file), ((number - 1, row) for number, row in read_objects(file))


def _from_hub(config: PrepareDataConfig) -> Iterator[Any]:
    from datasets import load_dataset

    print(f"prepare-data: reading {config.dataset} ({config.split}) from the hub", flush=True)
    try:
        yield from load_dataset(config.dataset, config.subset, split=config.split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"cannot load {config.dataset} from the hub: {reason}; connect, or name a file by --input"
        ) from error
