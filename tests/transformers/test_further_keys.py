"""Keys of a prompt's line beside the prompt: they come back in the lines of its answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import answers, generate

from hydragen.transformers import model_files
from hydragen.transformers.jsonl import ANSWER_KEYS

FURTHER: list[dict[str, Any]] = [
    {"id": "a-1", "meta": {"weights": [1, 2.5, None], "messages": "é\u2028\U0001f600"}},
    {},
    {"id": 2**60, "Text": True, "": 0},
]
LINES = [
    {"id": "a-1", "prompt": "w5 w6", "meta": FURTHER[0]["meta"]},
    {"prompt": [5, 6, 7]},
    {"messages": [{"role": "user", "content": "w8"}], **FURTHER[2]},
]


def save(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def further(path: Path) -> list[dict[str, Any]]:
    """What each answer says besides, which comes last in its line."""
    found = []
    for one in answers(path):
        own = [key for key in one if key in ANSWER_KEYS]
        assert list(one)[: len(own)] == own
        found.append({key: one[key] for key in one if key not in own})
    return found


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return save(tmp_path / "prompts.jsonl", LINES)


@pytest.mark.parametrize("options", [(), ("--logprobs",)], ids=["plain", "logprobs"])
def test_every_answer_has_those_of_its_prompt(
    model_folder: Path, asked: Path, options: tuple[str, ...]
) -> None:
    done = generate(model_folder, asked, "-n", 2, *options)
    assert done.exit_code == 0, done.output
    assert further(asked) == [one for one in FURTHER for _ in range(2)]
    whole = answers(asked)
    assert {*ANSWER_KEYS} - {*whole[0]} == (set() if options else {"logprobs"})
    assert [one["prompt"] for one in whole] == [0, 0, 1, 1, 2, 2], "the prompt's number, as ever"


def test_a_run_goes_on_with_them(model_folder: Path, asked: Path) -> None:
    assert generate(model_folder, asked, "-n", 2).exit_code == 0
    whole, path = answers(asked), asked.with_suffix(".answers.jsonl")
    lines = path.read_text("utf-8").split("\n")
    path.write_text("\n".join([*lines[:2], lines[2][:-3]]), "utf-8")  # cut within what comes last
    done = generate(model_folder, asked, "-n", 2)
    assert done.exit_code == 0, done.output
    assert "2 answers are there already, 4 to go" in done.stderr
    assert answers(asked) == whole


def test_other_keys_are_another_job(model_folder: Path, asked: Path) -> None:
    assert generate(model_folder, asked).exit_code == 0
    before = asked.with_suffix(".answers.jsonl").read_bytes()
    for lines in ([{**LINES[0], "id": "b"}, *LINES[1:]], [{"prompt": "w5 w6"}, LINES[1], {"prompt": [8]}]):
        done = generate(model_folder, save(asked, lines))
        assert done.exit_code == 2
        assert "holds answers of another job, with other" in done.stderr
        assert "keys_beside_prompts" in done.stderr
    assert asked.with_suffix(".answers.jsonl").read_bytes() == before
    assert "0 to go" in generate(model_folder, save(asked, LINES)).stderr


def test_a_note_from_before_goes_on_where_nothing_comes_back(model_folder: Path, prompts: Path) -> None:
    """Prompts without further keys leave the note as it was when there were none."""
    assert generate(model_folder, prompts).exit_code == 0
    note = json.loads(prompts.with_name("prompts.answers.jsonl.job.json").read_text())
    assert "keys_beside_prompts" not in note
    assert further(prompts) == [{}, {}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *(
            (f'{{"messages": [], "{key}": 1}}', f"an answer, prompt, sample, text, .*, got {key}; rename")
            for key in ANSWER_KEYS[1:]
        ),
        ('{"prompt": [5], "seed": 1, "id": 2, "text": 3}', "got seed, text; rename"),
        ('{"prompt": [5], "id": "\\ud800"}', "must hold whole characters, got the lone surrogate"),
        ('{"prompt": [5], "id": NaN}', "must hold numbers that JSON and float64 have"),
        ('{"prompt": [5], "id": [1e999]}', "must hold numbers that JSON and float64 have"),
    ],
)
def test_what_answers_cannot_say_is_refused_with_its_line(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.setattr(model_files, "load", lambda *_: pytest.fail("the model is loaded"))
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [5]}\n' + line + "\n")
    done = generate(model_folder, path)
    assert done.exit_code == 2
    assert re.search(rf"prompts\.jsonl:2 .*{message}", done.stderr), done.stderr
    assert not path.with_suffix(".answers.jsonl").exists()
