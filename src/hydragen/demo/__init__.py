"""The demo: one real document, sixty-four questions about it, attention with and without sharing.

Run by ci/demo, or `hydragen demo`; needs the extra `demo`. The document is the Python language
reference as every Python carries it (`pydoc_data.topics`), its tokens are bytes, and queries, keys and values
are random projections of bytes and positions, so that attention is uneven without any model's weights.
"""
