"""Fixtures of more than one file."""

import pytest
from fake_cloud import Cloud


@pytest.fixture
def cloud(tmp_path):
    """A gcloud that records its calls; its workers are shells."""
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end()


@pytest.fixture
def ready(cloud):
    """The same with a pod, set up."""
    cloud("create.sh")
    cloud("setup.sh")
    return cloud
