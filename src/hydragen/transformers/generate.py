"""hydragen.generate: answers to prompts that share tokens, each shared token computed and stored once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from hydragen.host_ints import IntArray, as_int_vector, as_positive_int
from hydragen.transformers.batches import Prompts, rows_at_a_time
from hydragen.transformers.cache import PrefixCache
from hydragen.transformers.decode import decode
from hydragen.transformers.defaults import warn_of_defaults
from hydragen.transformers.options import check_options
from hydragen.transformers.parallel import of_the_first
from hydragen.transformers.prompts import check_tokenizer, draw_seeds, join_levels, token_ids_of
from hydragen.transformers.sampling import Sampling
from hydragen.transformers.support import check_prompt, max_positions
from hydragen.transformers.tokens import token_rows


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes
    ----------
    prompt, sample : int
        Which prompt it answers, in the caller's order, and the how-manieth answer to it.
    token_ids : list of int
        The new tokens, a stop token included.
    text : str or None
        The new tokens as text, if a tokenizer was given; special tokens left out.
    logprobs : list of float or None
        Natural log of each token's probability under the model, before temperature and filters, if asked for.
    finish_reason : "stop" or "length"
    seed : int
        The same seed, given in a list, draws the same answer to the same prompt, whatever else is in the
        batch.
    """

    prompt: int
    sample: int
    token_ids: list[int]
    text: str | None
    logprobs: list[float] | None
    finish_reason: str
    seed: int


def generate(model: PreTrainedModel | PrefixCache, *prompts: object, **options: Any) -> list[Completion]:
    """Generate answers to prompts that share tokens: shared ones are computed once, stored once, read once
    per step.

    Parameters
    ----------
    model : transformers causal LM, or PrefixCache
        With attn_implementation="hydragen". A PrefixCache of one row is a prefix that was kept: the prompts
        go on from it, and it can be used again.
    *prompts : token ids or texts
        One prompt, or a list of them, unpadded; what they share is found. Further arguments are levels of
        prompts: what follows each path so far, `generate(model, system, questions)`, or `generate(model,
        system, documents, [[question, ...] for each document])`. Pieces of a path are joined. Texts need
        `tokenizer`, chats its `apply_chat_template`.
    tokenizer : optional
        For texts, and for `text` in the answers.
    num_return_sequences : int
        Answers per prompt.
    max_new_tokens : int
        The most tokens per answer; default 256.
    do_sample, temperature, top_k, top_p, min_p :
        How tokens are chosen; greedy by default. The model's generation_config is not consulted for these,
        nor for lengths and numbers of answers; what else it asks for (a repetition penalty, suppressed
        tokens) is not done, and a warning says so.
    seed : int or integers [num_prompts * num_return_sequences], optional
        One from which those of all answers are drawn, or one for each: ``seed=[answer.seed]`` draws an answer
        again. Default: drawn from torch's global generator.
    stop_token_ids : integers, optional
        Tokens that end an answer; default the eos_token_id of model.generation_config.
    logprobs : bool
        Return log-probabilities.
    batch_size : int, optional
        Answers computed at a time; default what fits in the device's memory (64 on a CPU).
    min_shared : int
        The fewest tokens that are stored as shared; default 16.
    progress : bool, optional
        Show a progress bar; by default on a terminal, when it takes more than three seconds.

    Returns
    -------
    list of Completion
        In the order of prompts, and of samples within each.

    Raises
    ------
    TypeError, ValueError
        If arguments do not fit together or the model cannot do it; before anything is computed.
    MemoryError
        If the answers' tokens do not fit; the message says how much is needed.

    Examples
    --------
    >>> out = hydragen.generate(model, system_ids, questions, num_return_sequences=8, do_sample=True)
    ... # doctest: +SKIP
    """
    check_options(options, stream, "hydragen.generate")
    return sorted(stream(model, *prompts, **options), key=lambda answer: (answer.prompt, answer.sample))


def stream(
    model: PreTrainedModel | PrefixCache,
    *prompts: object,
    tokenizer: Any = None,
    num_return_sequences: int = 1,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    logprobs: bool = False,
    batch_size: int | None = None,
    min_shared: int = 16,
    progress: bool | None = None,
) -> Iterator[Completion]:
    """As `generate`, but yield answers as they finish; arguments are checked when the first is asked for."""
    sampling = Sampling(do_sample, temperature, top_k, top_p, min_p)
    n = as_positive_int(num_return_sequences, "num_return_sequences")
    limit = as_positive_int(max_new_tokens, "max_new_tokens")
    if n > 1 and not do_sample:
        raise ValueError(
            f"num_return_sequences must be 1 for greedy decoding, whose answers are all the same, got {n}; "
            "pass do_sample=True"
        )
    base = model if isinstance(model, PrefixCache) else PrefixCache(model)
    base.check_weights()
    ids = _checked_prompts(base, prompts, tokenizer, limit)
    warn_of_defaults(base.model)
    seeds = of_the_first(base.model, draw_seeds(seed, len(ids) * n)).reshape(len(ids), n)
    stop = stop_ids(base.model, stop_token_ids)
    size = rows_at_a_time(batch_size, base, limit, max(x.size for x in ids))
    hidden = None if progress is None else not progress
    bar = tqdm(total=len(ids) * n, unit="answer", delay=0 if progress else 3, disable=hidden)
    stored = Prompts(base, ids, as_positive_int(min_shared, "min_shared"))
    given = np.zeros(len(ids), dtype=np.int64)
    with bar:
        for batch in stored.batches(n, size):
            samples = _sample_numbers(batch, given)
            cache = stored.cache_for(batch)
            limits = np.full(batch.size, limit)
            for done in decode(cache, limits, seeds[batch, samples], sampling, stop, logprobs):
                bar.update()
                prompt, sample = int(batch[done.row]), int(samples[done.row])
                yield Completion(
                    prompt,
                    sample,
                    done.token_ids,
                    tokenizer.decode(done.token_ids, skip_special_tokens=True) if tokenizer else None,
                    done.logprobs if logprobs else None,
                    done.reason,
                    int(seeds[prompt, sample]),
                )


