from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.fake_gcloud import end_run
from tests.launch.pod import Pod


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    """A TPU to play with; nothing of it is left running."""
    made = Pod(tmp_path)
    yield made
    for pid in made.fake.glob("vm*/*/.tiue_jax/pid"):
        end_run(str(pid))
