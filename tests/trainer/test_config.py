"""Files and command lines become settings, or one line that names what is wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from looper_trainer.config import StageConfig, load_config, save_resolved, unknown_key
from looper_trainer.data import PrepareDataConfig
from looper_trainer.errors import ConfigError
from looper_trainer.pipeline import plan
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.rollouts import RolloutsConfig
from looper_trainer.sft import SFTStageConfig


class SFTConfig(StageConfig):
    """Settings with every kind of field; its table is [sft]."""

    model: str = "base"
    folder: Path = Path("out")
    rate: Annotated[float, Field(gt=0)] = 1e-5
    count: int | None = 3
    on: bool = False
    kind: Literal["lora", "full"] = "lora"
    names: tuple[str, ...] = ("a", "b")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_tables_are_named_after_their_stages() -> None:
    kinds = (PrepareDataConfig, SFTStageConfig, RolloutsConfig, PPOConfig)
    assert [kind.table() for kind in kinds] == ["prepare_data", "sft", "rollouts", "ppo"]


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", '[sft]\nmodel = "from-file"\nrate = 0.5\n[ppo]\nanything = 1\n')
    config = load_config(SFTConfig, file, {"rate": "2e-4"})
    assert (config.model, config.rate, config.count) == ("from-file", 2e-4, 3)


def test_text_is_parsed_by_the_type_of_its_field() -> None:
    typed = {"count": "none", "on": "true", "names": "x, y,z", "folder": "a/b", "kind": "full"}
    config = load_config(SFTConfig, None, typed)
    assert config.count is None
    assert config.on is True
    assert config.names == ("x", "y", "z")
    assert config.folder == Path("a/b")
    assert config.kind == "full"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[sft]\nmodle = 'x'\n", "modle; did you mean model?"),
        ("[sft]\nzzz = 'x'\n", "zzz; known: count, folder, kind, model, names, on, rate"),
        ("[stf]\nmodel = 'x'\n", "stf; did you mean sft"),
        ("[sft]\nrate = -1\n", "rate: Input should be greater than 0 (given: -1)"),
        ("[sft]\nkind = 'half'\n", "kind: Input should be 'lora' or 'full'"),
        ("[sft\n", "not valid TOML"),
        ("sft = 3\n", "[sft] must be a table"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_place(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(SFTConfig, write(tmp_path / "c.toml", text), {})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_from_windows_is_read(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(b'\xef\xbb\xbf[sft]\r\nmodel = "mine"\r\n')  # a byte order mark, CRLF
    assert load_config(SFTConfig, file, {}).model == "mine"
    assert [step.name for step in plan(file)] == ["sft"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot read"):
        load_config(SFTConfig, tmp_path / "absent.toml", {})


def test_unknown_keys_far_from_any_list_all() -> None:
    assert unknown_key("qqq", ["beta", "alpha"], "setting") == "unknown setting: qqq; known: alpha, beta"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: text.strip().lower() != "none"
)


@given(
    model=texts,
    rate=st.floats(min_value=1e-12, max_value=1e12),
    count=st.none() | st.integers(-(10**9), 10**9),
    on=st.booleans(),
    names=st.lists(texts, max_size=4),
)
def test_resolved_settings_read_back_as_equal(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    rate: float,
    count: int | None,
    on: bool,
    names: list[str],
) -> None:
    config = SFTConfig(model=model, rate=rate, count=count, on=on, names=tuple(names))
    file = save_resolved(config, tmp_path_factory.mktemp("resolved"))
    assert load_config(SFTConfig, file, {}) == config


def test_resolved_settings_hold_the_defaults_too(tmp_path: Path) -> None:
    file = save_resolved(load_config(SFTStageConfig, None, {}), tmp_path)
    table = tomllib.loads(file.read_text(encoding="utf-8"))["sft"]
    assert table.keys() == SFTStageConfig.model_fields.keys()
    assert table["learning_rate"] == 1e-5
    assert table["model"] == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
