"""The REST door against its own OpenAPI document, by generated requests."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

from served import Served

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> object:
    with Served(tmp_path_factory.mktemp("schema"), users=("emily",)) as running:
        with running.client("emily") as http:
            for text in ("My cat is called Tom", "The park was green"):
                http.post("/memories", json={"text": text})
        yield running


@pytest.fixture
def api(served: Served) -> object:
    with served.client("emily") as http:
        document = http.get("/openapi.json").json()
    return schemathesis.openapi.from_dict(document)


lazy = schemathesis.pytest.from_fixture("api")


@lazy.parametrize()
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
def test_no_generated_request_breaks_a_promise_of_the_document(case: object, served: Served) -> None:
    case.call_and_validate(  # type: ignore[attr-defined]
        base_url=served.base, headers={"Authorization": f"Bearer {served.keys['emily']}"}
    )


def test_the_document_names_every_path(served: Served, tmp_path: Path) -> None:
    with served.client("emily") as http:
        paths = set(http.get("/openapi.json").json()["paths"])
    assert {"/memories", "/memories/{id}", "/memories/{id}/why", "/users/{user}/export", "/healthz"} <= paths
