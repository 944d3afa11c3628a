"""What is held to the laws: a function that the user names, what it can do and what it is known to fail."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any
from unittest import SkipTest

import pytest
import torch
from hypothesis import currently_in_test_context, reject
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor

from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.known import Known
from hydragen.testing.inputs import Inputs
from hydragen.testing.judge import Implementation, assert_unmodified
from hydragen.testing.problem import Problem
from hydragen.testing.tally import saw_refusal


@dataclass(frozen=True)
class Subject:
    """An implementation under test."""

    name: str
    implementation: Implementation
    capabilities: Capabilities = field(default_factory=Capabilities)
    marks: tuple[pytest.MarkDecorator, ...] = ()


@dataclass
class Session:
    """What this run of pytest tests.

    All subjects of a run are given the same problems: those that the first one can do.
    """

    subjects: list[Subject] = field(default_factory=list)
    known: Known = field(default_factory=Known)

    @property
    def capabilities(self) -> Capabilities:
        """Of the first subject."""
        return self.subjects[0].capabilities if self.subjects else Capabilities()


# One for the process: tests draw problems at import, before any fixture could hand them anything.
session = Session()


def problems(**restrictions: Any) -> st.SearchStrategy[Problem]:
    """Problems that the subjects can do and that are not known to fail, restricted further."""
    drawn = session.capabilities.problems(**restrictions)
    return drawn.filter(session.known.allows) if session.known.problems else drawn


def large_problems() -> st.SearchStrategy[Problem]:
    """The same beyond the usual sizes, where the subjects have no limits of their own."""
    drawn = session.capabilities.large_problems()
    return drawn.filter(session.known.allows) if session.known.problems else drawn


class Bound(Problem):
    """A problem whose tensors are given: what a function of one argument is called with."""

    def bind(self, inputs: Inputs) -> Bound:
        """Give these tensors out from now on."""
        object.__setattr__(self, "_inputs", inputs)
        return self

    def tensors(self, device: torch.device | str | None = None) -> Inputs:
        """The tensors of this call, on the device they are on unless another is named."""
        inputs: Inputs = self._inputs  # type: ignore[attr-defined]  # set by bind
        return inputs if device is None else inputs.to(device)


def bound(problem: Problem, inputs: Inputs) -> Bound:
    """The same problem with its tensors."""
    return Bound(**{item.name: getattr(problem, item.name) for item in fields(Problem)}).bind(inputs)


def load(path: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Raises
    ------
    ValueError
        If there is none.
    """
    module, separator, name = path.partition(":")
    if not separator or not module or not name:
        raise ValueError(f"--implementation must be module:function, got {path!r}")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--implementation {path}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever their module does when it is imported
        raise ValueError(f"--implementation {path}: importing it raised {error!r}") from error
    if not callable(found):
        raise ValueError(f"--implementation must be a function, got {type(found).__name__} for {path!r}")
    function: Callable[..., Any] = found
    return function


def named(path: str) -> Implementation:
    """The implementation that ``--implementation`` means, with the capabilities that it declares itself.

    To run a law on one problem: ``laws.matches_oracle(named("my_module:my_function"), problem)``.
    """
    function = load(path)
    declared = getattr(function, "capabilities", {})
    return adapt(function, Capabilities().changed(declared, f"{path}.capabilities"))


def adapt(function: Callable[..., Any], capabilities: Capabilities) -> Implementation:
    """The function as an implementation: on its device, with one argument or two.

    What it raises as NotImplementedError is out of its scope: Hypothesis leaves such examples out, the report
    counts them, and other callers see it.
    """
    takes_inputs = _num_arguments(function) != 1

    def implementation(problem: Problem, inputs: Inputs) -> Tensor | tuple[Tensor, Tensor | None]:
        there = inputs.to(capabilities.device)
        try:
            result = function(problem, there) if takes_inputs else function(bound(problem, there))
        except NotImplementedError as error:
            if not currently_in_test_context():
                raise
            saw_refusal(str(error))
            reject()
        except UnsatisfiedAssumption as error:
            # Hypothesis would leave the example out without a word
            raise AssertionError(
                "the implementation called Hypothesis's reject or assume: raise NotImplementedError for what "
                "it cannot do"
            ) from error
        except (pytest.exit.Exception, SystemExit) as error:
            if not currently_in_test_context():  # somebody ends a run of scale.py from outside
                raise
            # it would end the whole run, with whatever status it likes
            raise AssertionError(f"the implementation ended the process: {error!r}") from error
        except (pytest.skip.Exception, pytest.xfail.Exception, SkipTest) as error:
            # it would end the whole law, and pass for one that was never tried
            raise AssertionError(
                f"the implementation raised {type(error).__name__}, which skips a test: raise "
                "NotImplementedError for what it cannot do; --known-failures lists what it gets wrong"
            ) from error
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            # pytest and Hypothesis take some of these for words of their own
            raise AssertionError(f"the implementation raised {error!r}, which is no Exception") from error
        if there is not inputs:  # a copy: the caller cannot see what became of it
            assert_unmodified(problem, inputs, there.to(inputs.q.device))
        returned: tuple[Any, ...] = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if len(returned) > 2:
            raise TypeError(f"an implementation must return out or (out, lse), got {len(returned)} results")
        if capabilities.lse and (len(returned) != 2 or returned[1] is None):
            raise AssertionError(
                "lse is not returned, but the capability lse=yes says so; return (out, lse) or say lse=no"
            )
        out, lse = (*returned, None)[:2]
        return out, None if capabilities.lse is False else lse

    return implementation


def _num_arguments(function: Callable[..., Any]) -> int:
    """How many arguments without a default a function takes; 2 where it does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # functions of extension modules
        return 2
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(item.kind in positional and item.default is item.empty for item in parameters)
