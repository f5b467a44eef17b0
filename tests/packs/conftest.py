from __future__ import annotations

import pytest

from tests.packs.stub import Stub


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    return Stub.build(tmp_path_factory.mktemp("stub"))
