"""Where tests run, and poison: memory that nobody has written is NaN.

`pytest tests` runs the reference; `TRITON_INTERPRET=1 pytest tests -m triton` the Triton path in Triton's
interpreter. On a GPU one run has both, compiled and on the GPU.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from running_on import CUDA, INTERPRETED
from torch import Tensor

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, by marker."""
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        if item.get_closest_marker("gpu") and not CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif item.get_closest_marker("triton"):
            if importlib.util.find_spec("triton") is None:
                item.add_marker(pytest.mark.skip(reason="triton is not installed"))
            elif INTERPRETED:
                # NumPy stands in for the device and says aloud what a device does: exp2 of much is inf.
                item.add_marker(pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"))
            elif not CUDA:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1"))


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    name = request.param
    assert isinstance(name, str)
    return name


@pytest.fixture
def without_gradients() -> Iterator[None]:
    """As whoever calls a model over a cache does."""
    with torch.no_grad():
        yield


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one, the CPU otherwise and for the interpreter."""
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its relatives return: NaN, or the largest integer. Not where time counts."""
    if "bench" in request.path.relative_to(HERE).parts:
        return

    def poisoned(allocate: Callable[..., Tensor], by_default: bool) -> Callable[..., Tensor]:
        def wrapper(*args: object, **kwargs: object) -> Tensor:
            if by_default and kwargs.get("device") is None:
                # torch.device as a context knows the constructors by identity, and this one is not among them
                kwargs["device"] = torch.get_default_device()
            fresh = allocate(*args, **kwargs)
            if fresh.is_meta or torch.compiler.is_compiling():
                return fresh
            with torch.no_grad():
                if fresh.is_floating_point():
                    fresh.fill_(torch.nan)
                elif fresh.dtype in (torch.int32, torch.int64):
                    fresh.fill_(torch.iinfo(fresh.dtype).max)
            return fresh

        return wrapper

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        by_default = name in ("empty", "empty_strided")  # takes the default device
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name), by_default))


@pytest.fixture(autouse=True)
def unchanged_random_state() -> Iterator[None]:
    """Tests that seed torch do not seed one another."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and its tokenizer, as the command line takes them."""
    from command_line import save_model  # noqa: PLC0415 - needs the extra `cli`, which other tests do not

    return save_model(tmp_path_factory.mktemp("command") / "model")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two prompts in a file for the command line."""
    from command_line import save_prompts  # noqa: PLC0415 - as above

    return save_prompts(tmp_path / "prompts.jsonl")
