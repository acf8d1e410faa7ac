import pytest

from fdda_fast.models import load_teacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits-resnet8")
