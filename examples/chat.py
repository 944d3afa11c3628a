"""Many users chat over one system prompt: it is computed once, stored once, and read once per step for all.

    python examples/chat.py --model PATH [--system-prompt FILE] [--max-new-tokens 64]

Each line of input, which is read to its end first, is `user: what they say`; an empty line ends a turn, in
which everybody who spoke is answered in one batch. The cache keeps every user's history, so that a turn feeds
only what is new; whose history fills the model's positions is told so. Needs the extra `transformers`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hydragen.transformers import PrefixCache

SYSTEM = "You are a patient guide to this city. You answer in one or two sentences, and you never guess.\n"


def rounds(lines: list[str]) -> list[dict[str, str]]:
    """What each user says, turn by turn."""
    turns: list[dict[str, str]] = [{}]
    for line in lines:
        user, colon, said = line.partition(":")
        if colon:
            turns[-1][user.strip()] = said.strip()
        elif turns[-1]:
            turns.append({})
    return [turn for turn in turns if turn]


def spoken(tokenizer: PreTrainedTokenizerBase, words: str) -> list[int]:
    """Tokens of a turn. A model with a chat template wants that instead."""
    ids: list[int] = tokenizer(f"\nUser: {words}\nGuide:", add_special_tokens=False).input_ids
    return ids


def main() -> None:
    """Chat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with a transformers causal LM, or its name")
    parser.add_argument("--system-prompt", type=Path, help="a text file; default: a few words")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, attn_implementation="hydragen", dtype="auto"
    )
    model.to(device).eval()

    turns = rounds(sys.stdin.read().splitlines())
    users = list(dict.fromkeys(user for turn in turns for user in turn))
    if not users:
        raise SystemExit("nobody said anything; write lines like `ann: where is the museum?`")

    system = arguments.system_prompt.read_text() if arguments.system_prompt else SYSTEM
    chats = PrefixCache(model).prefill(tokenizer(system).input_ids).fork(len(users))
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    for turn in turns:
        said: list[list[int]] = [[] for _ in users]
        room = [0] * len(users)
        for i, (user, begin) in enumerate(zip(users, chats.next_positions.tolist(), strict=True)):
            ids = spoken(tokenizer, turn[user]) if user in turn else []
            left = min(arguments.max_new_tokens, positions - begin - len(ids))
            if ids and left > 0:
                said[i], room[i] = ids, left
            elif ids:
                print(f"{user}: {turn[user]}\n   (no room left after {begin:,} tokens)")
        answers = chats.generate(said, tokenizer=tokenizer, max_new_tokens=room) if any(room) else []
        for answer in answers:
            user = users[answer.prompt]
            print(f"{user}: {turn[user]}\n   -> {answer.text}")
    copied = int(chats.lengths.sum())
    print(f"{chats.stored_tokens:,} tokens stored for {len(users)} users; copied per user: {copied:,}")


if __name__ == "__main__":
    main()
