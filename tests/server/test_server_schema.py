"""The REST door against its own OpenAPI document, by generated requests."""

import os
import subprocess
import sys

import pytest
from hypothesis.configuration import storage_directory

from served import Served

pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("schema"), users=("emily",)) as running:
        with running.client("emily") as http:
            for text in ("My cat is called Tom", "The park was green"):
                http.post("/memories", json={"text": text})
        yield running


@pytest.mark.slow
def test_generated_requests_find_nothing(served: Served, tmp_path):
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.base}/openapi.json"]
    key = ["--header", f"Authorization: Bearer {served.keys['emily']}"]
    size = ["--max-examples", "6", "--seed", "1", "--workers", "1", "--no-color"]
    kept = ["--generation-database", "none"]  # of what it finds; its table of Unicode is kept between runs
    environment = os.environ | {"HYPOTHESIS_STORAGE_DIRECTORY": str(storage_directory().path)}
    done = subprocess.run(
        [*command, *key, *size, *kept], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_document_names_every_path(served: Served):
    with served.client("emily") as http:
        paths = set(http.get("/openapi.json").json()["paths"])
    assert {"/memories", "/memories/{id}", "/memories/{id}/why", "/users/{user}/export", "/healthz"} <= paths
