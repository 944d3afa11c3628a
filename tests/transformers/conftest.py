"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from command_line import save_model  # noqa: PLC0415 - needs the extra `cli`, which other tests do not

    return save_model(tmp_path_factory.mktemp("command") / "model")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    from command_line import save_prompts  # noqa: PLC0415 - as above

    return save_prompts(tmp_path / "prompts.jsonl")
