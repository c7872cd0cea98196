"""The REST door against its own OpenAPI document, by generated requests."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis.configuration import storage_directory

from memspan.server import app, rest
from served import Served

pytest.importorskip("schemathesis")


def short_rest():
    """The same door with shorter limits: the generator multiplies patterns out over long ones, half a minute.

    The real limits have a test of their own below.
    """
    source = Path(rest.__file__).read_text()
    limits = "LONGEST, LONGEST_QUERY = 250_000, 20_000"
    assert source.count(limits) == 1
    module = types.ModuleType("short_rest")
    sys.modules["short_rest"] = module  # where annotations are looked up
    exec(source.replace(limits, "LONGEST, LONGEST_QUERY = 2_000, 1_000"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(app, "rest", short_rest())
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


def test_the_longest_texts_of_the_document_pass_the_gate_and_longer_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "rest", rest)  # not the short one
    with Served(tmp_path) as served, served.client() as http:
        document = http.get("/openapi.json").json()
        assert document["components"]["schemas"]["NewNote"]["properties"]["text"]["maxLength"] == 250_000
        for letter in ("a", "\N{MATHEMATICAL BOLD SCRIPT CAPITAL J}"):  # of one byte and of four
            assert http.post("/memories", json={"text": letter * 250_000}).status_code == 201
            assert http.post("/memories", json={"text": letter * 250_001}).status_code == 422
        said = {"user": "b" * 250_000, "assistant": "c" * 250_000}
        assert http.post("/memories", json=said).status_code == 201
        assert http.post("/memories", json=said | {"assistant": "c" * 250_001}).status_code == 422
        for length, code in ((20_000, 200), (20_001, 422)):
            assert http.get("/memories", params={"query": "q" * length}).status_code == code
            assert http.delete("/memories", params={"query": "q" * length}).status_code == code
