"""Completions from vLLM over its OpenAI-compatible HTTP server, with the policy's adapter loaded at run time.

    with VLLMSampler("checkpoints/sft", VLLMSettings(max_lora_rank=16), folder=run / "vllm") as sampler:
        sampler.load_adapter(adapter_folder, version=1)
        for index, completions in sampler.sample_iter(prompts, params, seeds):
            ...  # question `index` is whole: it can be scored while others are still sampled

The server is started and supervised on this host (`vllm_server`), or given as URLs. One question is one
request, and at most `connections` questions are in flight to a server, so that a finished question is
known at once and a server's death costs only the questions in flight, which are asked again.

Seeds. vLLM gives the j-th of n completions the seed s + j. So a question whose seeds count up by one is one
request; other seeds cost one request for each run of consecutive ones, and mean the same. The noise of a row
comes from its own seed, but the logits' last bits depend on the batch, so a repeated run may part from the
first where two tokens are almost equally likely.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from looper_trainer.errors import CheckpointError, ConfigError
from looper_trainer.sampling.base import Completion, SamplingParams
from looper_trainer.sampling.vllm_link import Adapter, VLLMLink
from looper_trainer.sampling.vllm_run import Run
from looper_trainer.sampling.vllm_server import (
    SamplerError,
    ServerLost,
    VLLMServer,
    VLLMSettings,
    say_on_stderr,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SamplerError", "VLLMSampler", "VLLMServer", "VLLMSettings"]

_KEPT_ADAPTERS = 2  # the current one, and the one before for requests that are still running


class VLLMSampler:
    """A `Sampler` over one or more vLLM servers; a context manager.

    Args:
        model: folder or name of the base model: what a server of ours serves, and whose tokenizer encodes.
        settings: servers, connections, memory.
        folder: holds the server's log and the copies of the adapters, which every server must be able to
            read under this path; a temporary folder by default.
        say: told of starts, outages and restarts, one line at a time.

    Raises:
        SamplerError: a server cannot be started, stays away, or refuses.
    """

    def __init__(
        self,
        model: str,
        settings: VLLMSettings | None = None,
        *,
        folder: Path | None = None,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        self.model = model
        self.settings = settings or VLLMSettings()
        self._temporary = tempfile.TemporaryDirectory(prefix="looper-vllm-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary else folder or ".").resolve()
        self._say = say
        self._adapters: list[Adapter] = []
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._servers: list[VLLMServer] = []
        self._tokens_only = self.settings.tokens_only and not self.settings.urls
        self._asleep: set[int] = set()  # the processes that sleep
        if not self.settings.urls:
            for number, settings in enumerate(self.settings.of_each_server(), start=1):
                log = self.folder / ("vllm.log" if number == 1 else f"vllm-{number}.log")
                self._servers.append(VLLMServer(model, settings, log_file=log, say=say))
            self._links = [VLLMLink(self.settings, server=server, say=say) for server in self._servers]
        else:
            self._links = [VLLMLink(self.settings, url=url, say=say) for url in self.settings.urls]

    def __enter__(self) -> VLLMSampler:
        try:
            self._start()
            self._on_every_link(lambda link: link.prepare(None, threading.Event()))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the servers if they are ours, else remove our adapters from them."""
        for server in self._servers:
            server.stop()
        while self._adapters:
            self._drop(self._adapters.pop())
        for link in self._links:
            link.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    @property
    def policy_version(self) -> int | None:
        """Version of the adapter that samples now; None for the base model."""
        return self._adapters[-1].version if self._adapters else None

    @property
    def servers(self) -> Sequence[VLLMServer]:
        """The supervised servers; none when they are given by URL."""
        return self._servers

    def _start(self) -> None:
        """Start our servers together. vLLM measures what memory it takes, and gives up where another server
        of that card changes what is free meanwhile: such a one is started again once the rest are there.
        """
        if len(self._servers) <= 1:
            for server in self._servers:
                server.start()
            return
        with ThreadPoolExecutor(len(self._servers)) as pool:
            starts = [(server, pool.submit(server.start)) for server in self._servers]
        for server, start in starts:
            error = start.exception()
            if isinstance(error, SamplerError):
                self._say(f"{error}; starting it again, alone")
                server.start()
            elif error is not None:
                raise error

    def load_adapter(self, folder: Path, version: int, *, take: bool = False) -> None:
        """Sample from the LoRA adapter saved in `folder` (PEFT's format) from now on.

        It is copied and loaded under a name of its own: reloading in place would leave vLLM's prefix cache
        stale, and vLLM may read the files again later, when `folder` has long been overwritten. The adapter
        before it stays loaded until the next call, the one before that is removed. With `take` the folder,
        which must be on the same file system, is moved instead of copied.

        Raises:
            CheckpointError: `folder` holds no LoRA adapter, or one of too high a rank.
        """
        rank = _adapter_rank(folder)
        if rank > self.settings.max_lora_rank and self._servers:
            raise CheckpointError(
                f"{folder}: the adapter has rank {rank}, the server was started for "
                f"max_lora_rank = {self.settings.max_lora_rank}; raise that setting"
            )
        if not self.settings.lora:
            raise ConfigError("this sampler was set up without adapters (lora = False)")
        self._load(folder, version, take, whole=False)

    def load_weights(self, folder: Path, version: int, *, take: bool = False) -> None:
        """Sample from the whole model saved in `folder` (safetensors) from now on; see `load_adapter`.

        The server must be ours, started with `whole_weights`.

        Raises:
            ConfigError: it was not.
        """
        if not self.settings.whole_weights or not self._servers:
            raise ConfigError("whole weights need a server of our own with whole_weights = True")
        self._load(folder, version, take, whole=True)

    def _load(self, folder: Path, version: int, take: bool, *, whole: bool) -> None:
        name = f"policy-v{version}-{secrets.token_hex(4)}"
        copy = self.folder / "policies" / name
        if take:
            copy.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(copy)
        else:
            ignored = shutil.ignore_patterns("*.partial", "optimizer*", "checkpoint-*")
            shutil.copytree(folder, copy, ignore=ignored)
        adapter = Adapter(name, copy, version, whole)
        try:
            self._on_every_link(lambda link: link.prepare(adapter, threading.Event()))
        except BaseException:
            self._drop(adapter)
            raise
        self._adapters.append(adapter)
        while len(self._adapters) > _KEPT_ADAPTERS:
            self._drop(self._adapters.pop(0))

    def sleep(self) -> None:
        """Give the GPU's memory back until `wake`: weights go to the host, keys and values are dropped.

        The server must be ours, started with `sleep`. Asleep already, or dead: nothing to do.
        """
        for server, link in zip(self._servers, self._links, strict=True):
            if server.pid is not None and server.pid not in self._asleep:
                link.order("/sleep?level=1")
                self._asleep.add(server.pid)

    def wake(self) -> None:
        """Take the memory again; a server that was started anew meanwhile is awake."""
        for server, link in zip(self._servers, self._links, strict=True):
            if server.pid in self._asleep:
                link.order("/wake_up")
                link.order("/reset_prefix_cache")
        self._asleep.clear()

    def encode(self, prompt: str) -> list[int]:
        """Token ids of `prompt`, with the special tokens that the tokenizer puts before a text."""
        tokenizer = self._with_tokenizer()
        ids: list[int] = tokenizer(prompt)["input_ids"]
        while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers append EOS
            ids = ids[:-1]
        return ids

    def _with_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.model)
        return self._tokenizer

    def _eos_ids(self) -> list[int]:
        """Ids that end a text, as the tokenizer and the model's generation config name them."""
        from transformers import GenerationConfig

        found = [self._with_tokenizer().eos_token_id]
        try:
            named = GenerationConfig.from_pretrained(self.model).eos_token_id
        except OSError:
            named = None  # the folder has no generation config
        found += named if isinstance(named, list) else [named]
        return sorted({token for token in found if isinstance(token, int)})

    def _with_texts(
        self, results: Generator[tuple[int, list[Completion]]]
    ) -> Generator[tuple[int, list[Completion]]]:
        with closing(results):
            for index, row in results:
                yield index, [self._with_text(completion) for completion in row]

    def _with_text(self, completion: Completion) -> Completion:
        """`completion` of a server without a tokenizer, with its text."""
        ended = completion.finish_reason == "stop"
        body = completion.token_ids[:-1] if ended else completion.token_ids
        text = self._with_tokenizer().decode(
            list(body), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return replace(completion, text=str(text))

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """See `Sampler.sample`; what `sample_iter` yields, in the order of `prompts`."""
        found = dict(self.sample_iter(prompts, params, seeds))
        return [found[index] for index in range(len(prompts))]

    def sample_iter(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> Generator[tuple[int, list[Completion]]]:
        """(index of a prompt, its completions in the order of its seeds), each as soon as it is whole.

        The adapter that is current at this call samples all of them. Sampling runs ahead of the consumer;
        closing the iterator ends it.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} lists of seeds")
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt holds no tokens")
        adapter = self._adapters[-1] if self._adapters else None
        if not self._tokens_only:
            return Run(self._links, self.settings, adapter, prompts, params, seeds, self._say).results()
        stop_ids = self._eos_ids()
        run = Run(self._links, self.settings, adapter, prompts, params, seeds, self._say, stop_ids)
        return self._with_texts(run.results())

    def _drop(self, adapter: Adapter) -> None:
        for link in self._links:
            if link.server is None or link.server.pid is not None:
                link.unload(adapter)
        shutil.rmtree(adapter.folder, ignore_errors=True)

    def _on_every_link(self, action: Callable[[VLLMLink], None]) -> None:
        """`action` on all servers at once; one of several may be lost, and is prepared when it samples."""
        with ThreadPoolExecutor(len(self._links)) as pool:
            futures = [pool.submit(action, link) for link in self._links]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, ServerLost) or len(errors) == len(self._links):
                raise error
            self._say(f"{error}; going on with the others")


def _adapter_rank(folder: Path) -> int:
    """The largest rank in the adapter in `folder`."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max(int(config["r"]), *map(int, (config.get("rank_pattern") or {"": 0}).values()))
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder}: no LoRA adapter here (adapter_config.json with a rank)") from None
    if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise CheckpointError(f"{folder}: the adapter's weights are missing (adapter_model.safetensors)")
    return rank
