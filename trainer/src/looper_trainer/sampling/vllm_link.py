"""One vLLM server as the sampler sees it: is it there, has it the adapter, what does it answer.

`prepare` brings a server into a state to sample from, whatever happened to it. `ask` puts one request;
what may go better next time raises `TryAgain`, what never will raises `SamplerError`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import httpx

from looper_trainer.sampling.base import Completion, SamplingParams
from looper_trainer.sampling.vllm_server import SamplerError, ServerLost, VLLMServer, VLLMSettings

_UNRESPONSIVE_S = 15.0  # after this long, a server of ours that runs but does not answer is restarted
_NUCLEUS_OF_ONE = 1e-6
_RUNTIME_LORA = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"


class TryAgain(Exception):
    """A request failed in a way that a repetition may mend."""


@dataclass(frozen=True)
class Adapter:
    """A policy under a name that no server has seen before, in a folder that never changes.

    With `whole`, the folder holds the weights of the whole model instead of a LoRA adapter.
    """

    name: str
    folder: Path
    version: int
    whole: bool = False


def completion_request(
    model: str,
    prompt: Sequence[int],
    params: SamplingParams,
    n: int,
    seed: int | None,
    stop_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """The JSON body that asks for `n` completions of `prompt`, with seeds `seed`, `seed` + 1, ...

    `stop_ids` end a completion on a server that has no tokenizer to know them from.
    Every parameter is stated: what is left out, vLLM takes from the model's generation_config.json.
    """
    body = {
        "model": model,
        "prompt": list(prompt),
        "n": n,
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p if params.temperature > 0 else 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,  # the chosen token's only
        "skip_special_tokens": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # spares the server a decoding per token
    }
    if stop_ids:
        body["stop_token_ids"] = list(stop_ids)
    return body if seed is None else body | {"seed": seed}


def completions_from(reply: Any, request: Mapping[str, Any]) -> list[Completion]:
    """The completions in vLLM's `reply` to `request`, in the order of their seeds.

    Raises:
        TryAgain: the reply is not a whole and sound answer to this request.
    """
    try:
        choices = _choices(reply, request)
        if [choice["index"] for choice in choices] != list(range(request["n"])):
            raise TryAgain(f"the reply holds {len(choices)} completions, not {request['n']}")
        return [_completion(choice, request) for choice in choices]
    except (KeyError, TypeError, ValueError) as error:
        raise TryAgain(f"the reply is malformed: {error!r}") from None


def _choices(reply: Any, request: Mapping[str, Any]) -> list[Any]:
    """The choices of a reply by the model that was asked, in order."""
    if reply["model"] != request["model"]:
        raise TryAgain(f"the reply is of model {reply['model']!r}, not {request['model']!r}")
    return sorted(reply["choices"], key=lambda choice: int(choice["index"]))


def _completion(choice: Mapping[str, Any], request: Mapping[str, Any]) -> Completion:
    if choice["prompt_token_ids"] != request["prompt"]:
        raise TryAgain("the reply is to another prompt")
    # "abort" and "error" come from a server that is going down.
    if choice["finish_reason"] not in ("stop", "length"):
        raise TryAgain(f"the server broke off a completion: {choice['finish_reason']}")
    token_ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if not 1 <= len(token_ids) == len(logprobs) <= request["max_tokens"]:
        raise TryAgain(f"{len(token_ids)} token ids and {len(logprobs)} logprobs in one completion")
    return Completion(
        text=str(choice["text"]),
        token_ids=tuple(int(token) for token in token_ids),
        logprobs=_sound(logprobs),
        finish_reason=choice["finish_reason"],
    )


def _sound(logprobs: Sequence[float]) -> tuple[float, ...]:
    """`logprobs`, which must be numbers and at most 0 but for rounding."""
    if not all(math.isfinite(logprob) and logprob <= 1e-4 for logprob in logprobs):
        raise TryAgain("a logprob is no number, or positive")
    return tuple(min(float(logprob), 0.0) for logprob in logprobs)


def reference_request(model: str, prompt: Sequence[int], completions: Sequence[Completion]) -> dict[str, Any]:
    """The JSON body that asks how likely `model` finds the tokens of `completions` after `prompt`."""
    texts = [[*prompt, *completion.token_ids] for completion in completions]
    return {
        "model": model, "prompt": texts, "n": 1, "max_tokens": 1, "temperature": 0.0, "top_p": 1.0,
        "prompt_logprobs": 0, "return_token_ids": True,
    }  # fmt: skip


def with_reference(
    completions: Sequence[Completion], reply: Any, request: Mapping[str, Any]
) -> list[Completion]:
    """`completions` with the logprobs in vLLM's `reply` to their `reference_request`.

    Raises:
        TryAgain: the reply is not a whole and sound answer to this request.
    """
    try:
        choices = _choices(reply, request)
        if [choice["prompt_token_ids"] for choice in choices] != request["prompt"]:
            raise TryAgain("the reply is to other prompts")
        found = []
        for completion, choice in zip(completions, choices, strict=True):
            tokens = completion.token_ids
            places = choice["prompt_logprobs"][-len(tokens) :]
            pairs = zip(tokens, places, strict=True)
            logprobs = _sound([float(place[str(token)]["logprob"]) for token, place in pairs])
            found.append(replace(completion, reference_logprobs=logprobs))
    except (KeyError, TypeError, ValueError) as error:
        raise TryAgain(f"the reply is malformed: {error!r}") from None
    return found


class VLLMLink:
    """The way to one server: `server` is ours to restart; a bare `url` is someone else's to mend."""

    def __init__(
        self,
        settings: VLLMSettings,
        *,
        url: str = "",
        server: VLLMServer | None = None,
        say: Callable[[str], None],
    ) -> None:
        self.server = server
        self.prepared = 0  # how often; tells a worker whether another has recovered the server meanwhile
        self._settings = settings
        self._url = url
        self._say = say
        self._base_model = ""
        self._holds = ""  # the whole weights that were loaded last, and into which process
        self._control = httpx.Client(timeout=settings.request_timeout_s, trust_env=False)

    @property
    def url(self) -> str:
        """Where the server is; a restart moves it."""
        return self.server.url if self.server is not None else self._url

    def close(self) -> None:
        """Close the connections, not the server."""
        self._control.close()

    def model(self, adapter: Adapter | None) -> str:
        """The name that asks for `adapter`, or for the base model, whose place whole weights take."""
        return self._base_model if adapter is None or adapter.whole else adapter.name

    def prepare(self, adapter: Adapter | None, cancelled: Event) -> None:
        """Wait until the server answers, restarting one of ours, and load `adapter` if it lacks it.

        Raises:
            ServerLost: it does not come back.
            SamplerError: it refuses.
        """
        since = time.monotonic()
        lost = ""
        while not cancelled.is_set():
            try:
                if self.server is not None and not self.server.is_up:
                    self.server.restart(cancelled)
                    since = time.monotonic()
                self._settle(adapter, verify=self.prepared == 0 or bool(lost))
            except (httpx.TransportError, TryAgain) as error:
                waited = time.monotonic() - since
                if not lost:
                    lost = str(error) or type(error).__name__
                    self._say(f"vLLM at {self.url} does not answer ({lost}); waiting for it")
                if self.server is not None and waited > _UNRESPONSIVE_S:
                    self.server.stop()
                elif self.server is None and waited > self._settings.give_up_after_s:
                    raise ServerLost(
                        f"vLLM at {self.url} has not answered for {waited:.0f} s ({lost}); "
                        "start it again and resume, or take it out of urls"
                    ) from None
                cancelled.wait(0.5)
            else:
                if lost:
                    self._say(f"vLLM at {self.url} answers again")
                self.prepared += 1
                return
        raise ServerLost(f"waiting for vLLM at {self.url} was cancelled")

    def unload(self, adapter: Adapter) -> None:
        """Remove `adapter` from the server; one that is away, or lacks it, has nothing to remove."""
        if adapter.whole:
            return  # the next weights take their place
        try:
            reply = self._control.post(
                f"{self.url}/v1/unload_lora_adapter", json={"lora_name": adapter.name}, timeout=10.0
            )
        except httpx.TransportError:
            return
        if reply.status_code not in (200, 404):
            self._say(f"vLLM at {self.url} keeps adapter {adapter.name}: {_message(reply)}")

    def order(self, path: str) -> None:
        """Have a server of ours do what vLLM's development mode offers at `path`, such as /sleep.

        Raises:
            SamplerError: it does not.
        """
        try:
            reply = self._control.post(f"{self.url}{path}")
        except httpx.TransportError as error:
            raise SamplerError(f"vLLM at {self.url} does not answer {path}: {error}; see its log") from None
        if reply.status_code != 200:
            raise SamplerError(f"vLLM at {self.url} does not do {path}: {_message(reply)}; see its log")

    async def ask(self, client: httpx.AsyncClient, request: Mapping[str, Any]) -> list[Completion]:
        """The completions that the server makes for `request`."""
        return completions_from(await self._post(client, request), request)

    async def ask_reference(
        self, client: httpx.AsyncClient, prompt: Sequence[int], completions: Sequence[Completion]
    ) -> list[Completion]:
        """`completions` of `prompt` with the base model's logprobs."""
        request = reference_request(self._base_model, prompt, completions)
        return with_reference(completions, await self._post(client, request), request)

    async def _post(self, client: httpx.AsyncClient, request: Mapping[str, Any]) -> Any:
        try:
            reply = await client.post(f"{self.url}/v1/completions", json=request)
        except httpx.TransportError as error:
            raise TryAgain(f"{type(error).__name__}: {error}") from None
        # 404: the server was restarted by others and has lost the adapter; `prepare` loads it again.
        _check(reply, self.url, also_retry=(404,))
        return _json(reply)

    def _settle(self, adapter: Adapter | None, *, verify: bool) -> None:
        health = self._control.get(f"{self.url}/health", timeout=10.0)
        if health.status_code == 503 and self.server is not None:
            self.server.stop()  # its engine is dead, and the front end alone will not come back
        _check(health, self.url)
        reply = self._control.get(f"{self.url}/v1/models", timeout=10.0)
        _check(reply, self.url)
        try:
            cards = {str(card["id"]): card.get("parent") for card in _json(reply)["data"]}
            base_models = [name for name, parent in cards.items() if parent is None]
            self._base_model = self._base_model or base_models[0]
        except (KeyError, TypeError, AttributeError, IndexError):
            raise SamplerError(f"{self.url} is no vLLM server: /v1/models names no model") from None
        if self._base_model not in base_models:
            raise SamplerError(f"vLLM at {self.url} serves {base_models[0]} now, not {self._base_model}")
        if verify:
            self._check_logprobs()
        if adapter is not None and adapter.whole:
            self._load_whole(adapter)
        elif adapter is not None and adapter.name not in cards:
            self._load(adapter)

    def _check_logprobs(self) -> None:
        """One token from a nucleus of one: its probability is 1, unless logprobs are of the raw logits."""
        params = SamplingParams(max_new_tokens=1, temperature=1.0, top_p=_NUCLEUS_OF_ONE)
        request = completion_request(self._base_model, [0], params, n=1, seed=0)
        reply = self._control.post(f"{self.url}/v1/completions", json=request)
        _check(reply, self.url)
        if completions_from(_json(reply), request)[0].logprobs[0] < -1e-6:
            raise SamplerError(
                f"vLLM at {self.url} reports logprobs of the raw logits; "
                "start it with --logprobs-mode processed_logprobs"
            )

    def _load(self, adapter: Adapter) -> None:
        reply = self._control.post(
            f"{self.url}/v1/load_lora_adapter",
            json={"lora_name": adapter.name, "lora_path": str(adapter.folder)},
        )
        if reply.status_code == 404 and _message(reply) == "Not Found":
            raise SamplerError(f"vLLM at {self.url} cannot load adapters; {_RUNTIME_LORA}")
        # vLLM reports an adapter that does not fit as an internal error (500), so ask whether it lives.
        if reply.status_code != 200:
            _check(self._control.get(f"{self.url}/health", timeout=10.0), self.url)
            raise SamplerError(
                f"vLLM at {self.url} cannot load the adapter in {adapter.folder}, a folder that it must be "
                f"able to read: {_message(reply)}"
            )

    def _load_whole(self, weights: Adapter) -> None:
        """Put `weights` in the place of the model's own, unless this very process holds them already."""
        if self.server is None:
            raise SamplerError(
                f"{self.url}: whole weights are loaded into a server of our own only, which cannot be "
                "restarted without our knowing; take it out of urls, or train an adapter"
            )
        wanted = f"{weights.name}@{self.server.pid}"
        if self._holds == wanted:
            return
        self._holds = ""
        order = {"method": "reload_weights", "kwargs": {"weights_path": str(weights.folder)}}
        # Keys and values of the old weights would answer for the new ones, hence the second call.
        for path, body in (("/collective_rpc", order), ("/reset_prefix_cache", None)):
            reply = self._control.post(f"{self.url}{path}", json=body)
            if reply.status_code != 200:
                _check(self._control.get(f"{self.url}/health", timeout=10.0), self.url)
                raise SamplerError(
                    f"vLLM at {self.url} cannot load the weights in {weights.folder}: {_message(reply)}; see "
                    "its log, or train an adapter"
                )
        self._holds = wanted


def _check(reply: httpx.Response, url: str, *, also_retry: tuple[int, ...] = ()) -> None:
    if reply.status_code == 200:
        return
    said = f"HTTP {reply.status_code}: {_message(reply)}"
    if reply.status_code >= 500 or reply.status_code in (408, 429, *also_retry):
        raise TryAgain(said)
    raise SamplerError(f"vLLM at {url} refuses: {said}")


def _message(reply: httpx.Response) -> str:
    """What the server says is wrong, on one line."""
    try:
        body = reply.json()
        error = body.get("error", body)
        text = str(error.get("message") or error.get("detail") or error)
    except (ValueError, AttributeError):
        text = reply.text
    return " ".join(text.split())[:300]


def _json(reply: httpx.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        raise TryAgain("the reply is not JSON") from None
