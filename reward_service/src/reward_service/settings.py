"""Every setting of the service, read in this one place.

The environment names the folder (`REWARD_SERVICE_HOME`, by default `~/.reward-service`); `settings.toml` in
that folder, where it exists, holds the rest; options of a command override both.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from looper_schemas.scoring import MAX_ARMS, MAX_QUESTIONS, MAX_TEXT_CHARS, Limits
from regime_w.settings import RegimeWSettings
from reward_service.errors import StartError, denied

HOME_VARIABLE = "REWARD_SERVICE_HOME"
DEFAULT_HOME = "~/.reward-service"


def _address(value: str) -> str:
    if not re.fullmatch(r"https?://[^/@]+", value):
        raise ValueError("give http://HOST:PORT or https://HOST, without a path such as /v1")
    return value


Address = Annotated[str, AfterValidator(_address)]
Seconds = Annotated[float, Field(gt=0.0, le=86_400.0)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """All settings.

    Limits on one request are stated in `GET /v1/info`, and clients split their batches by them. A PPO batch
    of 64 arms of 1,000 tokens is about 0.5 MB. `max_waiting_*` bound what is inside the service at a time,
    half of it for one account; `batch_arms` what the scorer sees at once, `scoring_threads` how often: None
    is what it asks for itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    home: Path
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] | None = None  # on the loopback; None: no listener

    # PEM files. A key may be in the certificate's file; clients need a certificate of tls_client_ca if given.
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    max_body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 2**20
    max_header_bytes: Annotated[int, Field(ge=1024, le=2**20)] = 2**14
    max_connections: Annotated[int, Field(ge=1)] = 900  # below the usual limit of 1,024 open files
    max_questions: Annotated[int, Field(ge=1, le=MAX_QUESTIONS)] = 256
    max_arms: Annotated[int, Field(ge=1, le=MAX_ARMS)] = 64
    max_text_chars: Annotated[int, Field(ge=1, le=MAX_TEXT_CHARS)] = 200_000

    receive_deadline_s: Seconds = 5.0
    default_deadline_s: Seconds = 120.0
    max_deadline_s: Seconds = 600.0
    drain_s: Seconds = 30.0

    max_waiting_arms: Count = 16_384
    max_waiting_bytes: Count = 2**26
    batch_arms: Count | None = None
    scoring_threads: Annotated[int, Field(ge=1, le=256)] | None = None

    state_url: str | None = None  # None: SQLite in the folder
    idempotency_entries: Count = 65_536
    idempotency_bytes: Count = 2**28
    idempotency_ttl_s: Seconds = 86_400.0

    golden_every_s: Seconds = 300.0

    # The server that answers for the arms (POST /v1/arms/rollout): base address without /v1; None: no route.
    generator_url: Address | None = None
    generator_model: Annotated[str, Field(min_length=1, max_length=200)] = "policy"
    generator_chat: bool = True  # False: for a checkpoint without a chat template
    generator_key_file: Path | None = None
    generator_concurrency: Annotated[int, Field(ge=1, le=1024)] = 64
    generator_timeout_s: Seconds | None = None  # of one attempt; None: what the request's deadline leaves
    generator_attempts: Annotated[int, Field(ge=1, le=10)] = 3

    # The server behind scorer.judge = "llm": base address without /v1. Its model is scorer.judge_model.
    judge_url: Address | None = None
    judge_key_file: Path | None = None
    judge_concurrency: Annotated[int, Field(ge=1, le=256)] = 32
    judge_timeout_s: Seconds = 30.0
    judge_attempts: Annotated[int, Field(ge=1, le=10)] = 3

    scorer: RegimeWSettings = RegimeWSettings()

    @property
    def limits(self) -> Limits:
        """What `GET /v1/info` states."""
        return Limits(
            max_questions=self.max_questions,
            max_arms=self.max_arms,
            max_text_chars=self.max_text_chars,
            max_body_bytes=self.max_body_bytes,
        )


def load_settings(
    overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
) -> Settings:
    """Settings of the folder that the environment names; `overrides` that are None count as absent.

    Raises:
        StartError: the file cannot be read, or a value is unknown or out of bounds.
    """
    home = Path(environ.get(HOME_VARIABLE, "").strip() or DEFAULT_HOME).expanduser().absolute()
    return load_settings_of(home, overrides)


def load_settings_of(home: Path, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Settings of the folder `home`.

    Raises:
        StartError: the file cannot be read, or a value is unknown or out of bounds.
    """
    file = home / "settings.toml"
    values: dict[str, Any] = {}
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise StartError(f"{home}: is no folder; set {HOME_VARIABLE} to one") from None
    except PermissionError as error:
        raise denied(error) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StartError(f"{file}: cannot be read ({error}); mend or remove it") from None
    if "home" in values:
        raise StartError(f"{file}: home: is set by {HOME_VARIABLE} alone; remove it here")
    options = {name: value for name, value in (overrides or {}).items() if value is not None}
    try:
        return Settings(**{**values, **options, "home": home})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"]))
        if options.keys() & set(first["loc"][:1]):
            raise StartError(f"--{name.replace('_', '-')}: {first['msg']}; give another value") from None
        fix = "mend or remove it"
        if first["type"] == "extra_forbidden":
            fix = f"known settings: {', '.join(_known(first['loc'][:-1]))}"
        raise StartError(f"{file}: {name}: {first['msg']}; {fix}") from None


def _known(table: Iterable[int | str]) -> list[str]:
    """The names of the settings in `table`, given as its path: () is the file itself."""
    model: type[BaseModel] = Settings
    for part in table:
        kind = model.model_fields[str(part)].annotation
        model = next(
            one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)
        )
    return sorted(set(model.model_fields) - {"home"})
