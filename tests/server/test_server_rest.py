"""The REST door and the gate: each caller's own memories alone; what is refused, and how it is told."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from memspan.base import BadInput
from memspan.base.files import CorruptFile
from memspan.server.keys import KeyRing
from memspan.server.settings import Settings
from served import Served

RARE = ("quizzacious", "flibbertigib", "snollygost")


def test_a_memory_is_written_listed_found_explained_changed_forgotten_and_brought_back(
    tmp_path: Path,
) -> None:
    with Served(tmp_path) as served, served.client() as http:
        said = {
            "user": "I went to Green Meadow Park",
            "assistant": "Lovely!",
            "at": "2026-01-02T10:00:00+02:00",
        }
        (id,) = http.post("/memories", json=said).json()["ids"]
        assert http.post("/memories", json={"text": "Allergic to peanuts"}).status_code == 201
        assert http.get(f"/memories/{id}").json()["created_at"].startswith("2026-01-02T08:00:00")
        hits = http.get("/memories", params={"query": "which park?"}).json()["hits"]
        assert hits[0]["memory"]["id"] == id
        assert hits[0]["parts"]
        assert "strength" in http.get(f"/memories/{id}/why").json()
        assert (
            http.patch(f"/memories/{id}", json={"text": "I went to Blue Hill"}).json()["text"]
            == "I went to Blue Hill"
        )
        assert http.get("/memories", params={"query": "hill"}).json()["hits"][0]["memory"]["id"] == id
        assert http.delete(f"/memories/{id}").json()["forgotten"][0]["id"] == id
        assert http.get(f"/memories/{id}").status_code == 404
        assert http.get("/memories", params={"state": "deleted"}).json()["memories"][0]["id"] == id
        assert http.post(f"/memories/{id}/restore").json()["ids"] == [id]
        assert http.get(f"/memories/{id}").status_code == 200


def test_pages_of_a_list_join_without_gap_or_repeat(tmp_path: Path) -> None:
    with Served(tmp_path) as served, served.client() as http:
        ids = [http.post("/memories", json={"text": f"note {i}"}).json()["ids"][0] for i in range(7)]
        for newest in (False, True):
            seen, after = [], None
            while True:
                params = {"limit": 3, "newest_first": newest} | ({"after": after} if after else {})
                page = http.get("/memories", params=params).json()
                seen += [one["id"] for one in page["memories"]]
                after = page["next"]
                if after is None:
                    break
            assert seen == (ids[::-1] if newest else ids)


def test_forgetting_by_query_looks_first_unless_told_otherwise(tmp_path: Path) -> None:
    with Served(tmp_path) as served, served.client() as http:
        http.post("/memories", json={"text": "The red bicycle was stolen"})
        http.post("/memories", json={"text": "The red car is old"})
        looked = http.delete("/memories", params={"query": "red bicycle"}).json()
        assert (len(looked["forgotten"]), looked["dry_run"]) == (1, True)
        assert len(http.get("/memories").json()["memories"]) == 2
        http.delete("/memories", params={"query": "red bicycle", "dry_run": False})
        assert len(http.get("/memories").json()["memories"]) == 1
        assert http.delete("/memories").status_code == 422
        older = http.delete("/memories/before/2020-01-01T00:00:00Z", params={"dry_run": False}).json()
        assert older["forgotten"] == []


def test_another_users_id_is_as_unknown_as_one_that_never_was(tmp_path: Path) -> None:
    users = ("a_b", " Jason ", "Jason", "../x", "'; drop table records; --", "𝒥")
    with Served(tmp_path, users=users, trusted="robot") as served:
        ids = {}
        for user in users:
            with served.client(user) as http:
                (ids[user],) = http.post(
                    "/memories", json={"text": f"secret of number {users.index(user)}"}
                ).json()["ids"]
        for user in users:
            with served.client(user) as http:
                assert [one["id"] for one in http.get("/memories").json()["memories"]] == [ids[user]]
                found = http.get("/memories", params={"query": "secret of number"}).json()["hits"]
                assert [hit["memory"]["id"] for hit in found] == [ids[user]]
                for other in set(users) - {user}:
                    answers = [
                        http.get(f"/memories/{ids[other]}"),
                        http.get(f"/memories/{ids[other]}/why"),
                        http.patch(f"/memories/{ids[other]}", json={"text": "mine"}),
                        http.delete(f"/memories/{ids[other]}"),
                        http.post(f"/memories/{ids[other]}/restore"),
                        http.get(f"/ui/memory/{ids[other]}"),
                        http.post(f"/ui/memory/{ids[other]}/erase"),
                    ]
                    assert {answer.status_code for answer in answers} <= {404, 303}
                assert http.get("/users/robot/export").status_code == 403
                assert http.delete("/users/robot").status_code == 403
                assert http.get("/users").status_code == 403
                assert http.get("/metrics").status_code == 403
        with served.client("robot") as http:
            assert set(users) <= set(http.get("/users").json())
            exported = http.get("/users/Jason/export").text
            assert [json.loads(line)["text"] for line in exported.splitlines() if "text" in line] == [
                "secret of number 2"
            ]
            assert http.delete("/users/Jason").json() == {"erased": 1}
        with served.client("𝒥") as http:
            assert len(http.get("/memories").json()["memories"]) == 1


def test_what_a_user_erases_leaves_no_trace_on_the_disk(tmp_path: Path) -> None:
    with Served(tmp_path, users=("emily", "bob")) as served:
        with served.client("emily") as http:
            for word in RARE:
                http.post("/memories", json={"text": f"the {word} word of emily"})
            assert http.delete("/users/me").json()["erased"] == 3
            assert http.get("/users/me/export").text.count("word of emily") == 0
        with served.client("bob") as http:
            http.post("/memories", json={"text": "another note"})
    for file in tmp_path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [word for word in RARE if word.encode() in content], file


def test_the_gate_refuses_strangers_other_pages_other_names_and_floods(tmp_path: Path) -> None:
    with Served(tmp_path, users=("emily",), rate="5/minute", max_body=10_000) as served:
        with served.client() as http:
            assert http.get("/memories").status_code == 401
            assert http.get("/memories", headers={"Authorization": "Bearer msk_wrong"}).status_code == 401
            assert http.get("/healthz").json()["status"] == "ok"
            assert http.get("/ui").headers["location"] == "/ui/login"
        with served.client("emily") as http:
            note = {"text": "x"}
            evil = {"Origin": "https://evil.example"}
            assert http.post("/memories", json=note, headers=evil).status_code == 403
            assert (
                http.post("/memories", json=note, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
            )
            assert http.get("/memories", headers={"Host": "evil.example"}).status_code == 421
            assert http.post("/memories", json={"text": "x" * 20_000}).status_code == 413
            assert http.post("/memories", content=iter([b"x" * 9_000] * 3)).status_code == 413
            codes = [http.get("/memories").status_code for _ in range(6)]
            limited = http.get("/memories")
            assert codes[0] == 200
            assert limited.status_code == 429
            assert int(limited.headers["retry-after"]) >= 1
            assert limited.json()["error"]["type"] == "rate_limit"


def test_answers_carry_headers_that_keep_pages_from_running_anything(tmp_path: Path) -> None:
    with Served(tmp_path) as served, served.client() as http:
        for path in ("/ui", "/memories", "/nothing"):
            headers = http.get(path).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "text"), ({"text": "  "}, "text"), ({"text": "a", "user": "b"}, "user"),
        ({"text": "a", "at": "2026-01-01T00:00:00"}, "at"), ({"text": "a", "more": 1}, "more"),
        ({"text": "a\u0000b"}, "text"),
    ],
)  # fmt: skip
def test_bad_notes_are_refused_with_the_name_of_what_is_wrong(
    tmp_path: Path, body: dict[str, object], named: str
) -> None:
    with Served(tmp_path) as served, served.client() as http:
        answer = http.post("/memories", json=body)
        assert answer.status_code == 422
        assert named in answer.json()["error"]["message"]
        assert http.get("/memories").json()["memories"] == []


def test_curl_can_write_and_read(tmp_path: Path) -> None:
    with Served(tmp_path, users=("emily",)) as served:
        common = [
            "curl",
            "-sS",
            "--fail",
            "--noproxy",
            "*",
            "-H",
            f"Authorization: Bearer {served.keys['emily']}",
        ]
        write = [
            "-H",
            "content-type: application/json",
            "-d",
            '{"text": "curl was here"}',
            f"{served.base}/memories",
        ]
        subprocess.run([*common, *write], check=True, capture_output=True)
        found = subprocess.run(
            [*common, f"{served.base}/memories?query=curl"], check=True, capture_output=True
        )
        assert json.loads(found.stdout)["hits"][0]["memory"]["text"] == "curl was here"


def test_metrics_count_without_content(tmp_path: Path) -> None:
    with Served(tmp_path) as served, served.client() as http:
        http.post("/memories", json={"text": "quizzacious"})
        text = http.get("/metrics").text
        assert 'memspan_requests_total{door="memories",method="POST",status="201"} 1.0' in text
        assert "memspan_store_bytes" in text
        assert "quizzacious" not in text


def test_keys_are_kept_as_digests_alone_and_a_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ring = KeyRing(path)
    token = ring.add("emily")
    assert token not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    again = KeyRing(path)
    caller = again.find(token)
    assert caller is not None
    assert (caller.user, caller.trusted) == ("emily", False)
    assert again.find(token + "x") is None
    again.remove(caller.id)
    assert KeyRing(path).find(token) is None
    assert ring.find(token) is None  # an open ring sees what another one did
    assert not ring.holds(caller.id)
    new = again.add("jason")
    assert ring.find(new) is not None
    with pytest.raises(BadInput, match="choose from"):
        again.remove("nobody")
    with pytest.raises(BadInput, match="256"):
        ring.add("")
    path.write_text('[{"user": 1}]')
    with pytest.raises(CorruptFile, match="no file of keys"):
        KeyRing(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "0.0.0.0"}, {"upstream": "ftp://x"}, {"rate": "many"}, {"port": 0}, {"recalled": 0},
        {"maintenance": -1.0},
    ],
)  # fmt: skip
def test_settings_that_would_not_work_are_refused_at_once(wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        Settings(**wrong)  # type: ignore[arg-type]