def stop_ids(model: PreTrainedModel, given: Sequence[int] | int | None) -> list[int]:
    """Return the tokens that end an answer."""
    if given is None:
        given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        return []
    several = [given] if isinstance(given, (int, np.integer)) else given
    found: list[int] = as_int_vector(several, "stop_token_ids").tolist()
    return found


def _checked_prompts(
    base: PrefixCache, prompts: Sequence[object], tokenizer: Any, new_tokens: int
) -> list[IntArray]:
    """Return every prompt's token ids, after the base's; ValueError if they cannot be answered."""
    if base.num_rows > 1:
        raise ValueError(
            f"a kept prefix must be one row, got a PrefixCache of {base.num_rows}; pass cache.branch([row]), "
            "or continue all rows with cache.generate"
        )
    if not prompts:
        prompts = ([[]],) if base.num_rows else ([],)
    check_tokenizer(tokenizer)
    vocabulary = base.model.get_input_embeddings().num_embeddings
    if tokenizer is not None and len(tokenizer) > vocabulary:
        raise ValueError(
            f"tokenizer must be the model's: it has {len(tokenizer)} tokens, the model {vocabulary}"
        )
    ids = token_ids_of(join_levels(prompts), tokenizer, special=base.num_rows == 0)
    before = int(base.lengths[0]) if base.num_rows else 0
    for i, row in enumerate(ids):
        check_prompt(base.model, row, new_tokens, f"prompts[{i}]", before)
    return ids


def _sample_numbers(batch: IntArray, given: IntArray) -> IntArray:
    """Number the answers to each prompt, going on from batch to batch; `given` counts them."""
    numbers = np.empty_like(batch)
    for i, prompt in enumerate(batch.tolist()):
        numbers[i] = given[prompt]
        given[prompt] += 1
    return numbers


def continue_rows(
    cache: PrefixCache,
    input_ids: object = None,
    *,
    tokenizer: Any = None,
    max_new_tokens: int | Sequence[int] = 256,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    logprobs: bool = False,
) -> list[Completion]:
    """Continue every row of a cache, in place: what is generated stays in it, as in a chat.

    If it fails or is interrupted, nothing is handed out and the cache is as before, `input_ids` left out.

    Parameters
    ----------
    cache : PrefixCache
    input_ids : optional
        Tokens for each row to go on from, as `PrefixCache.extend` takes them.
    max_new_tokens : int, or one per row
        Rows with 0 are not answered.
    Others : as in `generate`

    Returns
    -------
    list of Completion
        One per row that is answered, in order: `prompt` is the row.
    """
    sampling = Sampling(do_sample, temperature, top_k, top_p, min_p)
    cache.check_weights()
    size = cache.num_rows
    each = [max_new_tokens] * size if isinstance(max_new_tokens, int) else max_new_tokens
    limits = as_int_vector(each, "max_new_tokens")
    if limits.size != size:
        raise ValueError(f"max_new_tokens must be an int, or one per row, {size}, got {limits.size} of them")
    if size == 0 or (limits < 0).any() or not limits.any():
        raise ValueError(
            f"max_new_tokens must be at least 1 for a row or more, got {max_new_tokens!r} for {size} rows; "
            + ("give a row that is to be answered more" if size else "prefill a prompt first")
        )
    given = [np.empty(0, np.int64)] * size if input_ids is None else token_rows(input_ids, "input_ids")
    most = max_positions(cache.model)
    if most is not None and len(given) == size:
        ends = cache.next_positions + [ids.size for ids in given] + limits
        row = int(ends.argmax())
        if ends[row] > most:
            raise ValueError(
                f"row {row} must leave room for {limits[row]} new tokens in the model's {most} positions, "
                f"got {ends[row] - limits[row]} tokens; ask for fewer"
            )
    # what may be refused comes before the first change of the cache
    seeds, stop = draw_seeds(seed, size), stop_ids(cache.model, stop_token_ids)
    check_tokenizer(tokenizer)
    warn_of_defaults(cache.model)
    with cache.undone_on_failure():
        cache.extend(given)
        seeds = of_the_first(cache.model, seeds)
        done = sorted(decode(cache, limits, seeds, sampling, stop, logprobs))
        return [
            Completion(
                one.row,
                0,
                one.token_ids,
                tokenizer.decode(one.token_ids, skip_special_tokens=True) if tokenizer else None,
                one.logprobs if logprobs else None,
                one.reason,
                int(seeds[one.row]),
            )
            for one in done
        ]
