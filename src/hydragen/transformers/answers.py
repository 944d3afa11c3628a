"""Answers to a JSONL file: what an interruption left is kept and gone on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hydragen.transformers.generate import Completion
from hydragen.transformers.jsonl import records

try:
    import fcntl
except ImportError:  # not on Windows, where nothing tells of a second process
    fcntl = None  # type: ignore[assignment]  # a module, or nothing

# Seeds, rows and answers are counted in 32 bits elsewhere; nobody waits for more.
MOST_ANSWERS = 2**31


@dataclass(frozen=True)
class Job:
    """Answers that are asked for: `n` to each of `prompts` (token ids), under `settings`.

    `more` is what the answers to each prompt say besides, if any does.
    """

    prompts: Sequence[list[int]]
    n: int
    settings: dict[str, Any]
    more: Sequence[dict[str, Any]] = ()

    def __post_init__(self) -> None:
        count = len(self.prompts)
        if count * self.n > MOST_ANSWERS:
            raise ValueError(
                f"-n must be at most {MOST_ANSWERS // count:,} for {count:,} prompts, got {self.n:,}; choose "
                "a smaller one"
            )

    def missing(self, have: set[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yield what is still to be made, as (prompt, sample)."""
        every = ((i, j) for i in range(len(self.prompts)) for j in range(self.n))
        return (place for place in every if place not in have)

    def to_go(self, have: set[tuple[int, int]]) -> int:
        """Return how many are still to be made; `have` may hold further answers, of a larger `n`."""
        return len(self.prompts) * self.n - sum(sample < self.n for _, sample in have)

    def seed(self, prompt: int, sample: int) -> int:
        """Return the seed of an answer: from the job's and its own place, so the same after a restart."""
        place = f"{self.settings['seed']} {prompt} {sample}".encode()
        return int.from_bytes(hashlib.blake2b(place, digest_size=7).digest())


def note_of(path: Path) -> Path:
    """Return the file that says what the answers in `path` answer."""
    return path.with_name(path.name + ".job.json")


def check_out(path: Path, prompts: Path) -> None:
    """Raise a ValueError unless answers and note can be files, and neither is that of the prompts."""
    for written, what in ((path, "the answers"), (note_of(path), "a note about the answers")):
        if written.is_dir():
            raise ValueError(
                f"--out must name a file; {written}, where {what} would be written, is a folder; name a file "
                "in it, or another"
            )
        # By what they are, not by their names: there are links, and file systems that ignore the case.
        if written.exists() and written.samefile(prompts):
            raise ValueError(
                f"--out must leave the prompts alone; {what} would be written to {written}, which is "
                f"{prompts}; give --out another name"
            )


class Answers:
    """The output file: a line per answer, written as it is finished.

    A second file beside it says what was asked for, so that a run goes on only where it is the same job.

    Attributes
    ----------
    repeated : int
        Lines that answer what a line before them does, as when two processes wrote: the first counts.
    """

    def __init__(self, path: Path, job: Job) -> None:
        self.path, self.job = path, job
        self.note = note_of(path)
        self.repeated = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from writing these answers; the system lets go however the process ends.

        Raises
        ------
        ValueError
            If another process writes them, or the file cannot be made.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"--out must be in a folder, got {self.path}, above which is a file") from error
        with self.path.open("ab") as file:
            try:
                _lock(file)
            except BlockingIOError as error:
                raise ValueError(
                    f"{self.path} is being written by another process; wait until it has ended, or give "
                    "--out another file"
                ) from error
            yield

    def resume(self) -> set[tuple[int, int]]:
        """Return the answers that are there already; a line that was cut off is removed.

        Raises
        ------
        ValueError
            If the file belongs to another job, or holds what is no answer; names the line and what to do.
        """
        asked = {**self.job.settings, "prompts": _digest(self.job.prompts)}
        if any(self.job.more):
            asked["keys_beside_prompts"] = _digest(self.job.more)
        if not self.path.exists() or not self.path.stat().st_size:
            self.note.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
            self.path.touch()
            return set()
        differ = _differing(self._noted(), asked)
        if differ:
            raise ValueError(
                f"{self.path} holds answers of another job, with other {', '.join(differ)}; give --out "
                "another file, or remove this one"
            )
        return self.written()

    def _noted(self) -> dict[str, Any]:
        """Return what the note says was asked for; nothing if there is none."""
        if not self.note.exists():
            return {}
        try:
            before = json.loads(self.note.read_bytes())
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise ValueError(
                f"{self.note} must say what {self.path} answers, as a JSON object, got something else; give "
                "--out another file, or remove both"
            )
        return before

    def written(self) -> set[tuple[int, int]]:
        """Return the answers in the file, and count those that are `repeated`; a cut line is removed."""
        whole = self.path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        with self.path.open("r+b") as file:
            file.truncate(len(whole))
        remedy = "remove that line: its answer is made again"
        have: set[tuple[int, int]] = set()
        self.repeated = 0
        for number, line, record in records(whole, self.path, remedy):
            where, got = f"{self.path}:{number}", f"got {line[:60]}; {remedy}"
            answer = record if isinstance(record, dict) else {}
            prompt: Any = answer.get("prompt")
            sample: Any = answer.get("sample")
            if not (_is_count(prompt) and _is_count(sample)):
                raise ValueError(
                    f"{where} must be an answer, with the numbers of its prompt and sample, {got}"
                )
            if prompt >= len(self.job.prompts):
                raise ValueError(
                    f"{where} must answer one of the {len(self.job.prompts):,} prompts, counted from 0, {got}"
                )
            tokens = answer.get("token_ids")
            if not (isinstance(tokens, list) and tokens and all(map(_is_count, tokens))):
                raise ValueError(f"{where} must be an answer with its token_ids, one or more, {got}")
            self.repeated += (prompt, sample) in have
            have.add((prompt, sample))
        return have

    def write(
        self, answers: Iterator[Completion], places: list[tuple[int, int]]
    ) -> Iterator[tuple[int, int]]:
        """Append answers as they come, answer i's prompt being places[i]; yield the place of each written."""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            for one in answers:
                prompt, sample = places[one.prompt]
                record: dict[str, Any] = {
                    "prompt": prompt,
                    "sample": sample,
                    "text": one.text,
                    "token_ids": one.token_ids,
                    "finish_reason": one.finish_reason,
                    "seed": one.seed,
                }
                if one.logprobs is not None:
                    record["logprobs"] = one.logprobs
                if self.job.more:
                    record.update(self.job.more[prompt])
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                yield prompt, sample


def _lock(file: IO[bytes]) -> None:
    """Lock a file while it is open; BlockingIOError if another has."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks: nothing can be told there
        return


def _differing(before: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Return the names of the settings that differ."""
    differ = [k for k in {**asked, **before} if k != "model_files" and before.get(k) != asked.get(k)]
    old, new = before.get("model_files"), asked.get("model_files")
    # A note of an older version has none; of a model on the hub that is not here yet nothing is known.
    if before and old is not None and new is not None and old != new:
        files = {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else {}
        changed = ", ".join(name for name in files if old.get(name) != new.get(name))
        differ.append(f"model files ({changed})" if changed else "model files")
    return differ


def _is_count(x: Any) -> bool:
    return type(x) is int and x >= 0


def _digest(prompts: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(list(prompts)).encode(), digest_size=16).hexdigest()
