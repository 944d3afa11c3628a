"""The command line, end to end on a small model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, make_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import hydragen
from hydragen.cli import app
from hydragen.transformers import Completion, jsonl
from hydragen.transformers.pretrained import check_name

PROMPTS = ["w5 w6 w7", "w5 w6 w7 w8 w9"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", *(f"w{i}" for i in range(2, VOCABULARY))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": PROMPTS[0]}, {"messages": [{"role": "user", "content": PROMPTS[1]}]}]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(x) for x in arguments])


def generate(model: Path, prompts: Path, *more: object) -> Result:
    return run("generate", "--model", model, "--prompts", prompts, "--max-new-tokens", 5, *more)


def answers(prompts: Path) -> list[dict[str, Any]]:
    lines = prompts.with_suffix(".answers.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda x: (x["prompt"], x["sample"]))


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

    monkeypatch.setattr(jsonl.json, "dumps", interrupted)
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


def test_texts_with_ends_of_lines_of_their_own(model_folder: Path, tmp_path: Path) -> None:
    """What str.splitlines takes for the end of a line may stand in JSON as it is."""
    odd = "w5\u2028w6\u2029w7\x85w8"
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n\n" + '{"prompt": [5]}', "utf-8")
    given = jsonl.read_prompts(path, AutoTokenizer.from_pretrained(model_folder), "model")
    assert list(given) == [f"{path}:1", f"{path}:3"]
    prompts = list(given.values())
    assert prompts == [[5, 6, 7, 8], [5]]
    job = jsonl.Job(prompts, 1, {"seed": 0})
    made = [Completion(i, 0, [7, 8], odd, None, "length", 3) for i in range(2)]
    answers = jsonl.Answers(tmp_path / "answers.jsonl", job)
    assert answers.resume() == set()
    assert list(answers.write(iter(made), [(0, 0), (1, 0)])) == [(0, 0), (1, 0)]
    assert answers.resume() == {(0, 0), (1, 0)}
    with answers.path.open("a") as file:
        file.write("{oh\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl:3 must be JSON.*remove that line"):
        answers.resume()


def test_special_tokens_come_once(model_folder: Path, tmp_path: Path) -> None:
    """A chat's template writes the token that begins a text, and so does the tokenizer for texts."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}"
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w5"}\n{"messages": [{"role": "user", "content": "w5"}]}\n')
    assert list(jsonl.read_prompts(path, tokenizer, "model").values()) == [[1, 5], [1, 5]]


def test_large_jobs_go_in_pieces(model_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate(model_folder, prompts, "-n", 4).exit_code == 0
    whole = answers(prompts)
    prompts.with_suffix(".answers.jsonl").unlink()
    monkeypatch.setattr("hydragen.cli.ANSWERS_AT_A_TIME", 3)
    assert generate(model_folder, prompts, "-n", 4).exit_code == 0
    assert answers(prompts) == whole


def test_answers_of_another_job_are_not_mixed_in(model_folder: Path, prompts: Path) -> None:
    assert generate(model_folder, prompts).exit_code == 0
    done = generate(model_folder, prompts, "--temperature", 0.5)
    assert done.exit_code == 2
    assert "holds answers of another job, with other do_sample, temperature" in done.output


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": 1}', "must be an answer, with the numbers of its prompt and sample"),
        (b'{"prompt": true, "sample": 0}', "must be an answer"),
        (b'{"prompt": [1], "sample": 0}', "must be an answer"),
        (b"5", "must be an answer"),
        (b"null", "must be an answer"),
        (b"\xff", "must be JSON in UTF-8"),
        (b"[" * 100_000, "must be JSON in UTF-8"),
    ],
)
def test_lines_that_are_no_answers(model_folder: Path, prompts: Path, line: bytes, message: str) -> None:
    assert generate(model_folder, prompts).exit_code == 0
    answers = prompts.with_suffix(".answers.jsonl")
    before = answers.read_bytes()
    answers.write_bytes(before + line + b"\n")
    done = generate(model_folder, prompts)
    assert done.exit_code == 2
    assert message in done.output
    assert f"{answers}:{before.count(10) + 1}" in done.output
    assert "remove that line" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("note", [b"", b"[1]", b"{", b"\xff"])
def test_a_note_that_is_none(model_folder: Path, prompts: Path, note: bytes) -> None:
    assert generate(model_folder, prompts).exit_code == 0
    prompts.with_name("prompts.answers.jsonl.job.json").write_bytes(note)
    done = generate(model_folder, prompts)
    assert done.exit_code == 2
    assert "as a JSON object, got something else" in done.output


def test_a_job_whose_prompts_are_mended_begins_anew(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [9999]}')
    assert generate(model_folder, path).exit_code == 2
    path.write_text('{"prompt": [5]}')
    done = generate(model_folder, path)
    assert done.exit_code == 0, done.output
    assert len(answers(path)) == 1


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
    assert again.output == ""
    # The roof of a CPU is not known.
    assert all((row["bound"] == "") != torch.cuda.is_available() for row in rows)


def test_bench_of_two_levels(model_folder: Path) -> None:
    done = run(
        "bench", "--config", model_folder, "--batch", 4, "--prefix", 10, "--completion", 6, "--tree", "2x8"
    )
    assert done.exit_code == 0, done.output
    assert "model0 > 2x8: first level shared only" in done.output
    wrong = run("bench", "--config", model_folder, "--batch", 5, "--prefix", 10, "--tree", "2x8")
    assert wrong.exit_code == 2
    assert "batch must be a multiple of the 2 branches, got 5" in wrong.output


@pytest.mark.parametrize("command", [[], ["generate"], ["bench"], ["demo"]])
def test_help(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.exit_code == 0
    assert "Usage" in done.output
