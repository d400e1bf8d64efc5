"""All eight arms on a real model: questions of GSM8K through `looper rollouts --arms service`.

vLLM serves a checkpoint in a process of its own, the reward service runs in another with a canary in every
private prompt, and `looper rollouts` asks it. Afterwards the canary is looked for in everything that exists
outside the service's memory: the rollout file, the client's output, the service's log, metrics and folder,
vLLM's log. Prints and writes benchmarks/results/private/arms_on_vllm.json; exit code 1 when an arm is missing
or the canary is found.

    python benchmarks/private/arms_on_vllm.py --model FOLDER --vllm /path/to/venv/bin/python --questions 20

The generator sees the prompts, of course: it is told them. Its log is searched all the same.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _servers import CREATE_KEY, DATA, RESULTS, Server, free_port, stamp

CANARY = "looper canary 7c0ffee5eed and the walrus of amber never sings at noon"
SECRETS = (b"7c0ffee5eed", b"walrus of amber")
SERVE_WITH_CANARY = f"""
import sys
from dataclasses import replace
from regime_w import arms
canary = {CANARY!r}
marked = tuple(
    replace(s, system_prompt=canary + ". " + s.system_prompt, user_template=s.user_template + " " + canary)
    for s in arms.build_all_arms()
)
arms.build_all_arms = lambda: marked
from reward_service.cli import main
main(sys.argv[1:])
"""


def _faults(log: bytes) -> str:
    """The first lines of vLLM's log that speak of an error."""
    lines = log.decode(errors="replace").splitlines()
    return "\n".join([line[:300] for line in lines if "ERROR" in line or "Error" in line][:40])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder that vLLM serves")
    parser.add_argument("--vllm", required=True, help="python that has vLLM")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=96)
    options = parser.parse_args()
    note = stamp()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.loads(line) for line in (DATA / "gsm8k" / "train.jsonl").read_text().splitlines()]
        with (folder / "problems.jsonl").open("w") as out:
            for i, row in enumerate(rows[: options.questions]):
                answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
                out.write(
                    json.dumps({"id": f"train/{i}", "question": row["question"], "answer": answer}) + "\n"
                )
        home = folder / "home"
        env = {**os.environ, "REWARD_SERVICE_HOME": str(home)}
        scopes = "score:reward,score:components,arms:rollout,metrics:read"
        key = subprocess.run(
            [*CREATE_KEY, "--name", "bench", "--scopes", scopes],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        ports = [free_port() for _ in range(3)]
        vllm_env = {"PYTHONPATH": "", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        vllm = Server(
            "vllm",
            [options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model,
             "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(ports[0]),
             "--max-model-len", "2048", "--dtype", "float32", "--enforce-eager",
             # vLLM 0.31 on a CPU ends when it cuts the prompt of a request that has a seed.
             "--max-num-batched-tokens", "32768"],
            ports[0], {**vllm_env, "OMP_NUM_THREADS": "1"},  # more wait for each other on busy cores
        )  # fmt: skip
        service = None
        try:
            vllm.wait("/health", seconds=400)
            print("vLLM is up", flush=True)
            (home / "settings.toml").write_text(
                f'generator_url = "http://127.0.0.1:{ports[0]}"\nmetrics_port = {ports[2]}\n'
                "generator_concurrency = 8\n"
            )
            service = Server(
                "service",
                [sys.executable, "-c", SERVE_WITH_CANARY, "serve", "--port", str(ports[1])],
                ports[1], {"REWARD_SERVICE_HOME": str(home)},
            )  # fmt: skip
            service.wait("/readyz", {"Authorization": f"Bearer {key}"})
            started = time.perf_counter()
            client = subprocess.run(
                [sys.executable, "-m", "looper_trainer.cli", "rollouts", "--arms", "service",
                 "--questions-file", str(folder / "problems.jsonl"), "--output", str(folder / "out.jsonl"),
                 "--questions-per-batch", "5", "--max-new-tokens", str(options.max_tokens)],
                env={**env, "LOOPER_REWARD_URL": f"http://127.0.0.1:{ports[1]}", "LOOPER_REWARD_KEY": key},
                capture_output=True, check=False,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            connection = http.client.HTTPConnection("127.0.0.1", ports[2])
            connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})
            metrics = connection.getresponse().read()
        finally:
            if service is not None:
                service.stop()
            vllm.stop()
        if client.returncode:
            print(client.stderr.decode()[-2000:], file=sys.stderr)
            print(_faults(vllm.log()), file=sys.stderr)
            return 1
        records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        places = {
            "rollout file": (folder / "out.jsonl").read_bytes(),
            "client output": client.stdout + client.stderr,
            "service log": service.log(),
            "metrics": metrics,
            "vllm log": vllm.log(),
            "service folder": b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file()),
        }
    found = {place: sum(text.count(secret) for secret in SECRETS) for place, text in places.items()}
    arms = [len(record["trajectories"]) for record in records]
    answered = [sum(t["final_answer"] is not None for t in record["trajectories"]) for record in records]
    result = {
        "note": note, "questions": len(records), "arms_per_question": sorted(set(arms)),
        "arms_with_text": sum(bool(t["output"].strip()) for r in records for t in r["trajectories"]),
        "arms_with_an_answer": sum(answered), "seconds": round(seconds, 1),
        "tokens": sum(t["tokens_out"] for r in records for t in r["trajectories"]),
        "mean_s_wm": sum(r["scores"]["s_wm"] for r in records if r["scores"]) / max(1, len(records)),
        "withheld_echoes": places["rollout file"].decode().count("[…]"),
        "bytes_searched": {place: len(text) for place, text in places.items()}, "canary_found": found,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "arms_on_vllm.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if 0 in arms:
        print(f"--- service:\n{places['service log'][-1500:].decode(errors='replace')}", file=sys.stderr)
        print(f"--- vLLM's errors:\n{_faults(places['vllm log'])}", file=sys.stderr)
    whole = len(records) == options.questions and set(arms) == {8}
    return 0 if whole and not any(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
