"""Search a built image: every file of every layer, its history, its environment.

    python scripts/images/scan.py FOLDER [--public] [--no-tools] [--base-layers N]

FOLDER is what `buildah push --disable-compression IMAGE dir:FOLDER` writes. Layers are read one by one, so
that a file which a later layer removes is seen. The first N (default 1) come from the base image.

| looks for | where |
|---|---|
| private keys, API keys, tokens, passwords in addresses | every file, environment, labels, history |
| names of files that hold secrets or history (`.env`, `pepper`, `.git`, ...) | every layer |
| set-user-id files, root as the user | above the base |
| shells, package managers, compilers | `--no-tools`: every layer |
| names of private code in any content, also in binaries | `--public`: every layer, environment, history |
| all gates of the export | `--public`: our packages, and files above the base that no wheel vouches for |
| a file that differs from its wheel's RECORD, a package outside constraints.txt | above the base |

Exit code 1: something was found, one line each.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts/export"), str(ROOT / "scripts")]

from fingerprints import Fingerprints  # noqa: E402
from gates import Gates  # noqa: E402

OURS = {"looper_schemas", "looper_trainer", "looper_eval", "reward_service", "regime_w"}
PRIVATE_BYTES = (
    b"regime_w",
    b"regime-w",
    b"reward_service",
    b"reward-service",
    b"looper-canary-",
)
TOOLS = {
    "sh",
    "bash",
    "dash",
    "busybox",
    "apt",
    "apt-get",
    "dpkg",
    "pip",
    "pip3",
    "gcc",
    "cc",
    "make",
    "perl",
    "curl",
}
_SECRET_NAMES = re.compile(
    r"(^|/)(\.env|\.git|\.netrc|\.pgpass|\.ssh|pepper|keys\.json|id_(rsa|ecdsa|ed25519)|audit\.jsonl"
    r"|[^/]+\.(key|pgpass|password))(/|$)"
)
_SECRETS = {
    "a private key": rb"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[\s\\nr\"']{1,8}[A-Za-z0-9+/=\s\\]{100}",
    "an API key of the service": rb"rw_[0-9a-f]{12}_[0-9a-f]{64}",
    "a cloud key": rb"(?<![A-Z0-9])AKIA[0-9A-Z]{16}(?![A-Z0-9])",
    "a hub token": rb"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{34}|gh[pousr]_[A-Za-z0-9]{36}|pypi-AgEI[\w-]{40})",
    "a password in an address": (
        rb"(?i)https?://[a-z0-9._-]{1,40}:(?!pass|secret|xxx|\*|\$|\{|%)[^\s/:@'\"<>{}]{6,60}@[a-z0-9-]+\."
    ),
}
_SECRET = {what: re.compile(pattern) for what, pattern in _SECRETS.items()}
_HINTS = {
    "a private key": b"PRIVATE KEY-----", "an API key of the service": b"rw_", "a cloud key": b"AKIA",
    "a hub token": b"_", "a password in an address": b"@",
}  # fmt: skip


class Found(NamedTuple):
    """One reason to ship nothing."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Image:
    """An image as `dir:` transport writes it; `files` and `size` count what was read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = json.loads((folder / "manifest.json").read_bytes())
        self.config: dict[str, Any] = json.loads(self._blob(manifest["config"]["digest"]).read_bytes())
        self.layers = [self._blob(layer["digest"]) for layer in manifest["layers"]]
        self.files = self.size = 0

    def _blob(self, digest: str) -> Path:
        return self.folder / digest.removeprefix("sha256:")

    def members(self, layer: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
        """Everything in one layer that is no folder, with its content."""
        with tarfile.open(layer) as tar:
            for member in tar:
                if member.isdir():
                    continue
                file = tar.extractfile(member) if member.isfile() else None
                data = b"" if file is None else file.read()
                self.files += 1
                self.size += len(data)
                yield member, data


def scan(image: Image, *, public: bool, no_tools: bool, base_layers: int = 1) -> Iterator[Found]:
    """Everything that is wrong with `image`."""
    gates = Gates(Fingerprints.of(ROOT)) if public else None
    yield from _metadata(image.config, gates)
    for number, layer in enumerate(image.layers):
        ours = number >= base_layers
        vouched = _records(image, layer) if ours else {}
        for member, data in image.members(layer):
            name = "/" + member.name.removeprefix("./").lstrip("/")
            where = f"layer {number + 1} {name}"
            # What a published wheel of others holds, a test token for example, is no secret of ours.
            theirs = _vouched(name, data, vouched) and _package(name).partition("-")[0] not in OURS
            # Debian's libgnutls carries the keys of its self-test.
            theirs = theirs or (not ours and data[:4] == b"\x7fELF")
            yield from (Found(where, what) for what in _secret(name, b"" if theirs else data))
            if no_tools and PurePosixPath(name).name in TOOLS and "/bin/" in f"/{name}":
                yield Found(where, "is a tool that a service does not need")
            if public:
                yield from (Found(where, f"has {needle.decode()!r}") for needle in _private(name, data))
            if not ours:
                continue
            if member.isfile() and member.mode & 0o6000:
                yield Found(where, "runs as another user than its caller")
            yield from _own(where, name, data, member, vouched, gates)


def _metadata(config: dict[str, Any], gates: Gates | None) -> Iterator[Found]:
    inner = config["config"]
    user = str(inner.get("User", ""))
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user):
        yield Found("user", f"is {user or 'root'}, not a number above 0")
    texts = [(f"environment {row.partition('=')[0]}", row) for row in inner.get("Env") or []]
    texts += [(f"label {key}", f"{key}={value}") for key, value in (inner.get("Labels") or {}).items()]
    texts += [(key, json.dumps(inner.get(key))) for key in ("Entrypoint", "Cmd", "Healthcheck", "Volumes")]
    for number, step in enumerate(config.get("history", []), start=1):
        texts.append(
            (f"history {number}", " ".join(str(step.get(key, "")) for key in ("created_by", "comment")))
        )
    for where, text in texts:
        yield from (Found(where, what) for what in _secret("", text.encode()))
        name, _, value = text.partition("=")
        if re.search(r"(KEY|SECRET|TOKEN|PASSWORD)$", name) and where.startswith("environment") and value:
            yield Found(where, "is a secret by its name")
        if gates is not None:
            yield from (Found(where, f"has {needle.decode()!r}") for needle in _private("", text.encode()))
            yield from (Found(where, finding.what) for finding in gates.content(text.encode(), where))


def _secret(name: str, data: bytes) -> Iterator[str]:
    if _SECRET_NAMES.search(name):
        yield "is named like a secret or a history"
    for what, pattern in _SECRET.items():
        if _HINTS[what] in data and pattern.search(data):
            yield f"has {what}"


def _private(name: str, data: bytes) -> Iterator[bytes]:
    lowered = data.lower() + b"\n" + name.lower().encode()
    if b"regime w" in lowered and (spaced := re.search(rb"regime w(?![a-z0-9])", lowered)):
        yield spaced[0]
    yield from (needle for needle in PRIVATE_BYTES if needle in lowered)


def _records(image: Image, layer: Path) -> dict[str, str]:
    """The sha256 (as RECORD writes it) of every file that a wheel in `layer` installed."""
    found: dict[str, str] = {}
    with tarfile.open(layer) as tar:
        for member in tar:
            if re.search(r"\.dist-info/RECORD$", member.name) and (file := tar.extractfile(member)):
                top = PurePosixPath("/", member.name).parent.parent
                for path, digest, _ in csv.reader(io.StringIO(file.read().decode("utf-8"))):
                    found[str(_joined(top, path))] = digest.removeprefix("sha256=")
    return found


def _joined(top: PurePosixPath, path: str) -> PurePosixPath:
    place = top
    for part in PurePosixPath(path).parts:
        place = place.parent if part == ".." else place / part
    return place


def _package(name: str) -> str:
    """The top folder or file below site-packages that `name` lies in; empty elsewhere."""
    parts = PurePosixPath(name).parts
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts[:-1] else ""


def _vouched(name: str, data: bytes, vouched: dict[str, str]) -> bool:
    """Whether a wheel's RECORD states this content for `name`."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return vouched.get(name) == digest


