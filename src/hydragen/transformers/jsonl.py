"""Prompts from a JSONL file, answers to another; what an interruption left is kept and gone on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError

from hydragen.transformers.generate import Completion
from hydragen.transformers.tokens import token_row

FORMS = '{"prompt": "text"}, {"prompt": [token ids]} or {"messages": [...]}, one object per line'


@dataclass(frozen=True)
class Job:
    """Answers that are asked for: `n` to each of `prompts` (token ids), under `settings`."""

    prompts: Sequence[list[int]]
    n: int
    settings: dict[str, Any]

    def missing(self, have: set[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return what is still to be made, as (prompt, sample)."""
        return [(i, j) for i in range(len(self.prompts)) for j in range(self.n) if (i, j) not in have]

    def seed(self, prompt: int, sample: int) -> int:
        """Return the seed of an answer: from the job's and its own place, so the same after a restart."""
        place = f"{self.settings['seed']} {prompt} {sample}".encode()
        return int.from_bytes(hashlib.blake2b(place, digest_size=7).digest())


def read_prompts(path: Path, tokenizer: Any, model: str) -> dict[str, list[int]]:
    """Return the token ids of a file's prompts, each under its "file:line".

    Parameters
    ----------
    path : Path
    tokenizer : optional
        For texts, and for chats, which its template lays out; None if the model comes without.
    model : str
        Where the tokenizer was looked for; messages name it.

    Raises
    ------
    ValueError, TypeError
        If a line is not a prompt, or needs a tokenizer or template that is not there; names file and line.
    """
    prompts = {}
    for number, line, record in _records(path.read_bytes(), path, f"write {FORMS}"):
        where = f"{path}:{number}"
        if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
            raise ValueError(f"{where} must have either prompt or messages, got {line[:60]}; write {FORMS}")
        prompt = record.get("prompt")
        if isinstance(prompt, list):
            prompts[where] = token_row(prompt, where).tolist()
            continue
        if "prompt" in record and not isinstance(prompt, str):
            raise ValueError(f"{where} must have a text or token ids, got {line[:60]}; write {FORMS}")
        if tokenizer is None:
            raise ValueError(
                f"no tokenizer in {model}; {where} needs one: save it there with "
                f'tokenizer.save_pretrained("{model}"), or write every prompt as token ids'
            )
        # Chats as ids: the template has the special tokens already, which tokenizing a text would add again.
        laid_out = (
            tokenizer(prompt) if isinstance(prompt, str) else _chat(tokenizer, record["messages"], where)
        )
        prompts[where] = laid_out["input_ids"]
    if not prompts:
        raise ValueError(f"{path} must hold a prompt or more, got none; write {FORMS}")
    return prompts


def _chat(tokenizer: Any, messages: Any, where: str) -> Any:
    """Return messages as the tokenizer's template lays them out; ValueError if it cannot."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} has messages, for which the tokenizer must have a chat template, got none; "
            "write the prompt as a text, or set tokenizer.chat_template and save the tokenizer"
        )
    problem = f"{where} must have messages that the tokenizer's chat template takes"
    remedy = 'a message is {"role": "user", "content": "text"}'
    if not isinstance(messages, list) or not messages or not all(isinstance(x, dict) for x in messages):
        raise ValueError(f"{problem}, got {str(messages)[:60]}; {remedy}")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except (ValueError, TypeError, TemplateError) as error:
        raise ValueError(f"{problem}: {error}; {remedy}") from error


class Answers:
    """The output file: a line per answer, written as it is finished.

    A second file beside it says what was asked for, so that a run goes on only where it is the same job.
    """

    def __init__(self, path: Path, job: Job) -> None:
        self.path, self.job = path, job
        self.note = path.with_name(path.name + ".job.json")

    def resume(self) -> set[tuple[int, int]]:
        """Return the answers that are there already; a line that was cut off is removed.

        Raises
        ------
        ValueError
            If the file belongs to another job, or holds what is no answer; names the line and what to do.
        """
        asked = {**self.job.settings, "prompts": _digest(self.job.prompts)}
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.note.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
            self.path.touch()
            return set()
        before = self._noted()
        if before != asked:
            differ = [k for k in asked if before.get(k) != asked[k]]
            raise ValueError(
                f"{self.path} holds answers of another job, with other {', '.join(differ)}; give --out "
                "another file, or remove this one"
            )
        return self.written()

    def _noted(self) -> dict[str, Any]:
        """Return what the note says was asked for; nothing if there is none."""
        if not self.note.exists():
            return {}
        try:
            before = json.loads(self.note.read_bytes())
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise ValueError(
                f"{self.note} must say what {self.path} answers, as a JSON object, got something else; give "
                "--out another file, or remove both"
            )
        return before

    def written(self) -> set[tuple[int, int]]:
        """Return the answers in the file; a line that was cut off is removed."""
        whole = self.path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        with self.path.open("r+b") as file:
            file.truncate(len(whole))
        remedy = "remove that line: its answer is made again"
        have = set()
        for number, line, record in _records(whole, self.path, remedy):
            place = (record.get("prompt"), record.get("sample")) if isinstance(record, dict) else (None, None)
            if not all(type(x) is int and x >= 0 for x in place):
                raise ValueError(
                    f"{self.path}:{number} must be an answer, with the numbers of its prompt and sample, got "
                    f"{line[:60]}; {remedy}"
                )
            have.add(cast("tuple[int, int]", place))
        return have

    def write(
        self, answers: Iterator[Completion], places: list[tuple[int, int]]
    ) -> Iterator[tuple[int, int]]:
        """Append answers as they come, answer i's prompt being places[i]; yield the place of each written."""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            for one in answers:
                prompt, sample = places[one.prompt]
                record: dict[str, Any] = {
                    "prompt": prompt,
                    "sample": sample,
                    "text": one.text,
                    "token_ids": one.token_ids,
                    "finish_reason": one.finish_reason,
                    "seed": one.seed,
                }
                if one.logprobs is not None:
                    record["logprobs"] = one.logprobs
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                yield prompt, sample


def _records(lines: bytes, path: Path, remedy: str) -> Iterator[tuple[int, str, Any]]:
    """Yield each line's number, the line, and what it says; blank ones are left out."""
    # Not by splitlines, for which a text within a line may hold ends of lines: U+0085, U+2028 and others.
    for number, raw in enumerate(lines.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            line = raw.decode("utf-8")
            yield number, line, json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}:{number} must be JSON in UTF-8: {error}; {remedy}") from error


def _digest(prompts: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(list(prompts)).encode(), digest_size=16).hexdigest()
