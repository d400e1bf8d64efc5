"""The second part of the table: leaks that read otherwise, or say nothing, until something shows them.

What a terminal, a browser, an editor or an unpacker makes of a file; `planted.py` has the plain ones.
"""

from __future__ import annotations

import base64
import binascii
import bz2
import gzip
import io
import json
import lzma
import quopri
import tarfile
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Callable

from pygments import highlight
from pygments.formatters import HtmlFormatter, TerminalFormatter
from pygments.lexers import PythonLexer

from .planted import AUTH, BENCH, CASES, COPIES, FIXTURE, LOCK, NOTES, PROMPT, README, SECRET, TEST, Planted

LOG, PAGE, PATCH = "benchmarks/run.log", "docs/page.html", "docs/change.patch"


def written(write: Callable[[io.BytesIO], None]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def named_gzip(out: io.BytesIO) -> None:
    with gzip.GzipFile(filename="regime_w.tar", fileobj=out, mode="w") as file:
        file.write(b"nothing")


def two_of_one_name(out: io.BytesIO) -> None:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("a.py", COPIES)
        archive.writestr("a.py", "nothing")


def noted_zip(out: io.BytesIO) -> None:
    with zipfile.ZipFile(out, "w") as archive:
        member = zipfile.ZipInfo("a.py")
        member.comment = b"from regime_w"
        archive.writestr(member, "nothing")


def removed_from_zip(out: io.BytesIO) -> None:
    """A member whose content is still there and which the directory no longer names."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("kept.py", "nothing")
        archive.writestr("a.py", COPIES)
        archive.filelist = archive.filelist[:1]


def noted_tar(out: io.BytesIO) -> None:
    with tarfile.open(
        fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "regime_w"}
    ) as tar:
        tar.addfile(tarfile.TarInfo("x"))


def owned_tar(out: io.BytesIO) -> None:
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("x")
        member.uname = "reward_service"
        tar.addfile(member)


def longer_tar(out: io.BytesIO) -> None:
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    out.write(COPIES.encode())


def patch(content: bytes) -> str:
    """A new file in a git patch: zlib, then base85, each row after a letter for its length."""
    packed = zlib.compress(content)
    rows = [packed[place : place + 52] for place in range(0, len(packed), 52)]
    letters = [chr(64 + len(row)) if len(row) <= 26 else chr(70 + len(row)) for row in rows]
    body = "".join(
        f"{letter}{base64.b85encode(row, pad=True).decode()}\n"
        for letter, row in zip(letters, rows, strict=True)
    )
    return f"diff --git a/x b/x\nGIT binary patch\nliteral {len(content)}\n{body}\n"


def numbered(text: str, form: str) -> str:
    return "".join(form.format(number, row) for number, row in enumerate(text.splitlines(), start=10))


def uuencoded(text: str) -> str:
    raw = text.encode()
    return "".join(binascii.b2a_uu(raw[place : place + 45]).decode() for place in range(0, len(raw), 45))


def coloured(text: str) -> str:
    return highlight(text, PythonLexer(), TerminalFormatter())


RAW = SECRET.encode()
TAGGED = highlight(AUTH, PythonLexer(), HtmlFormatter())
SVG = "".join(f'<text x="{place}" y="9">{word}</text>\n' for place, word in enumerate(PROMPT.split()))
DUMP = "\n".join(textwrap.wrap(AUTH.encode().hex(" ", 2), 40))
IMPORT = "from regime_w.scoring import score\n"

DISGUISED = [
    # as a terminal, an editor or a browser shows it
    Planted("code with line numbers", "shingles", NOTES, numbered(AUTH, "{:>6}\t{}\n")),
    Planted("code as grep finds it", "shingles", LOG, numbered(AUTH, "src/app.py:{}:{}\n").encode()),
    Planted("code in a table with line numbers", "shingles", NOTES, numbered(AUTH, "| {} | {} |\n")),
    Planted("coloured code in a log", "shingles", LOG, coloured(AUTH).encode()),
    Planted("a coloured import in a log", "names", LOG, coloured(IMPORT).encode()),
    Planted("a name between spelled colours", "names", NOTES, r"\x1b[31mreward_service\x1b[0m" + "\n"),
    Planted("highlighted code in a page", "shingles", PAGE, TAGGED.encode()),
    Planted("a prompt in a drawing, word by word", "shingles", "docs/x.svg", f"<svg>{SVG}</svg>".encode()),
    Planted("a name over two tags", "names", PAGE, b"<b>regime</b><i>_w</i>\n"),
    Planted("a name with an entity's name", "names", README, "regime&lowbar;w\n"),
    Planted("a name with a space that does not break", "names", README, "Regime&nbsp;W\n"),
    Planted("a name with Markdown's backslash", "names", NOTES, r"The package regime\_w." + "\n"),
    Planted("one escaped letter in an address", "names", NOTES, "https://host.invalid/reward%5Fservice\n"),
    Planted("one escaped space in an address", "names", NOTES, "[paper](Regime%20W.pdf)\n"),
    Planted("a prompt as repr in a log", "shingles", LOG, f"sent {PROMPT!r}\n".encode()),
    Planted("code as JSON in a log", "shingles", LOG, f"INFO {json.dumps({'x': AUTH})}\n".encode()),
    Planted(
        "code as JSON in JSON in a log", "shingles", LOG,
        f"INFO {json.dumps(json.dumps({'x': AUTH}))}\n".encode(),
    ),
    # letters of a mail
    Planted("a name in a quoted-printable mail", "names", NOTES, "from regime=5Fw.scoring import score\n"),
    Planted(
        "a prompt in a quoted-printable mail", "shingles", NOTES,
        quopri.encodestring(" ".join(PROMPT.split()).encode()).decode() + "\n",
    ),
    # a program puts it together
    Planted("a name put into a template", "names", BENCH, 'X = "%s_%s" % ("regime", "w")\n'),
    Planted("a name formatted", "names", BENCH, 'X = "{}_{}.app".format("reward", "service")\n'),
    Planted("a name by replacing a letter", "names", BENCH, 'X = "regimeXw".replace("X", "_")\n'),
    # other alphabets
    Planted("base32", "names", CASES, json.dumps({"blob": base64.b32encode(RAW).decode()})),
    Planted("base85", "names", CASES, json.dumps({"blob": base64.b85encode(RAW).decode()})),
    Planted("ascii85", "names", NOTES, base64.a85encode(RAW, adobe=True).decode() + "\n"),
    Planted("a text in a binary patch", "shingles", PATCH, patch(COPIES.encode()).encode()),
    Planted("a binary in a binary patch", "unreadable", PATCH, patch(bytes(range(256)) * 9).encode()),
    Planted("uuencoding", "names", NOTES, uuencoded(SECRET)),
    Planted("hex with spaces", "names", NOTES, RAW.hex(" ") + "\n"),
    Planted("hex as a dump has it", "shingles", NOTES, DUMP + "\n"),
    Planted("a list of hex numbers", "names", TEST, f"X = bytes([{', '.join(map(hex, RAW))}])\n"),
    Planted("a list of integers", "names", CASES, json.dumps({"blob": list(RAW)})),
    Planted("octal escapes", "names", NOTES, "".join(f"\\{byte:03o}" for byte in RAW) + "\n"),
    Planted("a name alone in base64", "names", NOTES, base64.b64encode(b"regime_w").decode() + "\n"),
    Planted("a name inside base64", "names", NOTES, base64.b64encode(b"a reward_service").decode() + "\n"),
    Planted("a name alone in hex", "names", NOTES, b"regime_w".hex().upper() + "\n"),
    Planted("a name backwards", "names", NOTES, "w_emiger\n"),
    Planted("a name turned by thirteen", "names", NOTES, "Erjneq_Freivpr\n"),
    # identifiers and numbers written otherwise
    Planted("an identifier in another case", "identifiers", NOTES, "As copiedPairs in the browser.\n"),
    Planted("an arm's name with hyphens", "identifiers", NOTES, "The arm equations-first.\n"),
    Planted("the weights as percentages", "numbers", NOTES, "They weigh 40%, 30 % and 30%.\n"),
    Planted("seeds in hex", "numbers", TEST, "SEEDS = [0x3F1, 0x7d3]\n"),
    Planted("the formula in words", "names", NOTES, "The reward adds 0.7 times the coherence.\n"),
    Planted("the formula with a sign of print", "names", NOTES, "R = 1 + 0.7 × s_wm\n"),
    # what an unpacker does not show
    Planted("the name in a gzip header", "names", FIXTURE, written(named_gzip)),
    Planted("the first of two members of one name", "shingles", FIXTURE, written(two_of_one_name)),
    Planted("a comment on a member of a zip", "names", FIXTURE, written(noted_zip)),
    Planted("a member removed from a zip's directory", "unreadable", FIXTURE, written(removed_from_zip)),
    Planted("a comment in a tar", "names", FIXTURE, written(noted_tar)),
    Planted("an owner in a tar", "names", FIXTURE, written(owned_tar)),
    Planted("text behind a tar", "unreadable", FIXTURE, written(longer_tar)),
    Planted("three bytes of gzip", "unreadable", FIXTURE, b"\x1f\x8b\x08"),
    Planted("text behind gzip", "unreadable", FIXTURE, gzip.compress(b"nothing") + COPIES.encode()),
    Planted("text behind bzip2", "unreadable", FIXTURE, bz2.compress(b"nothing") + COPIES.encode()),
    Planted("text behind xz", "unreadable", FIXTURE, lzma.compress(b"nothing") + COPIES.encode()),
    Planted("text behind zlib", "unreadable", FIXTURE, zlib.compress(b"nothing") + COPIES.encode()),
    Planted(
        "a second stream of gzip", "shingles", FIXTURE, gzip.compress(b"a\n") + gzip.compress(AUTH.encode())
    ),
    # names inside longer ones
    Planted("the private wheel's file name", "names", LOCK, "x @ file:looper_reward_service-0.1.0-py3.whl\n"),
    Planted("the service's variable", "names", NOTES, "export REWARD_SERVICE_HOME=here\n"),
    Planted("the service's name as a class", "names", BENCH, "class RewardService: ...\n"),
    Planted("a private package's extra index", "names", LOCK, "--extra-index-url https://x/reward%2Dservice/\n"),
]  # fmt: skip
