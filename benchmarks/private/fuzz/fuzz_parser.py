"""Coverage-guided fuzzing of the strict JSON parser by atheris (libFuzzer), judged by `oracle`.

    python benchmarks/private/fuzz/fuzz_parser.py --cpu-minutes 30 --keep

Runs libFuzzer in processes of its own until they have used that much CPU time; the last long run is kept in
benchmarks/results/private/fuzz_parser.json. Exit code 1 when the parser was wrong; the input is printed.
"""

from __future__ import annotations

import argparse
import re
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

_DICTIONARY = [
    "NaN", "Infinity", "-", "1e999", "\\x00", "\\\\u0000", "\\\\ud800", "\\\\udc00", "\\xef\\xbb\\xbf",
    "\\xff\\xfe", "{}", "[]", "\\\"a\\\":", "true", "null", "\\\\u0061", "1e5", "0.1", "-0",
    "\\xed\\xa0\\x80"]  # fmt: skip
_SEEDS = [
    b'{"a": 1, "b": [true, null, 2.5e3, "x\\u00e9"], "c": {"d": {}}}',
    b'{"contract":"1.0","questions":[{"id":"q","arms":[{"id":"0","full_text":"8"}]}]}',
    b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":"\\ud83d\\ude00"}', b"[" * 20 + b"]" * 20,
    b'{"a":' * 15 + b"{}" + b"}" * 15, b'{"n":-1234567890123456789}',
]  # fmt: skip


def fuzz_here(corpus: str, arguments: list[str]) -> None:
    """Become the fuzzing process; ends by libFuzzer's own exit."""
    import atheris

    for name in [name for name in sys.modules if name.split(".")[0] == "json"]:
        del sys.modules[name]  # whoever imported it before us got it without instruments
    with atheris.instrument_imports(
        include=["reward_service.strict_json", "json.decoder", "json.scanner", "oracle"]
    ):
        import json.decoder
        import json.scanner  # noqa: F401

        from oracle import verdict

        from reward_service import strict_json  # noqa: F401

    def one(data: bytes) -> None:
        fault = verdict(data)
        if fault:
            raise AssertionError(f"{fault}: {data!r}")

    atheris.Setup([sys.argv[0], *arguments, corpus], one)
    atheris.Fuzz()


def run(folder: Path, cpu_minutes: float, seed: int, workers: int) -> tuple[list[str], float]:
    """What each of `workers` fuzzing processes said, and the CPU minutes of all. They share a corpus.

    Raises:
        SystemExit: one ended otherwise than by the end of its time.
    """
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(_SEEDS):
        (corpus / f"seed{number}").write_bytes(content)
    (folder / "dictionary").write_text("".join(f'"{word}"\n' for word in _DICTIONARY))
    limit = max(1, round(60 * cpu_minutes / workers))
    processes = []
    for worker in range(workers):
        with (folder / f"log{worker}").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, __file__, "--inside", str(corpus), str(seed + worker)],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
            )
        # The kernel ends it (SIGXCPU) when its time is used up: the parser was never wrong till then.
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (limit, limit + 30))
        processes.append(process)
    codes = [process.wait() for process in processes]
    said = [(folder / f"log{worker}").read_text(errors="replace") for worker in range(workers)]
    for code, text in zip(codes, said, strict=True):
        if code != -signal.SIGXCPU and "SIGXCPU" not in text:
            sys.exit(text[-4000:])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return said, (used.ru_utime + used.ru_stime) / 60


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu-minutes", type=float, default=0.1, help="of all workers (default 0.1)")
    parser.add_argument("--workers", type=int, default=1, help="how many processes (default 1)")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer (default 1)")
    parser.add_argument("--keep", action="store_true", help="keep the result as the last one")
    parser.add_argument("--inside", nargs=2, metavar=("CORPUS", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        corpus, seed = options.inside
        dictionary = Path(corpus).with_name("dictionary")
        arguments = [f"-seed={seed}", "-max_len=4096", "-timeout=100", f"-dict={dictionary}", "-reload=30"]
        fuzz_here(corpus, arguments)
        return 0
    from kept import keep, stamp

    stamped = stamp()
    with tempfile.TemporaryDirectory() as name:
        said, minutes = run(Path(name), options.cpu_minutes, options.seed, options.workers)
        inputs = len(list((Path(name) / "corpus").iterdir()))
    # libFuzzer says how many inputs it has tried at powers of two and at every find.
    tried = [max(map(int, re.findall(r"^#(\d+)\s", text, re.MULTILINE))) for text in said]
    reached = [tuple(map(int, pair)) for text in said for pair in re.findall(r"cov: (\d+) ft: (\d+)", text)]
    edges, features = max(reached)
    result = {
        **stamped,
        "fuzzer": f"atheris {_version()}",
        "workers": options.workers,
        "cpu_minutes": round(minutes, 2),
        "inputs_at_least": sum(tried),
        "edges": edges,
        "features": features,
        "corpus": inputs,
        "faults": 0,
    }
    if options.keep:
        keep("fuzz_parser", result)
    else:
        print(result)
    return 0


def _version() -> str:
    from importlib.metadata import version

    return version("atheris")


if __name__ == "__main__":
    sys.exit(main())
