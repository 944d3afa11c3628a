"""The command line, end to end on a small model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import answers, generate, run
from models import make_model
from tokenizers import processors
from transformers import AutoTokenizer

import hydragen
from hydragen.transformers import answers as answer_files
from hydragen.transformers import jsonl
from hydragen.transformers.pretrained import check_name


def test_answers_are_those_of_the_library(model_folder: Path, prompts: Path) -> None:
    done = generate(model_folder, prompts, "-n", 3, "--seed", 4, "--logprobs")
    assert done.exit_code == 0, done.output
    got = answers(prompts)
    assert [(x["prompt"], x["sample"]) for x in got] == [(i, j) for i in range(2) for j in range(3)]
    expected = hydragen.generate(
        make_model("llama"),
        [[5, 6, 7], [5, 6, 7, 8, 9]],
        num_return_sequences=3,
        do_sample=True,
        max_new_tokens=5,
        seed=[x["seed"] for x in got],
        logprobs=True,
    )
    assert [x["token_ids"] for x in got] == [one.token_ids for one in expected]
    for x, one in zip(got, expected, strict=True):
        assert x["logprobs"] == pytest.approx(one.logprobs, abs=1e-4)
    assert got[0]["text"] == " ".join(f"w{i}" for i in got[0]["token_ids"])
    assert len({x["seed"] for x in got}) == 6


def test_a_run_goes_on_after_an_interruption(
    model_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(model_folder, prompts, "-n", 4, "--batch-size", 2)
    whole = answers(prompts)
    out = prompts.with_suffix(".answers.jsonl")
    out.unlink()
    dumps, calls = json.dumps, 0

    def interrupted(*args: Any, **kwargs: Any) -> str:
        nonlocal calls
        calls += "sample" in args[0]
        if calls > 5:
            raise KeyboardInterrupt
        return dumps(*args, **kwargs)

    monkeypatch.setattr(answer_files.json, "dumps", interrupted)
    stopped = generate(model_folder, prompts, "-n", 4)
    assert stopped.exit_code == 130
    assert f"interrupted; 5 answers are in {out}, and the same command goes on from there" in stopped.stderr
    monkeypatch.undo()
    assert len(answers(prompts)) == 5
    with out.open("a") as file:
        file.write('{"prompt": 1, "samp')  # the line during which the power went
    done = generate(model_folder, prompts, "-n", 4)
    assert done.exit_code == 0, done.output
    assert "5 answers are there already, 3 to go" in done.output
    assert answers(prompts) == whole
    again = generate(model_folder, prompts, "-n", 4)
    assert "8 answers are there already, 0 to go" in again.output
    assert answers(prompts) == whole
    assert generate(model_folder, prompts, "-n", 5).exit_code == 0
    assert len(answers(prompts)) == 10


def test_special_tokens_come_once(model_folder: Path, tmp_path: Path) -> None:
    """A chat's template writes the token that begins a text, and so does the tokenizer for texts."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}"
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w5"}\n{"messages": [{"role": "user", "content": "w5"}]}\n')
    given = jsonl.read_prompts(path, tokenizer, "model")
    assert [one.ids for one in given.values()] == [[1, 5], [1, 5]]


