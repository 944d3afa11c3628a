"""What the demo attends to: a real document, questions about it, and q, k and v made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydragen import PackedKV, PrefixTree, attention

NUM_CHAPTERS = 4
NUM_QUESTIONS = 64
# Questions have one length, so that the rows of a chapter can be batched without sharing, too.
QUESTION_BYTES = 128
SYSTEM = (
    "You answer questions about the Python language from one chapter of its reference. Quote the sentence "
    "that answers the question, name its topic, and say so if the chapter does not answer it.\n\n"
)


@dataclass(frozen=True)
class Sizes:
    """What a layer of the model looks like: small on a CPU, that of an 8B model on a GPU."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the keys and values of one token take."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def build_sequences() -> list[NDArray[np.int64]]:
    """Byte tokens of every sequence: system text, a chapter (question i's is i % 4), a question."""
    names = list(topics)
    # Chapters of about the same size, cut between topics.
    ends = np.cumsum([len(topics[name].encode()) for name in names])
    chapter_of = np.minimum(ends * NUM_CHAPTERS // (ends[-1] + 1), NUM_CHAPTERS - 1)
    sequences = []
    for i in range(NUM_QUESTIONS):
        chapter = i % NUM_CHAPTERS
        members = [name for name, home in zip(names, chapter_of, strict=True) if home == chapter]
        text = "\n\n".join(topics[name] for name in members)
        topic = members[i // NUM_CHAPTERS % len(members)]
        question = f"\n\nQuestion: what does this chapter say about {topic!r}?".ljust(QUESTION_BYTES - 9)
        whole = f"{SYSTEM}Chapter {chapter + 1}\n\n{text}{question}\nAnswer: "
        sequences.append(np.frombuffer(whole.encode(), dtype=np.uint8).astype(np.int64))
    return sequences


class Embedding:
    """Queries, keys and values of a token at a position: random projections, the same on every run."""

    def __init__(self, sizes: Sizes, device: torch.device, width: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sizes, self.device, self.width = sizes, device, width

        def matrix(rows: int, heads: int, gain: float) -> Tensor:
            drawn = torch.randn(rows, heads * sizes.head_dim, generator=generator)
            return (drawn * gain / math.sqrt(rows)).to(device)

        self.bytes = torch.randn(256, width, generator=generator).to(device)
        # Logits of standard deviation about 3: a few tokens in a thousand carry most of the weight.
        self.to_q = matrix(2 * width, sizes.num_q_heads, 3.0)
        self.to_k = matrix(2 * width, sizes.num_kv_heads, 1.0)
        self.to_v = matrix(2 * width, sizes.num_kv_heads, 1.0)

    def features(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Bytes beside sines and cosines of their positions, float32 [n, 2 * width]."""
        rates = 10000.0 ** -torch.linspace(0, 1, self.width // 2, dtype=torch.float64)
        angles = torch.from_numpy(positions).double()[:, None] * rates  # [n, width / 2]
        waves = torch.cat([angles.sin(), angles.cos()], dim=1).float().to(self.device) * math.sqrt(2)
        return torch.cat([self.bytes[torch.tensor(tokens).to(self.device)], waves], dim=1)

    def heads(self, x: Tensor, weight: Tensor) -> Tensor:
        """Project `x` [n, 2 * width] to [n, heads, head_dim] in the layer's dtype."""
        return (x @ weight).view(len(x), -1, self.sizes.head_dim).to(self.sizes.dtype)


@dataclass(frozen=True)
class Batch:
    """Some sequences, ready to attend: one query each, and the KV of the tree's nodes end to end."""

    tree: PrefixTree
    q: Tensor  # [num_rows, 1, num_q_heads, head_dim]
    k: Tensor  # [total_kv, num_kv_heads, head_dim]
    v: Tensor

    @classmethod
    def make(cls, sequences: list[NDArray[np.int64]], embedding: Embedding) -> Batch:
        """Find what the sequences share and embed every stored token once."""
        # Questions may begin with the same few letters: too few to be worth a node of their own.
        tree = PrefixTree.from_token_ids(sequences, min_shared=32)
        assert tree.kv_lens is not None  # noqa: S101  (for mypy: from_token_ids knows the lengths)
        assert tree.token_ids is not None  # noqa: S101  (the same)
        first_position = np.repeat(tree.node_start - tree.kv_offsets[:-1], tree.kv_lens)
        positions = np.arange(tree.token_ids.size) + first_position
        features = embedding.features(tree.token_ids, positions)
        last = np.array([sequence[-1] for sequence in sequences])
        q = embedding.heads(embedding.features(last, tree.path_lens - 1), embedding.to_q)
        k = embedding.heads(features, embedding.to_k)
        v = embedding.heads(features, embedding.to_v)
        return cls(tree, q[:, None], k, v)

    def shared(self) -> Tensor:
        """Attention over the tree, every stored token read once."""
        kv = PackedKV(self.k, self.v, torch.tensor(self.tree.kv_offsets, dtype=torch.int32))
        return cast(Tensor, attention(self.q, kv, tree=self.tree))

    def unshared_parts(self) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Rows of one length, their q [rows, Hq, 1, D] and their own copies of k, v [rows, Hkv, len, D].

        One row at a time on a CPU, where more would not be faster; a whole chapter's on a GPU. The copies
        hold until the next part is asked for: all parts of one length share the memory.
        """
        lengths = self.tree.path_lens
        for length in np.unique(lengths).tolist():
            rows = np.flatnonzero(lengths == length).tolist()
            step = 1 if self.q.device.type == "cpu" else len(rows)
            k, v = (x.new_empty(step, x.shape[1], length, x.shape[2]) for x in (self.k, self.v))
            for part in (rows[i : i + step] for i in range(0, len(rows), step)):
                for i, row in enumerate(part):
                    self._copy_path(row, k[i], v[i])
                yield part, self.q[part].transpose(1, 2), k, v

    def _copy_path(self, row: int, k: Tensor, v: Tensor) -> None:
        for node in self.tree.path(row).tolist():
            stored = slice(self.tree.kv_offsets[node], self.tree.kv_offsets[node + 1])
            start = self.tree.node_start[node]
            along_path = slice(start, start + self.tree.kv_offsets[node + 1] - self.tree.kv_offsets[node])
            k[:, along_path] = self.k[stored].transpose(0, 1)
            v[:, along_path] = self.v[stored].transpose(0, 1)
