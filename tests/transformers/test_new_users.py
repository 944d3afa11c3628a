"""What new users tried first: models cut short, one question, chats, other options, what a cache says."""

from __future__ import annotations

import codecs
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import answers, generate, run
from conversations import SYSTEM, greedy
from models import config_of, make_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import hydragen
from hydragen.transformers import PrefixCache

LAYERS = ["sliding_attention", "full_attention"] * 3


@pytest.fixture
def ours() -> PreTrainedModel:
    return make_model("llama")


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_config_that_lists_more_layers_than_it_has(family: str) -> None:
    config = config_of(family, num_hidden_layers=6, **({"layer_types": LAYERS} if family == "gemma3" else {}))
    assert len(config.layer_types) == 6
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hydragen").eval()
    (found,) = hydragen.generate(model, SYSTEM, max_new_tokens=4)
    assert found.token_ids == greedy(model, SYSTEM, 4)


def test_a_model_cut_short_names_its_config(ours: PreTrainedModel) -> None:
    ours.model.layers = ours.model.layers[:1]
    with pytest.raises(
        ValueError, match="the 2 layers that its config says, got 1; set num_hidden_layers = 1"
    ):
        hydragen.generate(ours, SYSTEM, max_new_tokens=2)
    ours.config.num_hidden_layers = 1
    (found,) = hydragen.generate(ours, SYSTEM, max_new_tokens=2)
    assert found.token_ids == greedy(ours, SYSTEM, 2)


def test_one_question_of_one_prompt(ours: PreTrainedModel) -> None:
    expected = hydragen.generate(ours, SYSTEM, [[4, 5]], max_new_tokens=3, seed=0)
    for question in ([4, 5], torch.tensor([4, 5])):
        assert hydragen.generate(ours, SYSTEM, question, max_new_tokens=3, seed=0) == expected
        assert hydragen.generate(ours, SYSTEM, [4], question[1:], max_new_tokens=3, seed=0) == expected
    with pytest.raises(ValueError, match=r"each of the 2 paths above it, got one prompt; nest it"):
        hydragen.generate(ours, [[1, 2], [3]], [4, 5], max_new_tokens=3)


def test_messages_of_a_chat(ours: PreTrainedModel) -> None:
    for prompts in ([{"role": "user", "content": "Hi"}], (SYSTEM, [{"role": "user", "content": "Hi"}])):
        given = prompts if isinstance(prompts, tuple) else (prompts,)
        with pytest.raises(TypeError, match=r"got the messages of a chat; .*apply_chat_template"):
            hydragen.generate(ours, *given, max_new_tokens=3)


def test_what_the_package_finds() -> None:
    code = """
import sys, hydragen
assert not {"hydragen.transformers", "hydragen.distributed", "transformers"} & sys.modules.keys()
assert {"generate", "distributed", "transformers", "testing", "attention"} <= set(dir(hydragen))
print(hydragen.distributed.merge_over_ranks.__name__, hydragen.transformers.PrefixCache.__name__)
try:
    hydragen.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "merge_over_ranks PrefixCache\nmodule 'hydragen' has no attribute 'nothing'\n"


def test_what_a_cache_says_of_itself(ours: PreTrainedModel) -> None:
    assert repr(PrefixCache(ours)) == "PrefixCache(rows=0, stored_tokens=0, layers=2)"
    fork = PrefixCache(ours).prefill(SYSTEM).fork(3)
    fork.extend([[5], [], [6, 7]])
    assert repr(fork) == "PrefixCache(rows=3, lengths=20 to 22, stored_tokens=23, layers=2)"


def test_gradients_are_not_dropped_in_silence(ours: PreTrainedModel) -> None:
    fork = PrefixCache(ours).prefill(SYSTEM).fork(2)
    tokens = {"input_ids": torch.tensor([[5], [6]]), "past_key_values": fork}
    with pytest.raises(ValueError, match=r"keeps no graph, got keys and values that require gradients; call"):
        ours(**tokens)
    fork.reset()
    with torch.no_grad():
        assert ours(**tokens).logits.shape == (2, 1, 97)
    assert fork.lengths.tolist() == [21, 21]


def test_after_the_models_own_generate(ours: PreTrainedModel) -> None:
    fork = PrefixCache(ours).prefill(SYSTEM).fork(1)
    ids = torch.tensor([[*SYSTEM, 5]])
    out = ours.generate(ids, past_key_values=fork, max_new_tokens=3, do_sample=False)
    with pytest.raises(
        ValueError, match="the model's own generate beginning with the last that it handed out"
    ):
        fork.generate(max_new_tokens=2)
    (found,) = fork.generate([out[0, -1:].tolist()], max_new_tokens=2)
    assert found.token_ids == greedy(ours, out[0].tolist(), 2)


def test_options_of_the_command_line(model_folder: Path, prompts: Path) -> None:
    assert run("--version").output == f"hydragen {hydragen.__version__}\n"
    prompts.write_bytes(codecs.BOM_UTF8 + prompts.read_bytes())
    first = generate(model_folder, prompts)
    assert first.exit_code == 0, first.output
    plain = [x["token_ids"] for x in answers(prompts)]
    stop = plain[0][1]
    out = prompts.with_name("stopped.jsonl")
    done = generate(model_folder, prompts, "--stop-token-id", stop, "--min-p", 1.0, "--out", out)
    assert done.exit_code == 0, done.output
    stopped = [json.loads(line) for line in out.read_text().splitlines()]
    # --min-p 1 leaves only the likeliest token to draw from
    for one, ids in zip(sorted(stopped, key=lambda x: x["prompt"]), plain, strict=True):
        assert one["token_ids"] == (ids[: ids.index(stop) + 1] if stop in ids else ids)
    assert stopped[0]["finish_reason"] == "stop"


def test_a_job_is_the_same_from_another_folder(
    model_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate(model_folder, prompts).exit_code == 0
    monkeypatch.chdir(model_folder.parent)
    again = generate(Path(model_folder.name), prompts)
    assert again.exit_code == 0, again.output
    assert "2 answers are there already, 0 to go" in again.output


def test_bench_says_what_it_has(model_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    sizes = ("--batch", 2, "--prefix", 32, "--completion", 4, "--no-hf", "--out", table)
    for expected in ("tokens/s of", f"all 1 cases are in {table} already"):
        done = run("bench", "--config", model_folder, *sizes)
        assert done.exit_code == 0, done.output
        assert expected in done.output
