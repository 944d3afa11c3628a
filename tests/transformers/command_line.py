"""The command line as a function, for its tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models import VOCABULARY, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from hydragen.cli import app

PROMPTS = ["w5 w6 w7", "w5 w6 w7 w8 w9"]


def save_model(folder: Path) -> Path:
    make_model("llama").save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", *(f"w{i}" for i in range(2, VOCABULARY))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def save_prompts(path: Path) -> Path:
    lines = [{"prompt": PROMPTS[0]}, {"messages": [{"role": "user", "content": PROMPTS[1]}]}]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(x) for x in arguments])


def generate(model: Path, prompts: Path, *more: object) -> Result:
    return run("generate", "--model", model, "--prompts", prompts, "--max-new-tokens", 5, *more)


def answers(prompts: Path) -> list[dict[str, Any]]:
    lines = prompts.with_suffix(".answers.jsonl").read_text("utf-8").split("\n")
    return sorted(map(json.loads, filter(None, lines)), key=lambda x: (x["prompt"], x["sample"]))
