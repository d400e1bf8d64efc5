"""Which model is meant, and an identity that follows its weights rather than its path."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from looper_eval import models
from looper_eval.models import ModelSpec, identify, parse_models
from looper_trainer.errors import UserError


def test_models_keep_their_order_and_a_place_may_hold_an_equals_sign() -> None:
    specs = parse_models(["sft=a=b/c", "ppo=http://127.0.0.1:8000/v1#m"])
    assert specs == [ModelSpec("sft", "a=b/c"), ModelSpec("ppo", "http://127.0.0.1:8000/v1#m")]
    assert [spec.is_endpoint for spec in specs] == [False, True]


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["sft"],
        ["=x"],
        ["sft="],
        ["../x=y"],
        ["questions=y"],
        ["a=x", "a=y"],
        ["a b=x"],
        ["a=http://h:1/v1"],
    ],
)
def test_texts_that_name_no_model_are_refused(texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        parse_models(texts)


def test_identity_follows_the_weights_and_not_the_path(
    tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = tiny_models
    copy = shutil.copytree(first, tmp_path / "copy")
    (copy / "README.md").write_text("a card changes no answer")
    assert identify(ModelSpec("a", str(copy))) == identify(ModelSpec("b", str(first)))
    assert identify(ModelSpec("a", str(first))) != identify(ModelSpec("a", str(second)))
    # Retrained in place, or given another chat template: another model.
    shutil.copy(second / "model.safetensors", copy)
    retrained = identify(ModelSpec("a", str(copy)))
    assert retrained != identify(ModelSpec("b", str(first)))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert identify(ModelSpec("a", str(copy))) != retrained


def test_large_files_are_told_apart_by_probes_over_their_whole_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(models, "_PROBE_BYTES", 100)
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    seen = set()
    # 64 probes of 100 bytes cover 6,000 bytes without a gap, so a change at any place must show.
    for place in (0, 1, 2999, 3000, 5998, 5999):
        content = bytearray(6000)
        content[place] = 1
        weights.write_bytes(content)
        seen.add(identify(ModelSpec("a", str(tmp_path))))
    assert len(seen) == 6


def test_places_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    for place in (str(tmp_path / "nowhere"), str(tmp_path), "./relative/folder", "just-a-word"):
        with pytest.raises(UserError, match=r"^[^\n]*$"):
            identify(ModelSpec("sft", place))