def _own(
    where: str, name: str, data: bytes, member: tarfile.TarInfo, vouched: dict[str, str], gates: Gates | None
) -> Iterator[Found]:
    parts, package = PurePosixPath(name).parts, _package(name)
    if match := re.fullmatch(r"([\w.]+)-([^-]+)\.dist-info", package):
        if parts[-1] == "METADATA" and not _known(match[1], match[2]):
            yield Found(where, f"{match[1]} {match[2]} is not in constraints.txt")
        if parts[-1] in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
            return
    stated = _vouched(name, data, vouched)
    if name in vouched and vouched[name] and not stated:
        yield Found(where, "differs from its wheel's RECORD")
    ours = package.partition("-")[0] in OURS
    if gates is not None and (ours or not stated) and member.isfile() and not name.endswith("/pyvenv.cfg"):
        yield from (Found(f"{where}:{f.line}", f"[{f.gate}] {f.what}") for f in gates.content(data, name))


def _known(name: str, version: str) -> bool:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    plain = re.sub(r"[-_.]+", "-", name).lower()
    if plain.startswith("looper-") or plain == "torch":
        return True
    return f"{plain}=={version}" in {re.sub(r"[-_.]+(?=.*==)", "-", pin).lower() for pin in pins}


def main(argv: Sequence[str] | None = None) -> int:
    """0: nothing found; 1: something was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--public", action="store_true", help="nothing private may be in it")
    parser.add_argument("--no-tools", action="store_true", help="no shell, no package manager, no compiler")
    parser.add_argument("--base-layers", type=int, default=1, metavar="N")
    options = parser.parse_args(argv)
    image = Image(options.folder)
    found = list(
        scan(image, public=options.public, no_tools=options.no_tools, base_layers=options.base_layers)
    )
    for one in found:
        print(one)
    print(
        f"{options.folder.name}: {len(image.layers)} layers, {image.files} files, "
        f"{image.size / 2**20:.0f} MiB, "
        f"{len(image.config.get('history', []))} steps of history, {len(found)} findings"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
