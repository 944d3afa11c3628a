"""Names of the mistakes that `faulty_attention` can make, and where they were seen."""

BUGS = {
    # The softmax of nothing.
    "unguarded -inf - -inf": "FlashInfer#4051, vLLM#39148, original Hydragen",
    "empty segment has lse 0": "FlashInfer#4452",
    "empty segment has lse +inf": "flash-attention#978",
    "empty segment has a finite lse": "FlashInfer#4452: -49993",
    "finite infinity in the running max": "FlashInfer#4267, #4450",
    "empty row moves the rows after it": "flash-attention#2573",
    # The merge.
    "segment lse in base 2": "SGLang#35045, vLLM#47079, pytorch#181645",
    "returned lse in base 2": "FlashInfer's docstrings",
    "lse transposed in the merge": "vllm flash-attention#87",
    "merge bounded by flat offset only": "original Hydragen's combine at head_dim 129",
    "merge drops the last segment": "one prefix too few",
    "prefix counted twice": "one prefix too many",
    "first prefix for everybody": "one prefix too many",
    "running sum not rescaled": "online softmax",
    "no maximum subtracted": "online softmax",
    # Who attends to what.
    "only one root": "FastTree-Artifact#3",
    "prefix never masked": "vLLM#11635",
    "causal mask off by one": "hides the query's own position",
    "causal mask one too many": "shows the next position",
    "causal mask top-left": "query i at position i",
    "window off by one": "FlashInfer#5286, transformers#29623",
    "window counted per segment": "positions restart at each segment",
    "missing column mask": "the last tile reads the next segment",
    "tile remainder dropped": "kv_len // TILE tiles",
    "values of padding not masked": "0 · NaN",
    "rows in tree order": "results not brought back into the caller's order",
    "one row per node": "rows that end at one node share one result",
    "GQA heads interleaved": "h % num_kv_heads",
    "strides ignored": "vLLM#22003",
    # Pages.
    "page table ignored": "pages in the order of the pool",
    "pages from one before": "an index pointer off by one",
    "page size of 16 assumed": "the pool's page size ignored",
    # Options.
    "softcap dropped": "SGLang#33915, FlashInfer#1023",
    "scale dropped": "an option silently ignored",
    "scale of head_dim_v": "head_dim_v ≠ head_dim",
    "sink in every segment": "rocm-libraries#12227",
    "sink dropped for an empty first segment": "rocm-libraries#12227",
    "sink missing from lse": "rocm-libraries#12227",
    # Precision.
    "dot products in TF32": "a GPU's default for float32",
    "partials in half precision": "original Hydragen, for float32 inputs",
}
