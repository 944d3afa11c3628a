"""The shapes, in groups: those of peers_h200.csv and more."""

from shapes import PEERS, Shape, shape, uneven

FIFTY_TWO = [shape(name) for name in PEERS]

# The microbenchmark of the paper (Hydragen, section 4.3): 8 query heads, 1 KV head.
PAPER = [
    *(shape(f"8/1 B{b} P{p} S128") for b in (512, 1024, 2048, 4096) for p in (1024, 2048, 4096, 8192)),
    *(shape(f"8/1 B1024 P{p} S{s}") for p in (2048, 8192) for s in (0, 256, 512)),
]
SMALL = [shape(f"32/8 B{b} P{p} S64") for b in (1, 2, 4, 8, 16) for p in (128, 512, 2048)]
# Sharing that barely pays: each prefix belongs to two rows.
PAIRS = [shape("32/8 B2 P16384 S128"), shape("32/8 8x1024>16x64"), shape("32/8 128x2048>256x128")]
UNEVEN = [
    uneven("32/8 100 uneven groups", groups=100),
    uneven("32/8 1x2048>100 uneven groups", groups=100, root=2048),
]
# Speculative decoding and chunked prefill: several queries a row, causal among themselves.
QUERIES = [
    shape(f"32/8 {rest}")
    for rest in ("B64 P4096 S128 q4", "B256 P4096 S128 q4", "B16 P16384 S128 q64", "B64 P4096 S128 q64")
]
HEAD_DIMS = [shape(f"32/8 B{b} P{p} S128 d{d}") for d in (64, 256) for b, p in ((256, 4096), (64, 16384))]
FLOAT16 = [shape("32/8 B256 P4096 S128 fp16"), shape("32/32 B64 P4096 S128 fp16")]
LONG = [shape("32/8 B16 P131072 S128"), shape("32/32 B16 P131072 S128")]
# Pools of pages, as engines keep them.
PAGES = [
    *(shape(f"32/8 B256 P4096 S128 pages{size}") for size in (1, 16, 64)),
    *(
        shape(f"{rest} pages16")
        for rest in ("32/8 B64 P4096 S128", "32/8 B1024 P4096 S128", "32/32 B256 P4096 S128")
    ),
]
# Between the 52: more points for curves over prefix length and over batch.
CURVES = [
    *(shape(f"32/8 B256 P{p} S128") for p in (256, 2048, 8192, 32768)),
    *(shape(f"32/8 B{b} P16384 S128") for b in (1, 4, 16, 32, 128, 512)),
]

MORE: dict[str, list[Shape]] = {
    "paper": PAPER,
    "small": SMALL,
    "pairs": PAIRS,
    "uneven": UNEVEN,
    "queries": QUERIES,
    "head_dim": HEAD_DIMS,
    "float16": FLOAT16,
    "128K": LONG,
    "pages": PAGES,
    "curves": CURVES,
}

# Compiling FlexAttention takes many seconds a shape: a few.
WITH_FLEX = {
    "32/8 B64 P4096 S128",
    "32/8 B256 P4096 S128",
    "32/32 B256 P4096 S128",
    "32/8 B16 P2048 S64",
}
