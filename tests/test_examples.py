"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_decode_loop_gives_the_tokens_of_ordinary_attention(capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / "decode_loop.py"
    assert len(path.read_text().splitlines()) <= 80
    spec = importlib.util.spec_from_file_location("decode_loop", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(example)
        example.main()
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("question")]
        assert len(printed) == 3 * example.ANSWERS
        for row in (0, 6, 11):
            answer = [int(token) for token in printed[row].partition(": ")[2].split()]
            ids = [*example.document, *example.questions[row // example.ANSWERS], answer[0]]
            for expected in answer[1:]:
                found = next_token(example, torch.tensor([ids]))
                assert found == expected
                ids.append(found)
    finally:
        torch.set_default_device(None)


@torch.inference_mode()
def next_token(example: object, ids: torch.Tensor) -> int:
    """The example's model with PyTorch's attention over all tokens, nothing shared, nothing kept."""
    x = example.embed(ids)
    for layer in example.layers:
        parts = layer(x).split([example.WIDTH, example.KV_WIDTH, example.KV_WIDTH], -1)
        q, k, v = (part.unflatten(-1, (-1, example.DIM)).transpose(1, 2) for part in parts)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + out.transpose(1, 2).flatten(-2)
    return int(example.head(x)[0, -1].argmax())
