"""Which engine samples, and how vLLM is reached or started: the settings that every sampling stage shares."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from looper_trainer.config import StageConfig
from looper_trainer.errors import ConfigError
from looper_trainer.sampling.vllm_server import VLLMSettings

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class SamplerOptions(StageConfig):
    """The engine that draws completions."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    sampler: Literal["transformers", "vllm"] = "transformers"
    """engine that draws completions: in this process, or a vLLM server started and watched by this command"""
    vllm_urls: tuple[str, ...] = ()
    """vLLM servers that are running already, instead of one of our own; they must read this run's folder"""
    vllm_python: Path | None = None
    """interpreter that has vLLM installed; none: this one"""
    vllm_folder: Path | None = None
    """where the policies for vLLM and its log go, for example under /dev/shm; none: the run's folder"""
    vllm_servers: Positive = 1
    """servers of our own: over several vllm_devices, or side by side on one GPU for a small model"""
    vllm_devices: str | None = None
    """CUDA_VISIBLE_DEVICES of our servers, to sample on other GPUs; none: the GPU of this command"""
    vllm_memory_share: Share | None = None
    """share of the GPU's memory that our servers may take; none: vLLM's default"""
    vllm_connections: Positive = 64
    """questions in flight at a time to each server"""
    vllm_max_num_seqs: Positive = 256
    """completions that a server decodes together"""
    vllm_max_model_len: Positive | None = None
    """longest prompt and completion together, in tokens; none: the model's window"""
    vllm_compilation: Literal["full", "graphs", "eager"] = "graphs"
    """full compiles (slow to start, fastest after), graphs captures decode steps only, eager does neither"""
    vllm_seeded: bool = False
    """send each completion's seed: repeatable, but slower on a GPU"""
    vllm_start_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """longest wait for our server's start"""
    vllm_tokens_only: bool = False
    """start our server without a tokenizer and decode here: half the processor time a token in the server"""
    vllm_args: str = ""
    """more arguments for our server, as on a command line"""

    @field_validator("vllm_args")
    @classmethod
    def _splits(cls, text: str) -> str:
        shlex.split(text)  # an open quote is refused here
        return text

    @model_validator(mode="after")
    def _vllm_is_asked_for(self) -> Self:
        given = [
            name
            for name, field in type(self).model_fields.items()
            if name.startswith("vllm_") and getattr(self, name) not in (field.default, self._preset_of(name))
        ]
        if given and self.sampler != "vllm":
            raise ValueError(f"{given[0]} is of sampler vllm; set that too, or leave {given[0]} out")
        return self

    def _preset_of(self, name: str) -> Any:
        """What a preset gives this setting, if it does."""
        return None

    @property
    def seeded(self) -> bool:
        """Whether a completion follows from its seed."""
        return self.sampler != "vllm" or self.vllm_seeded

    def vllm_settings(self, **more: Any) -> VLLMSettings:
        """These options, with `more` that the stage knows, in the form that `VLLMSampler` takes.

        Raises:
            ConfigError: a value that vLLM cannot have.
        """
        given: dict[str, Any] = {
            "urls": self.vllm_urls,
            "servers": self.vllm_servers,
            "devices": self.vllm_devices,
            "connections": self.vllm_connections,
            "max_num_seqs": self.vllm_max_num_seqs,
            "max_model_len": self.vllm_max_model_len,
            "gpu_memory_utilization": self.vllm_memory_share,
            "compilation": self.vllm_compilation,
            "seeded": self.vllm_seeded,
            "tokens_only": self.vllm_tokens_only,
            "start_timeout_s": self.vllm_start_timeout_s,
            "extra_args": tuple(shlex.split(self.vllm_args)),
        }
        if self.vllm_python is not None:
            given["python"] = self.vllm_python
        try:
            return VLLMSettings(**given | more)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"vllm {where}: {first['msg'].removeprefix('Value error, ')}") from None
