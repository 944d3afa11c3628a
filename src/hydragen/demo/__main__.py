"""Run the demo: `hydragen demo [--out FOLDER]`, or `python -m hydragen.demo`."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import hydragen
from hydragen.demo.generation import CHAPTER_BYTES, NEW_TOKENS, Generated, compare, report
from hydragen.demo.measure import (
    WAYS,
    Exactness,
    measure_exactness,
    time_with_sharing,
    time_without_sharing,
    ways_fastest_first,
)
from hydragen.demo.workload import NUM_CHAPTERS, NUM_QUESTIONS, Batch, Embedding, Sizes, build_sequences


@dataclass(frozen=True)
class Measured:
    """What the demo found."""

    batch: Batch
    exactness: Exactness
    # Seconds with and without sharing, by the number of sequences.
    times: dict[int, tuple[float, float]]
    # Seconds without sharing for all sequences, by how ordinary attention is written; the fastest first.
    ways: dict[str, float]


def choose() -> tuple[torch.device, Sizes]:
    """A GPU if there is one, with a layer of an 8B model's size; else the CPU and a smaller layer."""
    if torch.cuda.is_available():
        return torch.device("cuda"), Sizes(32, 8, 128, torch.bfloat16)
    return torch.device("cpu"), Sizes(8, 2, 64, torch.float32)


def describe(device: torch.device, sizes: Sizes) -> str:
    """Say what runs where."""
    where = f"the CPU ({torch.get_num_threads()} threads), with the PyTorch reference"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name()}, with the Triton kernels"
    return (
        f"hydragen {hydragen.__version__} on {where}\n"
        f"One layer: {sizes.num_q_heads} query heads, {sizes.num_kv_heads} KV heads, "
        f"head_dim {sizes.head_dim}, {str(sizes.dtype).removeprefix('torch.')}"
    )


def measure(embedding: Embedding) -> Measured:
    """Time both ways for 1, 2, 4, ... sequences, and compare both with float64 for all of them."""
    counts = [2**i for i in range(NUM_QUESTIONS.bit_length())]
    times = {}
    # Each sequence that is prepared, timed or checked is a step.
    steps = 2 * sum(counts) + 2 * NUM_QUESTIONS
    with tqdm(total=steps, unit="sequence", leave=False, disable=None) as progress:
        progress.set_description("reading the document")
        sequences = build_sequences()
        fastest, other = ways_fastest_first(Batch.make(sequences[:1], embedding))
        for count in counts:
            progress.set_description(f"timing {count} sequences")
            batch = Batch.make(sequences[:count], embedding)
            progress.update(count)
            times[count] = (
                time_with_sharing(batch),
                time_without_sharing(batch, WAYS[fastest], progress.update),
            )
        ways = {
            fastest: times[NUM_QUESTIONS][1],
            other: time_without_sharing(batch, WAYS[other], progress.update),
        }
        progress.set_description("checking against float64")
        exactness = measure_exactness(batch, WAYS[fastest], progress.update)
    return Measured(batch, exactness, times, ways)


def table(found: Measured, sizes: Sizes) -> str:
    """Both ways side by side."""
    stored, copied = len(found.batch.k), int(found.batch.tree.path_lens.sum())
    shared = found.times[NUM_QUESTIONS][0]

    def megabytes(tokens: int) -> str:
        return f"{tokens * sizes.bytes_per_token / 1e6:,.0f} MB"

    def ms(time: float) -> str:
        return f"{time * 1e3:,.2f} ms"

    rows = [
        ("", "with sharing", "without", ""),
        ("KV memory", megabytes(stored), megabytes(copied), f"{copied / stored:.1f}x less"),
        *(
            ("time of attention", ms(shared), ms(without), f"{without / shared:.1f}x faster than SDPA, {way}")
            for way, without in found.ways.items()
        ),
        ("max error to float64", f"{found.exactness.shared:.1e}", f"{found.exactness.unshared:.1e}", ""),
    ]
    return "\n".join(f"{name:<22}{a:>14}{b:>14}   {note}".rstrip() for name, a, b, note in rows)


def draw(found: Measured, generated: Generated, path: Path) -> None:
    """Write a picture of how time grows with the number of sequences: of attention, and of generation."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = list(found.times)
    for column, label, style in (
        (1, "without sharing: PyTorch SDPA", "o--"),
        (0, "hydragen.attention", "o-"),
    ):
        left.plot(counts, [found.times[count][column] * 1e3 for count in counts], style, label=label)
    left.set(xlabel="sequences", ylabel="time of attention (ms)", xticks=counts[-4:])
    left.set_title(
        f"{NUM_QUESTIONS} questions about a document of {len(found.batch.k):,} tokens", fontsize=10
    )
    counts = list(generated.seconds)
    for column, label, style in (
        (0, "without sharing: transformers' generate", "o--"),
        (1, "hydragen.generate", "o-"),
    ):
        right.plot(counts, [generated.seconds[count][column] for count in counts], style, label=label)
    right.set(xlabel="sequences", ylabel="time of generation (s)", xticks=counts)
    right.set_title(f"{NEW_TOKENS} tokens per answer, {CHAPTER_BYTES:,} bytes of chapter", fontsize=10)
    for axes in (left, right):
        axes.set_ylim(0, None)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(prog="python -m hydragen.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    out: Path = parser.parse_args().out
    began = time.perf_counter()
    device, sizes = choose()
    print(describe(device, sizes), flush=True)
    found = measure(Embedding(sizes, device))
    print(
        f"Document: the Python language reference in {NUM_CHAPTERS} chapters, {NUM_QUESTIONS} questions; "
        f"a token is a byte\n\n{found.batch.tree.describe(24)}\n\n{table(found, sizes)}\n"
    )
    print(
        f"A head spreads its attention over about {found.exactness.tokens_attended:,.0f} of a row's tokens."
    )
    print(
        f"\nA small Llama with random weights answers them, {CHAPTER_BYTES:,} bytes of chapter each, "
        f"{NEW_TOKENS} tokens per answer, greedy:",
        flush=True,
    )
    generated = compare(device)
    print(f"\n{report(generated)}")
    picture = out / "demo.png"
    draw(found, generated, picture)
    print(f"Picture of time by number of sequences: {picture}")
    if generated.wrong:
        raise SystemExit(f"{generated.wrong} answers differ between shared and ordinary generation")
    print(f"Done in {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
