"""Requests that go wrong in every way we could think of, all from one seeded generator."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from target import CANARY, POISON, Sent

_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 10**18, -(10**18), 10**19, 10**400, 0.5, -0.0,
    1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"), "", " ", "\0", "\ud800", "\udc00\ud800", "\ufeff", "\u202e",
    "\U0001f600", "train", "components", "reward", "arm_gated", "question", "1.0", "2.0", "8", CANARY, [], {},
    [[]], {CANARY: CANARY}, [CANARY] * 3, {"": ""}, "x" * 201, "x" * 2000, {"id": "q", "arms": []},
]  # fmt: skip
_TOKENS: list[bytes] = [
    b"NaN", b"-Infinity", b"1e999", b"-0", b"01", b"0x1", b"1.", b".5", b"\\u0000", b"\\ud800", b"\\udc00",
    b"\\ud83d\\ude00", b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\xaf",
    b"\xf4\x90\x80\x80",
    b"[", b"]", b"{", b"}", b'"', b"\\", b",", b":", b"\n", b"\x0b", b"null", b"true", b"/*", b"//",
    b"[" * 40,
    b'{"a":' * 20, b"9" * 30, b'"id":', b'"questions":[', b'"arms":[],', b"\r\n\r\n", CANARY.encode(),
    POISON.encode(), b"%s%n", b"<script>", b"' OR 1=1 --", b"\\u007b",
]  # fmt: skip
_METHODS = [
    "GET",
    "POST",
    "PUT",
    "DELETE",
    "PATCH",
    "HEAD",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    CANARY.upper(),
    "",
    "post",
]
_PATHS = [
    "/livez", "/readyz", "/v1/info", "/v1/score", "/v1/arms/rollout", "/", "", "/docs",
    "/openapi.json", "/redoc", "/metrics",
    f"/{CANARY}", "/v1/score/", "//v1/score", "/v1/../v1/score", "/v1/score%00", "/v1/score\0", "/v1/score;a",
    "/V1/SCORE", "/v1/score\n", "/\ufffd", "/v1/" + "a" * 3000, f"/v1/score/{CANARY}", "/livez/", "*",
]  # fmt: skip
_TYPES = [
    b"application/json", b"application/json; charset=utf-8", b'application/json;charset="UTF-8"',
    b"text/plain", b"",
    b"application/json; charset=utf-16", b"multipart/form-data; boundary=x",
    b"application/x-www-form-urlencoded",
    b"application/json, text/html", b"application/json;", b"\xff", CANARY.encode(),
    b"application/octet-stream",
]  # fmt: skip
_DEADLINES = [
    b"1",
    b"5",
    b"1000",
    b"0",
    b"-1",
    b"1.5",
    b"",
    b"9" * 9,
    b"9" * 10,
    b"1e3",
    b"\xb2",
    CANARY.encode(),
]
_ODD_HEADERS = [
    (b"content-encoding", b"gzip"), (b"content-encoding", b"identity"), (b"transfer-encoding", b"chunked"),
    (b"expect", b"100-continue"), (b"accept-encoding", b"gzip, br"), (b"range", b"bytes=0-1"),
    (b"host", CANARY.encode()),
    (b"x-forwarded-for", CANARY.encode()), (b"cookie", CANARY.encode()),
    (b"x-http-method-override", b"DELETE"),
    (b"content-length", b"0"), (b"content-length", b"-1"), (b"content-length", b"99999999999999"),
    (b"content-length", b"+5"),
    (b"content-length", b"\xb2"), (b"origin", CANARY.encode()), (b"x-request-id", CANARY.encode()),
    (b"traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"), (b"\xff", b"\xff"),
    (b"", b""), (b"x", b"\0\r\n"),
]  # fmt: skip


class Mutator:
    """An endless supply of requests; the same for the same seed."""

    def __init__(self, seed: int, keys: dict[str, str]) -> None:
        self._random = random.Random(seed)
        self._keys = keys
        usual = [keys["full"]] * 16 + [keys["reward"]] * 8
        self._good = [*usual, keys["spent"], keys["slow"]]

    def request(self) -> Sent:
        """The next one: usually one part of it is spoiled, and what is looked at later is sound."""
        chance = self._random
        spoiled = chance.choices(("tree", "bytes", "head", "nothing"), (40, 35, 20, 5))[0]
        message = self._message()
        if spoiled == "tree":
            for _ in range(chance.choice((1, 1, 1, 2, 5))):
                message = self._spoil_tree(message)
        body = self._written(message)
        if spoiled == "bytes":
            body = self._spoil_bytes(body)
        if spoiled == "head":
            return self._spoiled_head(body)
        headers = [
            (b"authorization", b"Bearer " + chance.choice(self._good).encode()),
            (b"content-type", b"application/json"),
            (b"x-anything", CANARY.encode()),
        ]
        if chance.random() < 0.3:
            headers.append((b"idempotency-key", f"{CANARY}-{chance.randrange(200)}".encode()))
        if chance.random() < 0.1:
            headers.append((b"x-deadline-ms", chance.choice(_DEADLINES)))
        if chance.random() < 0.5:
            headers.append((b"content-length", str(len(body)).encode()))
        return Sent("POST", "/v1/score", b"", headers, self._chunks(body), chance.random() < 0.02)

    # --- the parts -------------------------------------------------------------------------------------

    def _message(self) -> dict[str, Any]:
        chance = self._random
        questions = []
        for n in range(chance.choice((1, 1, 1, 2, 3, 7))):
            arms = [
                {"id": f"{i}", "full_text": f"{CANARY} 3 + 5 = {chance.randrange(9)}\n#### 8"}
                for i in range(chance.choice((0, 1, 2, 3, 3, 7)))
            ]
            text = f"{CANARY} 3 + 5?" + (POISON if chance.random() < 0.02 else "")
            questions.append({"id": f"q{n}", "question": text, "gold_answer": "8", "arms": arms})
        return {
            "contract": "1.0",
            "run_id": CANARY,
            "step": chance.randrange(50),
            "purpose": chance.choice(("train", "rollout", "eval")),
            "reward_mode": chance.choice(("question", "arm", "arm_gated")),
            "disclosure": chance.choice(("reward", "components")),
            "questions": questions,
        }

    def _written(self, message: Any) -> bytes:
        chance = self._random
        text = json.dumps(
            message, ensure_ascii=chance.random() < 0.5, indent=chance.choice((None, None, None, 1))
        )
        return text.encode("utf-8", "surrogatepass")

    def _chunks(self, body: bytes) -> list[bytes]:
        chance = self._random
        if chance.random() < 0.8:
            return [body]
        cuts = sorted(chance.randrange(len(body) + 1) for _ in range(chance.randrange(1, 6)))
        return [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]

    def _spoil_tree(self, message: Any) -> Any:
        """`message` with one value replaced, dropped, added, copied or wrapped."""
        chance = self._random
        message = copy.deepcopy(message)
        node = message
        while isinstance(node, dict | list) and node:
            place = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
            inner = node[place]
            if isinstance(inner, dict | list) and inner and chance.random() < 0.75:
                node = inner
                continue
            what = chance.randrange(6)
            if what <= 1:
                node[place] = chance.choice(_VALUES)
            elif what == 2:
                del node[place]
            elif what == 3:
                value = chance.choice((inner, chance.choice(_VALUES)))
                if isinstance(node, dict):
                    node[chance.choice((CANARY, "id", "arms", "Step", "", "__proto__", "s_end"))] = value
                else:
                    node.extend([value] * chance.choice((1, 2, 300)))
            elif what == 4:
                for _ in range(chance.choice((1, 3, 20, 200))):
                    inner = chance.choice(([inner], {"a": inner}))
                node[place] = inner
            else:
                node[place] = str(inner) if not isinstance(inner, str) else [inner]
            break
        return message

    def _spoil_bytes(self, body: bytes) -> bytes:
        """`body` after some edits that know nothing of JSON."""
        chance = self._random
        spoiled = bytearray(body)
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            at = chance.randrange(len(spoiled) + 1)
            end = min(len(spoiled), at + chance.choice((1, 1, 3, 20, 200)))
            what = chance.randrange(9)
            if what == 0 and at < len(spoiled):
                spoiled[at] ^= 1 << chance.randrange(8)
            elif what == 1:
                spoiled.insert(at, chance.randrange(256))
            elif what == 2:
                del spoiled[at:end]
            elif what == 3:
                spoiled[at:at] = spoiled[at:end] * chance.choice((1, 1, 50))
            elif what in (4, 5):
                spoiled[at:at] = chance.choice(_TOKENS)
            elif what == 6:
                spoiled[at:end] = chance.choice(_TOKENS)
            elif what == 7:
                del spoiled[at:]
            else:
                text = spoiled.decode("utf-8", "replace")
                spoiled = bytearray(
                    text.encode(chance.choice(("utf-8-sig", "utf-16", "utf-32-le", "cp037")), "replace")
                )
        return bytes(spoiled)

    def _spoiled_head(self, body: bytes) -> Sent:
        chance = self._random
        key = chance.choice(list(self._keys.values()))
        token = chance.choice(
            (
                key,
                key,
                key,
                key[:-1],
                key + "0",
                key.upper(),
                CANARY,
                "",
                key.replace("_", "-"),
                "rw_" + "\xe9" * 99,
            )
        )
        authorization = chance.choice(("Bearer ", "Bearer ", "bearer ", "Basic ", "", "Bearer\t")) + token
        headers = [(b"authorization", authorization.encode("latin-1"))]
        if chance.random() < 0.1:
            headers *= chance.choice((0, 2))
        headers.append((b"content-type", chance.choice(_TYPES)))
        for _ in range(chance.choice((0, 1, 1, 3))):
            headers.append(chance.choice(_ODD_HEADERS))
        if chance.random() < 0.3:
            headers.append(
                (b"idempotency-key", chance.choice((b"a", b"", b" ", b"\xff", b"x" * 201, CANARY.encode())))
            )
        if chance.random() < 0.3:
            headers.append((b"x-deadline-ms", chance.choice(_DEADLINES)))
        if chance.random() < 0.05:
            headers.extend([(b"x", b"y" * 100)] * chance.choice((5, 300)))
        chance.shuffle(headers)
        method = chance.choice(("POST", "POST", "GET", chance.choice(_METHODS)))
        path = chance.choice(("/v1/score", "/v1/score", chance.choice(_PATHS)))
        query = chance.choice((b"", b"", f"{CANARY}={CANARY}".encode(), b"\xff&=%00", b"a" * 5000))
        return Sent(method, path, query, headers, self._chunks(body), chance.random() < 0.05)
