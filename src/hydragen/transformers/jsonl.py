"""Prompts from a JSONL file: texts, token ids or chats, a line each."""

from __future__ import annotations

import json
import sys
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from hydragen.transformers.tokens import token_row

FORMS = '{"prompt": "text"}, {"prompt": [token ids]} or {"messages": [...]}, one object per line'

# What a line of answers says itself: keys of a prompt's line that come back there must have other names.
ANSWER_KEYS = ("prompt", "sample", "text", "token_ids", "finish_reason", "seed", "logprobs")


class Prompt(NamedTuple):
    """A line of prompts.

    Attributes
    ----------
    ids : list of int
    more : dict
        What the line says besides: an id, say.
    """

    ids: list[int]
    more: dict[str, Any]


def read_prompts(path: Path, tokenizer: Any, model: str) -> dict[str, Prompt]:
    """Return a file's prompts, each under its "file:line".

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
        If a line is not a prompt, needs a tokenizer or template that is not there, or has other keys that the
        lines of its answers cannot have; names file and line.
    """
    prompts = {}
    for number, line, record in records(path.read_bytes(), path, f"write {FORMS}"):
        where = f"{path}:{number}"
        if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
            raise ValueError(f"{where} must have either prompt or messages, got {line[:60]}; write {FORMS}")
        prompt, more = record.get("prompt"), _more(record, where)
        if isinstance(prompt, list):
            prompts[where] = Prompt(token_row(prompt, where).tolist(), more)
            continue
        if "prompt" in record and not isinstance(prompt, str):
            raise ValueError(f"{where} must have a text or token ids, got {line[:60]}; write {FORMS}")
        if tokenizer is None:
            raise ValueError(
                f"no tokenizer in {model}; {where} needs one: save it there with "
                f'tokenizer.save_pretrained("{model}"), or write every prompt as token ids'
            )
        _check_text(prompt if isinstance(prompt, str) else record["messages"], where)
        # Chats as ids: the template has the special tokens already, which tokenizing a text would add again.
        laid_out = (
            tokenizer(prompt) if isinstance(prompt, str) else _chat(tokenizer, record["messages"], where)
        )
        prompts[where] = Prompt(laid_out["input_ids"], more)
    if not prompts:
        raise ValueError(f"{path} must hold a prompt or more, got none; write {FORMS}")
    return prompts


def _more(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Return what a line says besides its prompt; ValueError unless lines of answers can say it too."""
    more = {key: value for key, value in record.items() if key not in ("prompt", "messages")}
    taken = [key for key in more if key in ANSWER_KEYS]
    if taken:
        raise ValueError(
            f"{where} must give its further keys other names than those of an answer, "
            f"{', '.join(ANSWER_KEYS)}, got {', '.join(taken)}; rename what comes back in its answers"
        )
    _check_text(more, where)
    try:
        json.dumps(more, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"{where} must hold numbers that JSON and float64 have, got NaN, an infinity or a larger one; "
            "write it as a text"
        ) from error
    return more


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


def records(lines: bytes, path: Path, remedy: str) -> Iterator[tuple[int, str, Any]]:
    """Yield each line's number, the line, and what it says; blank ones are left out.

    Raises
    ------
    ValueError
        If a line cannot be read as JSON; names file and line.
    """
    # Not by splitlines, for which a text within a line may hold ends of lines: U+0085, U+2028 and others.
    for number, raw in enumerate(lines.removeprefix(BOM_UTF8).split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            line = raw.decode("utf-8")
            record = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}:{number} must be JSON in UTF-8: {error}; {remedy}") from error
        except ValueError as error:  # JSON, but Python reads no integer of so many digits
            digits = sys.get_int_max_str_digits()
            raise ValueError(
                f"{path}:{number} must hold integers of at most {digits:,} digits, got {line[:60]}; {remedy}"
            ) from error
        yield number, line, record


def _check_text(given: Any, where: str) -> None:
    """Raise a ValueError if a text holds half of a character, which JSON can write and UTF-8 cannot."""
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(
            f"{where} must hold whole characters, got the lone surrogate {half}; write a character beyond "
            "U+FFFF as it is, or as both of its surrogates"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{where} must not be nested so deep: {error}; write {FORMS}") from error
