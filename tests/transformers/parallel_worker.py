"""One process of a tensor-parallel run: answers to stdout of rank 0, as JSON.

torchrun --nproc-per-node 2 parallel_worker.py FOLDER
"""

import json
import os
import sys

import torch
from transformers import AutoModelForCausalLM

import hydragen
from hydragen.transformers import PrefixCache

PREFIX = list(range(5, 25))
QUESTIONS = [[30, 31], [40], [50, 51, 52]]


def answer(model: torch.nn.Module) -> dict[str, object]:
    options = {"max_new_tokens": 8, "logprobs": True}
    greedy = hydragen.generate(model, PREFIX, QUESTIONS, **options)
    drawn = hydragen.generate(
        model, PREFIX, QUESTIONS, num_return_sequences=2, do_sample=True, seed=1, **options
    )
    # Without a seed each process would draw its own.
    free = hydragen.generate(model, PREFIX, num_return_sequences=3, do_sample=True, **options)
    cache = PrefixCache(model).prefill(PREFIX)
    return {
        "tokens": [one.token_ids for one in greedy + drawn],
        "logprobs": [one.logprobs for one in greedy + drawn],
        "free": [one.token_ids for one in free],
        "kv_heads": cache.layers[0].keys.shape[1],
    }


if __name__ == "__main__":
    loaded = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], attn_implementation="hydragen", tp_plan="auto", dtype=torch.float32
    )
    torch.manual_seed(torch.distributed.get_rank())
    found = answer(loaded.eval())
    of_all = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, found["free"])
    if of_all != [found["free"]] * len(of_all):
        raise SystemExit(f"processes drew different tokens: {of_all}")
    if torch.distributed.get_rank() == 0:
        sys.stdout.write(f"ANSWER {json.dumps(found)}\n")
        sys.stdout.flush()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Without the end of the interpreter: now and then a thread of gloo outlives it, and the process aborts
    # ("terminate called without an active exception").
    os._exit(0)
