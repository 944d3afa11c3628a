"""The command line: hydragen generate | bench | demo. Needs the extra `cli`."""

# torch and transformers take seconds to import, which --help need not take: functions import them ("slow").

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
except ImportError as error:
    raise SystemExit("the command line needs more: pip install '.[cli]' in hydragen's checkout") from error

from hydragen.cli_checks import check_prompts, check_sizes, config_name, sampling_of, two_levels

if TYPE_CHECKING:
    from hydragen.transformers.answers import Answers

# Answers that are laid out together: the first of a large job come soon.
ANSWERS_AT_A_TIME = 8192

app = typer.Typer(
    help="Exact attention over shared prefixes: generate, measure, look.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in the help are JSON, not markup
)


class Dtype(StrEnum):
    """What the weights are loaded as."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def say_version(asked: bool) -> None:
    """Write the version, and end."""
    if asked:
        from hydragen import __version__

        typer.echo(f"hydragen {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=say_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Exact attention over shared prefixes: generate, measure, look."""


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; by default the GPU if there is one.")]


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="A folder with a transformers causal LM, or its name.")],
    prompts: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='JSONL: {"prompt": "text" or [ids]} or {"messages": [...]}; answers have its other keys.',
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="JSONL, a line per answer; default: PROMPTS.answers.jsonl.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Answers per prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens per answer.")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Default 1 if n > 1, or with --top-k, --top-p or --min-p; else greedy. 0 is greedy."
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens up to this sum.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens at least this share as likely as the likeliest.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(min=0, help="A token that ends an answer; may be repeated. Default: the model's own."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers, restarts included.")] = 0,
    logprobs: Annotated[bool, typer.Option(help="Write each token's log-probability.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: what fits in memory.")] = None,
    dtype: Dtype = Dtype.auto,
    device: Device = "auto",
) -> None:
    """Answer every prompt of a file n times; what prompts share is computed and stored once.

    Answers are written as they finish. After an interruption the same command goes on where it stopped:
    nothing is lost and nothing is made twice. With a --temperature, a larger n adds answers to those that
    are there; without one, -n 1 is greedy and more are drawn, which is another job. So are other prompts, and
    a model whose files have another size or time.
    """
    from tqdm import tqdm

    from hydragen.transformers import stream
    from hydragen.transformers.answers import Answers, Job, check_out
    from hydragen.transformers.jsonl import read_prompts
    from hydragen.transformers.model_files import load, pick, state_of
    from hydragen.transformers.pretrained import check_name, tokenizer_of

    with told():
        # What can be refused without the model is refused before anything is written.
        sampling = sampling_of(n, temperature, top_k, top_p, min_p)
        check_sizes(max_new_tokens=max_new_tokens, batch_size=batch_size)
        path = out or prompts.with_suffix(".answers.jsonl")
        check_out(path, prompts)
        check_name(model)
        place, tokenizer = pick(device), tokenizer_of(model)
        settings = {
            "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
            "model_files": state_of(model),
            "max_new_tokens": max_new_tokens,
            **sampling,
            **({"stop_token_ids": stop_token_id} if stop_token_id else {}),
            "seed": seed,
            "logprobs": logprobs,
            "dtype": dtype.value,
        }
        given = read_prompts(prompts, tokenizer, model)
        job = Job([x.ids for x in given.values()], n, settings, [x.more for x in given.values()])
        answers = Answers(path, job)
        with answers.alone():
            have = answers.resume()
            places, to_go = job.missing(have), job.to_go(have)
            if have:
                typer.echo(f"{len(have):,} answers are there already, {to_go:,} to go", err=True)
            if answers.repeated:
                typer.echo(f"{answers.repeated:,} lines repeat others: the first of each counts", err=True)
            if not to_go:
                return
            with goes_on(answers):
                loaded, made = load(model, dtype.value, place), 0
                check_prompts(loaded, given, max_new_tokens)
                with tqdm(total=to_go, unit="answer", delay=3, disable=None) as bar:
                    while some := list(islice(places, ANSWERS_AT_A_TIME)):
                        finished = stream(
                            loaded,
                            [job.prompts[prompt] for prompt, _ in some],
                            tokenizer=tokenizer,
                            max_new_tokens=max_new_tokens,
                            seed=[job.seed(*one) for one in some],
                            logprobs=logprobs,
                            stop_token_ids=stop_token_id or None,
                            batch_size=batch_size,
                            progress=False,
                            **sampling,
                        )
                        for _ in answers.write(finished, some):
                            made += 1
                            bar.update()
        typer.echo(f"wrote {made:,} answers to {answers.path}", err=True)


@app.command()
def bench(
    config: Annotated[Path, typer.Option(exists=True, help="A model's config.json, or the folder it is in.")],
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences; may be repeated.")] = None,
    prefix: Annotated[list[int] | None, typer.Option(min=1, help="Shared tokens; may be repeated.")] = None,
    completion: Annotated[int, typer.Option(min=4, help="New tokens per sequence.")] = 128,
    out: Annotated[
        Path | None, typer.Option(help="CSV, details in a .json beside it; cases it has are not repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the table.")] = None,
    hf: Annotated[bool, typer.Option(help="Also measure transformers' own generate.")] = True,
    tree: Annotated[
        str | None, typer.Option(help="Two levels instead, e.g. 8x2048: 8 nodes of 2,048 under the prefix.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Begin no case when this is nearly over.")] = 3600,
    dtype: Dtype = Dtype.auto,
    device: Device = "auto",
) -> None:
    """Measure decode throughput with random weights: shared, and what else one could do.

    Tokens per second of all sequences together, prefill apart. Columns: ours; ours with attention switched
    off; the prefix stored once but read by every sequence; transformers' generate with the prefix copied; and
    the bound, which is attention switched off plus the least time its memory traffic and arithmetic take.
    """
    from hydragen.transformers.bench import run
    from hydragen.transformers.bench_cases import Case, random_model
    from hydragen.transformers.bench_files import Results
    from hydragen.transformers.model_files import pick

    with told():
        place = pick(device)
        label = name or config_name(config)
        branches, branch = two_levels(tree)
        cases = [
            Case(label, size, tokens, completion, branches, branch, hf=hf and not branches)
            for tokens in prefix or [1024, 4096]
            for size in batch or [32, 256]
        ]
        chosen, results = None if dtype is Dtype.auto else dtype.value, Results(out)
        if all(results.has(case.key) for case in cases):
            typer.echo(f"all {len(cases)} cases are in {out} already", err=True)
        run(
            cases,
            lambda _: random_model(config, chosen, place),
            results,
            seconds=seconds,
            say=typer.echo,
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("out"),
) -> None:
    """Attend to a real document with and without sharing: exactness, time and memory side by side.

    About a minute on two cores.
    """
    sys.argv = ["hydragen demo", "--out", str(out)]
    runpy.run_module("hydragen.demo", run_name="__main__")


@contextmanager
def told() -> Iterator[None]:
    """Turn mistakes that the library explains into a message and exit status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, MemoryError) as error:
        typer.echo(f"hydragen: {error}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def goes_on(answers: Answers) -> Iterator[None]:
    """Say after Ctrl-C what is written and how to go on; typer ends with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        # Counted in the file: the interruption may have come between a line and its count.
        count = len(answers.written())
        typer.echo(
            f"\nhydragen: interrupted; {count:,} answers are in {answers.path}, and the same command goes on "
            "from there",
            err=True,
        )
        raise


if __name__ == "__main__":
    app()
