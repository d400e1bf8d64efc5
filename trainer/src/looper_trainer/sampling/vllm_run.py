"""One call of the vLLM sampler: its requests, spread over the servers, repeated where they fail.

An event loop in a thread of its own keeps a bounded number of requests in flight to each server; all servers
take their work from one queue, so a slow one gets less. A request that fails goes back into the queue
before its server is recovered, so that another server may take it meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

import httpx

from looper_trainer.sampling.base import Completion, SamplingParams
from looper_trainer.sampling.vllm_link import Adapter, TryAgain, VLLMLink, completion_request
from looper_trainer.sampling.vllm_server import SamplerError, ServerLost, VLLMSettings

_ATTEMPTS = 5  # of one request; a server's outage counts once, however long
_SEEDS = 2**62  # vLLM takes 64-bit signed seeds and adds to them


@dataclass
class _Request:
    """The completions `places` of question `index`: consecutive seeds from `seed` on."""

    index: int
    places: list[int]
    seed: int | None
    n: int
    attempts: int = 0
    completions: list[Completion] | None = None  # they stay while their reference is asked for again


class Run:
    """One call of `sample_iter`: an event loop in a thread of its own, results through a queue."""

    def __init__(
        self,
        links: Sequence[VLLMLink],
        settings: VLLMSettings,
        adapter: Adapter | None,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[Sequence[int]],
        say: Callable[[str], None],
        stop_ids: Sequence[int] = (),
    ) -> None:
        self._stop_ids = stop_ids
        self._links, self._settings, self._adapter, self._say = links, settings, adapter, say
        self._prompts, self._params = prompts, params
        self._found: list[list[Completion | None]] = [[None] * len(row) for row in seeds]
        self._requests = [
            request
            for index, row in enumerate(seeds)
            for request in plan_requests(index, row, params.temperature == 0, settings.seeded)
        ]
        self._out: SimpleQueue[tuple[int, list[Completion]] | BaseException | None] = SimpleQueue()
        self._cancelled = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()  # all found, or cancelled
        self._work: asyncio.Queue[_Request] = asyncio.Queue()
        self._left = len(self._requests)

    def results(self) -> Generator[tuple[int, list[Completion]]]:
        """What `sample_iter` yields."""
        yield from ((index, []) for index, row in enumerate(self._found) if not row)
        if not self._requests:
            return
        thread = threading.Thread(target=self._thread, name="vllm-sampler", daemon=True)
        thread.start()
        try:
            while (item := self._out.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._cancel()
            thread.join()

    def _cancel(self) -> None:
        self._cancelled.set()
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._over.set)

    def _thread(self) -> None:
        try:
            asyncio.run(self._main())
            self._out.put(None)
        except BaseException as error:
            self._out.put(error)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._cancelled.is_set():
            return
        for request in self._requests:
            self._work.put_nowait(request)
        # Whole questions in flight, also where scattered seeds make several requests of one; an even share
        # at most, else the first server would take the whole of a small batch.
        each = max(Counter(request.index for request in self._requests).values())
        share = math.ceil(len(self._requests) / len(self._links))
        per_link = min(self._settings.connections * each, share)
        tls = ssl.create_default_context()
        serving = {asyncio.create_task(self._serve(link, per_link, tls)) for link in self._links}
        over = asyncio.create_task(self._until_over())
        try:
            while not over.done():
                ended, _ = await asyncio.wait({over, *serving}, return_when=asyncio.FIRST_COMPLETED)
                # A server is served until it is lost, or something is wrong with the request.
                for task in ended - {over}:
                    serving.discard(task)
                    error = task.exception()
                    assert error is not None
                    if not isinstance(error, ServerLost) or not serving:
                        raise error
                    self._say(f"{error}; going on with the others")
        finally:
            self._cancelled.set()
            await _end({over, *serving})

    async def _until_over(self) -> None:
        await self._over.wait()

    async def _serve(self, link: VLLMLink, connections: int, tls: ssl.SSLContext) -> None:
        await asyncio.to_thread(link.prepare, self._adapter, self._cancelled)
        ready = asyncio.Event()  # not while the server is being recovered
        ready.set()
        workers = {asyncio.create_task(self._worker(link, ready, tls)) for _ in range(connections)}
        try:
            await asyncio.gather(*workers)
        finally:
            await _end(workers)

    async def _worker(self, link: VLLMLink, ready: asyncio.Event, tls: ssl.SSLContext) -> None:
        # A client each: for every request a client's pool compares all of its connections with each other.
        timeout = httpx.Timeout(self._settings.request_timeout_s, connect=10.0)
        async with httpx.AsyncClient(timeout=timeout, trust_env=False, verify=tls) as client:
            await self._work_off(client, link, ready)

    async def _work_off(self, client: httpx.AsyncClient, link: VLLMLink, ready: asyncio.Event) -> None:
        while True:
            await ready.wait()
            request = await self._work.get()
            if not ready.is_set():  # the server failed while this worker was idle: no attempt to waste on it
                self._work.put_nowait(request)
                continue
            prepared = link.prepared
            try:
                completions = await self._ask(client, link, request)
            except TryAgain as error:
                recoverer = ready.is_set() and link.prepared == prepared
                if recoverer:
                    ready.clear()
                request.attempts += 1
                self._work.put_nowait(request)
                if request.attempts >= _ATTEMPTS:
                    raise SamplerError(
                        f"vLLM at {link.url} failed {_ATTEMPTS} times on one prompt: {error}"
                    ) from None
                if recoverer:
                    await asyncio.to_thread(link.prepare, self._adapter, self._cancelled)
                    ready.set()
                await asyncio.sleep(0.1 * 2**request.attempts)
            except asyncio.CancelledError:
                self._work.put_nowait(request)  # this server is lost; another may take it
                raise
            else:
                if link.server is not None:
                    link.server.has_worked()
                self._deliver(request, completions)

    async def _ask(
        self, client: httpx.AsyncClient, link: VLLMLink, request: _Request
    ) -> Sequence[Completion]:
        if request.completions is None:
            request.completions = await link.ask(client, self._body(link, request))
        if not self._params.with_reference:
            return request.completions
        return await link.ask_reference(client, self._prompts[request.index], request.completions)

    def _body(self, link: VLLMLink, request: _Request) -> dict[str, object]:
        prompt = self._prompts[request.index]
        model = link.model(self._adapter)
        return completion_request(model, prompt, self._params, request.n, request.seed, self._stop_ids)

    def _deliver(self, request: _Request, completions: Sequence[Completion]) -> None:
        row = self._found[request.index]
        for j, place in enumerate(request.places):
            row[place] = completions[j % request.n]  # greedy: one completion stands for all
        self._left -= 1
        if not self._left:
            self._over.set()
        whole = [completion for completion in row if completion is not None]
        if len(whole) == len(row):
            self._out.put((request.index, whole))


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def plan_requests(index: int, seeds: Sequence[int], greedy: bool, seeded: bool) -> list[_Request]:
    """The requests that give question `index` one completion for each of `seeds`."""
    places = list(range(len(seeds)))
    if not places:
        return []
    if greedy:
        return [_Request(index, places, None, n=1)]
    if not seeded:
        return [_Request(index, places, None, n=len(places))]
    requests: list[_Request] = []
    for place in places:
        seed = seeds[place] % _SEEDS
        last = requests[-1] if requests else None
        if last is not None and last.seed is not None and seed == last.seed + last.n:
            last.places.append(place)
            last.n += 1
        else:
            requests.append(_Request(index, [place], seed, n=1))
    return requests
