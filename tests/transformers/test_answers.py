"""The answers' file and its note: what a run goes on from, and what it refuses to."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from command_line import answers, generate
from models import make_model
from transformers import AutoTokenizer

from hydragen.transformers import Completion
from hydragen.transformers import answers as answer_files
from hydragen.transformers.answers import MOST_ANSWERS, Answers, Job
from hydragen.transformers.jsonl import read_prompts


def test_texts_with_ends_of_lines_of_their_own(model_folder: Path, tmp_path: Path) -> None:
    """What str.splitlines takes for the end of a line may stand in JSON as it is."""
    odd = "w5\u2028w6\u2029w7\x85w8"
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n\n" + '{"prompt": [5]}', "utf-8")
    given = read_prompts(path, AutoTokenizer.from_pretrained(model_folder), "model")
    assert list(given) == [f"{path}:1", f"{path}:3"]
    prompts = [one.ids for one in given.values()]
    assert prompts == [[5, 6, 7, 8], [5]]
    job = Job(prompts, 1, {"seed": 0})
    made = [Completion(i, 0, [7, 8], odd, None, "length", 3) for i in range(2)]
    answers = Answers(tmp_path / "answers.jsonl", job)
    assert answers.resume() == set()
    assert list(answers.write(iter(made), [(0, 0), (1, 0)])) == [(0, 0), (1, 0)]
    assert answers.resume() == {(0, 0), (1, 0)}
    with answers.path.open("a") as file:
        file.write("{oh\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl:3 must be JSON.*remove that line"):
        answers.resume()


def test_answers_of_another_job_are_not_mixed_in(model_folder: Path, prompts: Path) -> None:
    assert generate(model_folder, prompts).exit_code == 0
    done = generate(model_folder, prompts, "--temperature", 0.5)
    assert done.exit_code == 2
    assert "holds answers of another job, with other do_sample, temperature" in done.output


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 0, "sample": 0}', "must be an answer with its token_ids"),
        ('{"prompt": 0, "sample": 0, "token_ids": []}', "must be an answer with its token_ids"),
        ('{"prompt": 0, "sample": 0, "token_ids": "garbage"}', "must be an answer with its token_ids"),
        ('{"prompt": 0, "sample": 0, "token_ids": [5, null]}', "must be an answer with its token_ids"),
        ('{"prompt": 2, "sample": 0, "token_ids": [5]}', "must answer one of the 2 prompts, counted from 0"),
        ('{"prompt": ' + "9" * 5000 + ', "sample": 0}', "must hold integers of at most 4,300 digits"),
    ],
)
def test_lines_that_do_not_count(model_folder: Path, prompts: Path, line: str, message: str) -> None:
    assert generate(model_folder, prompts).exit_code == 0
    path = prompts.with_suffix(".answers.jsonl")
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(second + line + "\n")
    done = generate(model_folder, prompts)
    assert done.exit_code == 2
    assert f"{path}:2 {message}" in done.stderr
    assert path.read_text() == second + line + "\n"
    path.write_text(second)  # as the message says
    assert generate(model_folder, prompts).exit_code == 0
    assert path.read_text() == second + first


def test_repeated_lines_are_told_and_left(model_folder: Path, prompts: Path) -> None:
    assert generate(model_folder, prompts, "-n", 2).exit_code == 0
    path = prompts.with_suffix(".answers.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[:3]))
    done = generate(model_folder, prompts, "-n", 2)
    assert done.exit_code == 0
    assert "3 answers are there already, 1 to go" in done.stderr
    assert "3 lines repeat others: the first of each counts" in done.stderr
    assert "wrote 1 answers" in done.stderr
    assert path.read_text().splitlines(keepends=True) == lines[:3] + lines[:3] + lines[3:]


def test_more_answers_are_added_and_fewer_asked_for(model_folder: Path, prompts: Path) -> None:
    assert generate(model_folder, prompts, "-n", 3, "--temperature", 1).exit_code == 0
    whole = answers(prompts)
    fewer = generate(model_folder, prompts, "-n", 2, "--temperature", 1)
    assert "6 answers are there already, 0 to go" in fewer.stderr
    assert answers(prompts) == whole


def test_large_jobs_are_not_laid_out_as_a_whole() -> None:
    job = Job([[5], [6]], MOST_ANSWERS // 2, {"seed": 0})
    have = {(0, 0), (1, 5), (1, MOST_ANSWERS)}
    assert job.to_go(have) == MOST_ANSWERS - 2
    assert list(islice(job.missing(have), 2)) == [(0, 1), (0, 2)]
    with pytest.raises(
        ValueError, match=r"-n must be at most 1,073,741,824 for 2 prompts, got 1,073,741,825"
    ):
        Job([[5], [6]], MOST_ANSWERS // 2 + 1, {"seed": 0})


def test_answers_of_other_weights_are_not_mixed_in(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changing"
    shutil.copytree(model_folder, folder)
    assert generate(folder, prompts, "-n", 2).exit_code == 0
    whole = answers(prompts)
    make_model("llama", seed=9).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    done = generate(folder, prompts, "-n", 3)
    assert done.exit_code == 2
    assert (
        "holds answers of another job, with other model files (model.safetensors); give --out" in done.stderr
    )
    assert answers(prompts) == whole
    # A note of before files were noted
    note = prompts.with_name("prompts.answers.jsonl.job.json")
    noted = json.loads(note.read_text())
    del noted["model_files"]
    note.write_text(json.dumps(noted))
    assert generate(folder, prompts, "-n", 3).exit_code == 0
    assert len(answers(prompts)) == 6


def test_another_tokenizer_file_is_no_other_model(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "same"
    shutil.copytree(model_folder, folder)
    assert generate(folder, prompts).exit_code == 0
    (folder / "README.md").write_text("something")
    assert "2 answers are there already, 0 to go" in generate(folder, prompts).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no advisory locks")
def test_two_processes_do_not_write_the_same_answers(model_folder: Path, prompts: Path) -> None:
    path = prompts.with_suffix(".answers.jsonl")
    code = (
        f"import fcntl; f = open({str(path)!r}, 'ab'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        done = generate(model_folder, prompts)
        assert done.exit_code == 2
        assert f"{path} is being written by another process; wait until it has ended" in done.stderr
        assert path.read_bytes() == b""
        other.kill()
    assert generate(model_folder, prompts).exit_code == 0, "the lock ends with its process"
    assert generate(model_folder, prompts).exit_code == 0, "and with a command"


def test_without_locks_nothing_is_told(
    model_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(answer_files, "fcntl", Refusing)
    assert generate(model_folder, prompts).exit_code == 0
    monkeypatch.setattr(answer_files, "fcntl", None)
    assert generate(model_folder, prompts, "--out", prompts.with_name("again")).exit_code == 0
