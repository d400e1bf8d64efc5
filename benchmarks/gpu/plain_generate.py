"""Plain vLLM on a list of prompts: the rate that a sampler over HTTP is measured against.

Started by `vllm_sampler.py` as a process of its own, by the interpreter that has vLLM:

    python plain_generate.py JOB.json RESULT.json

JOB: {"engine": arguments of vllm.LLM, "prompts": [round][prompt][token id], "n": 4, "max_tokens": 256,
"adapter": folder or null, "logprobs": [false, true]}. All prompts of a round go into one `LLM.generate`
call, without seeds; for each of "logprobs" (default: one false) all rounds, with or without each token's
logprob. Without, and without adapter, it is the most that this engine gives.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Run the job and write a list of {"version", "start_s", "rounds": [{"tokens", "seconds"}]}."""
    job = json.loads(Path(sys.argv[1]).read_text())
    began = time.perf_counter()
    import vllm
    from vllm.lora.request import LoRARequest

    engine = vllm.LLM(**job["engine"])
    start_s = time.perf_counter() - began
    lora = LoRARequest("plain", 1, job["adapter"]) if job["adapter"] else None
    results = []
    for logprobs in job.get("logprobs", [False]):
        params = vllm.SamplingParams(
            n=job["n"], temperature=1.0, top_p=1.0, max_tokens=job["max_tokens"],
            logprobs=0 if logprobs else None,
        )  # fmt: skip
        engine.reset_prefix_cache()
        rounds = []
        for of_round in job["prompts"]:
            prompts = [{"prompt_token_ids": ids} for ids in of_round]
            began = time.perf_counter()
            outputs = engine.generate(prompts, params, lora_request=lora, use_tqdm=False)
            seconds = time.perf_counter() - began
            tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
            rounds.append({"tokens": tokens, "seconds": seconds})
        # The first round warms up: graphs, allocations, the adapter's first use.
        found = {"version": vllm.__version__, "start_s": start_s, "rounds": rounds[1:], "warm_up": rounds[0]}
        results.append(found)
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
