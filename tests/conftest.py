"""What every test shares: no network, the same numbers on every run, and the real models."""

import os

# Before any import that reads them. Tests never reach the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

# Several processes of tests share the cores; a single one may have two.
SHARED = "PYTEST_XDIST_WORKER" in os.environ
torch.set_num_threads(1 if SHARED else min(2, os.cpu_count() or 1))
# Besides choosing deterministic kernels, this fills new memory with NaN: a cache row that is read
# before it is written shows.
torch.use_deterministic_algorithms(True)


SLOWEST_FIRST = ("test_notebooks.py", "test_grade.py", "test_release.py", "test_exercises.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first, so that no process is left alone with one at the end."""
    rank = {name: n for n, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Seeds every test alike, whatever ran before it, and catches a changed default dtype."""
    torch.manual_seed(0)
    yield
    left = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert left == torch.float32, f"the default dtype was left at {left}"


@pytest.fixture(scope="session")
def gguf_path() -> Callable[[str], Path]:
    """A function from a model's name ("smollm2-135m") to its real file, fetched if need be.

    The file lies in the user's own cache, so that a second run fetches nothing. Where it cannot be
    had the test is skipped; under CI (environment variable CI) it fails.
    """
    from ch08_full_models.checkpoint import CheckpointError, fetch

    failed: dict[str, str] = {}  # a name that could not be fetched is not tried again

    def path(name: str) -> Path:
        if name not in failed:
            try:
                return fetch(name)
            except CheckpointError as error:
                failed[name] = f"{name} cannot be fetched: {error}"
        if os.environ.get("CI"):
            pytest.fail(failed[name])
        pytest.skip(failed[name])

    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing by threads, and lose much where other programs run."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
