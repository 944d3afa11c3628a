"""Hydragen attention as an executable specification.

Two modules that share no code and import nothing of the library:

- `hydragen_reference.oracle`: what the answer is. Dense softmax attention, NumPy, float64.
- `hydragen_reference.decomposed`: how Hydragen (arXiv 2402.05099) computes it. Plain PyTorch, any device,
  with gradients.

Import the module you need; this package imports neither, so that the oracle works without PyTorch.
"""
