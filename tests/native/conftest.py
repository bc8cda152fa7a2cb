import shutil

import pytest
from native_program import Native


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH: the program cannot be built")
    native = Native(tmp_path_factory.mktemp("native"))
    yield native
    native.pool.shutdown(cancel_futures=True)
