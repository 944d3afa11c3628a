"""What the command line refuses: in a line that names the argument, with exit status 2, before it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import answers, generate, run
from typer.testing import Result

from hydragen.transformers import model_files


def refused(done: Result, *messages: str) -> None:
    assert done.exit_code == 2, done.output
    assert all(message in done.stderr for message in messages), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def left(prompts: Path) -> list[str]:
    return sorted(path.name for path in prompts.parent.iterdir() if path.is_file())


@pytest.fixture
def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(model_files, "load", load)


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "nan"), "--temperature must be positive"),
        (("--temperature", 0, "-n", 3), "-n must be 1 with --temperature 0"),
        (("--temperature", 0, "--top-k", 5), "--top-k must not stand with --temperature 0"),
        (("--temperature", 0, "--top-p", 0.5), "--top-p must not stand with --temperature 0"),
        (("--top-p", 0), "--top-p must be above 0"),
        (("--min-p", 1.5), "--min-p must be above 0"),
        (("--temperature", 0, "--min-p", 0.5), "--min-p must not stand with --temperature 0"),
        (("--temperature", -1), "--temperature must be positive"),
        (("--top-k", 2**40), "top_k must be an integer of at least 1 and less than 2**31"),
        (("--batch-size", 2**31), "--batch-size must be an integer of at least 1 and less than 2**31"),
        (("--max-new-tokens", 2**31), "--max-new-tokens must be an integer"),
        (("-n", 2**40), "-n must be at most 1,073,741,824 for 2 prompts, got 1,099,511,627,776"),
        (
            ("--device", "foo"),
            "--device must be cpu, or a GPU that torch finds, as cuda or cuda:1, got foo; ",
        ),
        (("--device", ""), "--device must be cpu, or a GPU"),
        (("--device", "cuda:99"), "got cuda:99: torch finds"),
        (("--device", "xla"), "got xla: "),
        (("--device", "meta"), "got meta, which holds no data"),
    ],
)
def test_options_are_refused_without_the_model(
    model_folder: Path, prompts: Path, options: tuple[object, ...], message: str
) -> None:
    refused(generate(model_folder, prompts, *options), message)
    assert left(prompts) == ["prompts.jsonl"], "nothing is written"


def test_temperature_0_is_greedy(model_folder: Path, prompts: Path) -> None:
    assert generate(model_folder, prompts).exit_code == 0
    assert generate(model_folder, prompts, "--temperature", 0).exit_code == 0, "the same job"


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_bench_refuses_a_device(model_folder: Path, device: str) -> None:
    refused(run("bench", "--config", model_folder, "--device", device), f"got {device}")


@pytest.mark.parametrize(
    "tree", ["²x8", "8x²", "0x8", "8", "8x", "x8", "8x8x8", "-1x8", "9" * 5000 + "x8", "٣x8"]
)
def test_trees_that_are_none(model_folder: Path, tree: str) -> None:
    done = run("bench", "--config", model_folder, "--batch", 8, "--tree", tree)
    refused(done, f"--tree must be like 8x2048, nodes x tokens, each from 1 to 999,999,999, got {tree[:60]}")


@pytest.mark.usefixtures("not_loaded")
def test_the_prompts_are_not_written_over(model_folder: Path, prompts: Path) -> None:
    folder, before = prompts.parent, prompts.read_bytes()
    note = prompts.rename(folder / "p.job.json")
    (folder / "other").symlink_to(note)
    os.link(note, folder / "linked.job.json")
    (folder / "aside.job.json").symlink_to(note)
    (folder / "deep").mkdir()
    outs = "p", "p.job.json", "other", "linked", "linked.job.json", "aside", "deep/../p"
    names = left(note)
    for out in outs:
        refused(generate(model_folder, note, "--out", folder / out), "--out must leave the prompts alone")
        refused(
            generate(model_folder, folder / "other", "--out", folder / out), "--out must leave the prompts"
        )
    assert left(note) == names
    assert note.read_bytes() == before


@pytest.mark.usefixtures("not_loaded")
def test_out_must_be_a_file(model_folder: Path, prompts: Path) -> None:
    folder = prompts.parent / "folder"
    folder.mkdir()
    refused(
        generate(model_folder, prompts, "--out", folder), f"--out must name a file; {folder}", "is a folder"
    )
    (prompts.parent / "a.job.json").mkdir()
    refused(
        generate(model_folder, prompts, "--out", prompts.parent / "a"), "--out must name a file", "a.job.json"
    )
    for below in ("x", "x/y"):
        done = generate(model_folder, prompts, "--out", prompts / below)
        refused(done, f"--out must be in a folder, got {prompts / below}, above which is a file")
    assert left(prompts) == ["prompts.jsonl"]


def test_damaged_weights_are_named(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    for size in (2, 1000, weights.stat().st_size - 1):
        os.truncate(weights, size)
        done = generate(folder, prompts)
        assert done.exit_code == 2, done.output
        assert f"{weights} must hold weights, got a damaged file: " in done.stderr
        assert "Traceback" not in done.output
        shutil.copy(model_folder / "model.safetensors", weights)
    assert generate(folder, prompts).exit_code == 0


def test_other_failures_of_a_load_are_not_called_damage(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(model_files.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(RuntimeError, match="something else"):
        model_files.load(str(model_folder), "auto", "cpu")


def test_models_on_the_hub_are_known_by_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_files.state_of("owner/never-downloaded") is None
    config = tmp_path / "0123abcd" / "config.json"
    monkeypatch.setattr(model_files, "try_to_load_from_cache", lambda *_: str(config))
    assert model_files.state_of("owner/name") == "0123abcd"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f'{{"prompt": [{"9" * 5000}]}}', "prompts.jsonl:2 must hold integers of at most 4,300 digits"),
        ("9" * 5000, "prompts.jsonl:2 must hold integers of at most"),
        (
            r'{"prompt": "w5 \ud800 w6"}',
            r"prompts.jsonl:2 must hold whole characters, got the lone surrogate \ud800",
        ),
        (
            json.dumps({"messages": [{"role": "user", "content": "\udfff"}]}),
            r"prompts.jsonl:2 must hold whole characters, got the lone surrogate \udfff",
        ),
    ],
)
def test_lines_that_python_reads_otherwise(
    model_folder: Path, prompts: Path, line: str, message: str
) -> None:
    prompts.write_text('{"prompt": [5]}\n' + line + "\n")
    refused(generate(model_folder, prompts), message)


def test_both_surrogates_are_a_character(model_folder: Path, prompts: Path) -> None:
    prompts.write_text(r'{"prompt": "w5 \ud83d\ude00"}' + "\n")
    assert generate(model_folder, prompts).exit_code == 0
    assert len(answers(prompts)) == 1


def test_python_m_hydragen_is_the_command_line() -> None:
    def call(code: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *code], capture_output=True, text=True)

    done = call(["-m", "hydragen", "bench", "--help"])
    assert done.returncode == 0, done.stderr
    assert "Usage: hydragen bench [OPTIONS]" in done.stdout
    without = (
        "import runpy, sys; sys.modules['typer'] = None; runpy.run_module('hydragen', run_name='__main__')"
    )
    done = call(["-c", without])
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "the command line needs more: pip install '.[cli]' in hydragen's checkout"
    ]