def test_large_jobs_go_in_pieces(model_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate(model_folder, prompts, "-n", 4).exit_code == 0
    whole = answers(prompts)
    prompts.with_suffix(".answers.jsonl").unlink()
    monkeypatch.setattr("hydragen.cli.ANSWERS_AT_A_TIME", 3)
    assert generate(model_folder, prompts, "-n", 4).exit_code == 0
    assert answers(prompts) == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:1 must be JSON"),
        ('{"prompt": 5}', "prompts.jsonl:1 must have a text or token ids"),
        ('{"text": "w5"}', "prompts.jsonl:1 must have either prompt or messages"),
        ("", "must hold a prompt or more, got none"),
        ('{"prompt": ""}', "prompts.jsonl:1 must hold a token or more, got an empty prompt"),
        (
            '{"prompt": [5]}\n\n{"prompt": [5, 9999]}',
            "prompts.jsonl:3 must be tokens of the model's vocabulary",
        ),
        ('{"prompt": [5, 1.5]}', "prompts.jsonl:1 must hold integers"),
        (json.dumps({"prompt": [5] * 9999}), "prompts.jsonl:1 must leave room for max_new_tokens=5"),
        ('{"messages": [5]}', "prompts.jsonl:1 must have messages that the tokenizer's chat template takes"),
    ],
)
def test_bad_files(model_folder: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n")
    done = generate(model_folder, path)
    assert done.exit_code == 2
    assert message in done.output


def test_messages_need_a_chat_template(model_folder: Path, prompts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match=r"prompts\.jsonl:3 has messages, for which .* a chat template, got none"
    ):
        jsonl.read_prompts(prompts, tokenizer, "model")


def test_messages_that_the_template_refuses(model_folder: Path, prompts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ValueError, match=r"prompts\.jsonl:3 must have messages that .*: roles must alternate; a m"
    ):
        jsonl.read_prompts(prompts, tokenizer, "model")


def test_without_a_tokenizer_prompts_are_token_ids(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    make_model("llama").save_pretrained(bare)
    done = generate(bare, prompts)
    assert done.exit_code == 2
    assert f"no tokenizer in {bare}; {prompts}:1 needs one" in done.output
    prompts.write_text('{"prompt": [5, 6, 7]}\n')
    done = generate(bare, prompts)
    assert done.exit_code == 0, done.output
    (without,) = answers(prompts)
    prompts.with_suffix(".answers.jsonl").unlink()
    assert generate(model_folder, prompts).exit_code == 0
    assert answers(prompts) == [{**without, "text": " ".join(f"w{i}" for i in without["token_ids"])}]
    assert without["text"] is None


@pytest.mark.parametrize("name", ["nosuch", "./nosuch", "../some/model", "/no/such", "~/model", "a/b/c"])
def test_folders_that_are_not_there(prompts: Path, name: str) -> None:
    done = run("generate", "--model", name, "--prompts", prompts)
    assert done.exit_code == 2
    assert f"got {name}: there is no such folder" in done.output


def test_names_on_the_hub_are_left_alone(prompts: Path) -> None:
    check_name("owner/name")
    with pytest.raises(ValueError, match="that is a file"):
        check_name(str(prompts))


def test_bench(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    done = run(
        "bench", "--config", model_folder, "--batch", 2, "--prefix", 20, "--prefix", 30,
        "--completion", 6, "--out", out, "--name", "small",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == [
        "model", "batch", "prefix", "completion", "ours", "attention_off", "per_sequence_read", "hf_generate",
        "bound",
    ]  # fmt: skip
    assert [(row["model"], row["batch"], row["prefix"]) for row in rows] == [
        ("small", "2", "20"),
        ("small", "2", "30"),
    ]
    ways = "ours", "attention_off", "per_sequence_read", "hf_generate"
    assert all(float(row[name]) > 0 for row in rows for name in ways)
    again = run(
        "bench", "--config", model_folder, "--batch", 2, "--prefix", 20, "--out", out, "--completion", 6
    )
    assert again.exit_code == 0
    assert len(out.read_text().splitlines()) == 4, "another name is another case"
    again = run(
        "bench", "--config", model_folder, "--batch", 2, "--prefix", 20, "--out", out, "--completion", 6
    )
    assert again.output == f"all 1 cases are in {out} already\n"
    # The roof of a CPU is not known.
    assert all((row["bound"] == "") != torch.cuda.is_available() for row in rows)


def test_bench_of_two_levels(model_folder: Path) -> None:
    done = run(
        "bench", "--config", model_folder, "--batch", 4, "--prefix", 10, "--completion", 6, "--tree", "2x8"
    )
    assert done.exit_code == 0, done.output
    assert "model > 2x8: first level shared only" in done.output
    wrong = run("bench", "--config", model_folder, "--batch", 5, "--prefix", 10, "--tree", "2x8")
    assert wrong.exit_code == 2
    assert "batch must be a multiple of the 2 branches, got 5" in wrong.output


@pytest.mark.parametrize("command", [[], ["generate"], ["bench"], ["demo"]])
def test_help(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.exit_code == 0
    assert "Usage" in done.output
