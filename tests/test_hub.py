"""The hub of a directory: a real server, the stock client, and what it refuses."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.hub_server import REPO, TOKEN, Server, start
from zoo.files import sha256
from zoo.service.storage import Refused, Storage, checked_path

pytestmark = pytest.mark.usefixtures("online")

# The stock client


def test_the_life_of_a_repository(server, tmp_path):
    api = server.api()
    assert api.whoami()["name"] == "zoo"
    url = api.create_repo("me/first")
    assert str(url) == f"{server.address}/me/first" and url.repo_id == "me/first"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/first")
    api.create_repo("me/first", exist_ok=True)
    (tmp_path / "big.safetensors").write_bytes(os.urandom(3_000_000))
    (tmp_path / "config.json").write_text('{"a": 1}')
    api.upload_file(
        path_or_fileobj=tmp_path / "big.safetensors", path_in_repo="deep/er/big.safetensors", repo_id="me/first"
    )
    api.upload_file(path_or_fileobj=tmp_path / "config.json", path_in_repo="config.json", repo_id="me/first")
    assert sorted(api.list_repo_files("me/first")) == ["config.json", "deep/er/big.safetensors"]
    for name, path in (("config.json", "config.json"), ("deep/er/big.safetensors", "big.safetensors")):
        fetched = huggingface_hub.hf_hub_download("me/first", name, endpoint=server.address)
        assert Path(fetched).read_bytes() == (tmp_path / path).read_bytes()
    tree = {entry.path: entry for entry in api.list_repo_tree("me/first", recursive=True)}
    assert set(tree) == {"config.json", "deep", "deep/er", "deep/er/big.safetensors"}
    assert tree["deep/er/big.safetensors"].lfs.sha256 == sha256(tmp_path / "big.safetensors")
    git = subprocess.run(["git", "hash-object", tmp_path / "config.json"], capture_output=True, text=True, check=True)
    assert tree["config.json"].blob_id == git.stdout.strip(), "as git names it"
    assert [entry.path for entry in api.list_repo_tree("me/first", "deep")] == ["deep/er"]
    infos = api.get_paths_info("me/first", ["config.json", "nothing"])
    assert [(info.path, info.size) for info in infos] == [("config.json", 8)]
    info = api.model_info("me/first", files_metadata=True)
    assert info.sha == api.list_repo_commits("me/first")[0].commit_id and info.private is False
    assert {file.rfilename: file.size for file in info.siblings} == {
        "config.json": 8, "deep/er/big.safetensors": 3_000_000,
    }  # fmt: skip
    assert api.file_exists("me/first", "config.json") and not api.file_exists("me/first", "nothing.json")
    assert [found.id for found in api.list_models(search="FIRS")] == ["me/first"]
    api.delete_repo("me/first")
    assert not api.repo_exists("me/first")


def test_branches_tags_and_history(server):
    api = server.api()
    api.create_repo("me/branches")
    first = api.upload_file(path_or_fileobj=b"one", path_in_repo="a.txt", repo_id="me/branches", commit_message="One")
    api.create_tag("me/branches", tag="v1.0")
    api.create_branch("me/branches", branch="try/it")
    api.upload_file(path_or_fileobj=b"two", path_in_repo="a.txt", repo_id="me/branches", revision="try/it")
    refs = api.list_repo_refs("me/branches")
    assert {ref.name for ref in refs.branches} == {"main", "try/it"} and refs.tags[0].target_commit == first.oid

    def content(revision: str | None) -> str:
        found = huggingface_hub.hf_hub_download("me/branches", "a.txt", revision=revision, endpoint=server.address)
        return Path(found).read_text()

    assert [content(rev) for rev in (None, "v1.0", "try/it", first.oid)] == ["one", "one", "two", "one"]
    assert [commit.title for commit in api.list_repo_commits("me/branches")] == ["One", "initial commit"]
    api.delete_branch("me/branches", branch="try/it")
    api.delete_tag("me/branches", tag="v1.0")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/branches", revision="v1.0")
    with pytest.raises(HfHubHTTPError, match="cannot be deleted"):
        api.delete_branch("me/branches", branch="main")


def test_a_commit_is_whole_or_not_there(server):
    api = server.api()
    api.create_repo("me/commits")
    add = [CommitOperationAdd(name, name.encode()) for name in ("a.txt", "b.txt", "folder/c.txt")]
    seen = api.create_commit("me/commits", add, commit_message="three")
    api.create_commit(
        "me/commits", commit_message="changed",
        operations=[CommitOperationDelete("folder/", is_folder=True), CommitOperationCopy("a.txt", "d.txt")],
    )  # fmt: skip
    assert sorted(api.list_repo_files("me/commits")) == ["a.txt", "b.txt", "d.txt"]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(
            "me/commits", [CommitOperationAdd("e.txt", b"e")], commit_message="late", parent_commit=seen.oid
        )
    with pytest.raises(EntryNotFoundError):
        api.create_commit(
            "me/commits", commit_message="half",
            operations=[CommitOperationAdd("f.txt", b"f"), CommitOperationDelete("nothing.txt")],
        )  # fmt: skip
    assert sorted(api.list_repo_files("me/commits")) == ["a.txt", "b.txt", "d.txt"], "no half of it"
    again = api.create_commit("me/commits", [CommitOperationAdd("a.txt", b"a.txt")], commit_message="nothing new")
    assert again.oid == api.model_info("me/commits").sha and len(api.list_repo_commits("me/commits")) == 3


def test_commits_of_two_at_once(server):
    api = server.api()
    api.create_repo("me/at-once")
    failed = []

    def writer(number: int) -> None:
        for turn in range(6):
            try:
                operation = CommitOperationAdd(f"{number}-{turn}.txt", b"x")
                server.api().create_commit("me/at-once", [operation], commit_message="x")
            except HfHubHTTPError as error:
                failed.append(error)

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed and len(api.list_repo_files("me/at-once")) == 24
    assert len(api.list_repo_commits("me/at-once")) == 25, "each on the one before"


def test_who_may_do_what(server):
    api, stranger, wrong = server.api(), server.api(token=False), server.api(token="another-token-than-it")
    api.create_repo("me/open")
    api.create_repo("me/closed", private=True)
    api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.txt", repo_id="me/closed")
    assert stranger.model_info("me/open").id == "me/open" and api.model_info("me/closed").private
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info("me/closed")
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.hf_hub_download("me/closed", "a.txt", endpoint=server.address, token=False)
    assert "me/closed" not in [model.id for model in stranger.list_models()]
    for act in (
        lambda who: who.create_repo("me/more"),
        lambda who: who.delete_repo("me/open"),
        lambda who: who.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/open"),
        lambda who: who.create_branch("me/open", branch="x"),
        lambda who: who.update_repo_settings("me/open", private=True),
    ):
        for who in (stranger, wrong):
            with pytest.raises(HfHubHTTPError) as caught:
                act(who)
            assert caught.value.response.status_code == 401
    api.update_repo_settings("me/open", private=True)
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info("me/open")


# What a client that is not the stock one may send


def send(server: Server, method: str, path: str, token: str | None = TOKEN, **keys) -> httpx2.Response:
    headers = ({"authorization": f"Bearer {token}"} if token else {}) | keys.pop("headers", {})
    return httpx2.request(method, f"{server.address}{path}", headers=headers, **keys)


def commit(server: Server, repo: str, *operations: dict) -> httpx2.Response:
    lines = [{"key": "header", "value": {"summary": "x"}}, *operations]
    body = "\n".join(map(json.dumps, lines)).encode()
    return send(server, "POST", f"/api/models/{repo}/commit/main", content=body)


def small(path: str, content: bytes = b"x") -> dict:
    return {"key": "file", "value": {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"}}


def test_what_a_request_does_not_say_stays(server):
    """A setting that is not known is refused, and opens nothing."""
    api = server.api()
    api.create_repo("me/kept", private=True)
    with pytest.raises(HfHubHTTPError, match="private and visibility only, not gated"):
        api.update_repo_settings("me/kept", gated="auto")
    assert send(server, "PUT", "/api/models/me/kept/settings", json={}).status_code == 400
    assert send(server, "PUT", "/api/models/me/kept/settings", json={"visibility": "open"}).status_code == 400
    assert send(server, "GET", "/api/models/me/kept", token=None).status_code == 404
    assert send(server, "PUT", "/api/models/me/kept/settings", json={"visibility": "public"}).status_code == 200
    assert send(server, "GET", "/api/models/me/kept", token=None).status_code == 200


def test_a_pull_request_is_no_commit(server):
    api = server.api()
    api.create_repo("me/asked")
    with pytest.raises(HfHubHTTPError, match="no pull requests"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="me/asked", create_pr=True)
    assert api.list_repo_files("me/asked") == []


def test_requests_without_sense_are_refused_not_failed(server):
    server.api().create_repo("me/sense")
    deep = b"[" * 200_000
    assert send(server, "POST", "/api/repos/create", content=deep).status_code == 400
    assert send(server, "POST", "/api/validate-yaml", token=None, json={"content": "a"}).status_code == 401
    broken = send(server, "POST", "/api/validate-yaml", json={"content": "---\na: [\n---\n"}).json()
    assert broken["errors"]
    wrong = send(
        server, "PUT", f"/upload/{'0' * 64}?size=1&until=9999999999&signature=%C3%BC", token=None, content=b"x"
    )
    assert wrong.status_code == 403
    long = send(server, "POST", f"/api/models/me/sense/branch/{'b' * 90}/{'c' * 90}/{'d' * 90}", json={})
    assert long.status_code == 400 and "too long" in long.json()["error"]


def test_one_server_at_a_time(tmp_path):
    """A second one takes nothing from the first, whose uploads are under way."""
    first = start(tmp_path / "hub")
    try:
        arriving = tmp_path / "hub" / "incoming" / "half"
        arriving.write_bytes(b"half")
        command = [sys.executable, str(REPO / "cli.py"), "serve", str(tmp_path / "hub"), "--port", "0"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2 and "is served by another process" in second.stderr
        assert arriving.exists()
    finally:
        first.process.terminate()
    wrong = subprocess.run([*command, "--owner", "me/x"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "cannot name" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    "path",
    [
        "../../escaped.txt",
        "/etc/passwd",
        "a/../../b",
        ".git/config",
        "a\\b",
        "a//b",
        "",
        "a\x00b",
        "C:evil",
        "x" * 1001,
    ],
)
def test_paths_that_lead_elsewhere(server, path):
    server.api().create_repo("me/paths", exist_ok=True)
    before = {found for found in server.directory.parent.rglob("*") if found.is_file()}
    answer = commit(server, "me/paths", small("fine.txt"), small(path))
    assert answer.status_code == 400 and "is not a path within a repository" in answer.json()["error"]
    assert server.api().list_repo_files("me/paths") == []
    new = {found for found in server.directory.parent.rglob("*") if found.is_file()} - before
    assert all("escaped" not in found.name for found in new)
    with pytest.raises(Refused):
        checked_path(path)


@pytest.mark.parametrize("name", ["..", "a/../b", "a b", ".hidden", "a/b/c", "x" * 97, "a.git", "", "a--b", "a/%2e%2e"])
def test_names_that_are_refused(server, name):
    answer = send(server, "POST", "/api/repos/create", json={"name": name})
    assert answer.status_code == 400, answer.text


def test_a_file_is_not_a_folder(server):
    server.api().create_repo("me/tree")
    assert commit(server, "me/tree", small("a"), small("a/b")).status_code == 409
    assert commit(server, "me/tree", small("a")).status_code == 200
    assert commit(server, "me/tree", small("a/b")).status_code == 409


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        ({"key": "file", "value": {"path": "a", "content": "%%%"}}, "not base64"),
        ({"key": "file", "value": {"path": "a"}}, "content: expected str, got None"),
        ({"key": "file"}, "value: expected dict"),
        ({"key": "move", "value": {"path": "a"}}, "'move' is not an operation"),
        ({"key": "lfsFile", "value": {"path": "a", "oid": "0" * 64, "size": 3}}, "was not uploaded"),
        ({"key": "lfsFile", "value": {"path": "a", "oid": "../../x", "size": 3}}, "is not a sha256"),
        ([1, 2], "not a JSON object"),
    ],
)
def test_commits_that_are_refused(server, operation, says):
    server.api().create_repo("me/refused", exist_ok=True)
    answer = commit(server, "me/refused", operation)
    assert answer.status_code in (400, 422) and says in answer.json()["error"]


def upload_address(server: Server, content: bytes, said: bytes | None = None) -> str:
    digest = hashlib.sha256(said if said is not None else content).hexdigest()
    objects = {"operation": "upload", "objects": [{"oid": digest, "size": len(content)}]}
    (answer,) = send(server, "POST", "/me/uploads.git/info/lfs/objects/batch", json=objects).json()["objects"]
    return answer["actions"]["upload"]["href"].removeprefix(server.address)


def test_uploads_are_what_they_are_said_to_be(server):
    server.api().create_repo("me/uploads", exist_ok=True)
    content = os.urandom(1000)
    address = upload_address(server, content, said=b"other content")
    answer = send(server, "PUT", address, token=None, content=content)
    assert answer.status_code == 422 and "is not the 1000 bytes of sha256" in answer.json()["error"]
    address = upload_address(server, content)
    assert send(server, "PUT", address, token=None, content=content + b"more").status_code == 422
    assert send(server, "PUT", address, token=None, content=content[:-1]).status_code == 422
    forged = address.replace("size=1000", "size=1001")
    assert send(server, "PUT", forged, token=None, content=content + b"1").status_code == 403
    old = re.sub(r"until=\d+", "until=1", address)
    assert send(server, "PUT", old, token=None, content=content).status_code == 403
    assert list((server.directory / "incoming").iterdir()) == [], "nothing half-received stays"
    assert send(server, "PUT", address, token=None, content=content).status_code == 200
    digest = hashlib.sha256(content).hexdigest()
    assert (server.directory / "blobs" / digest[:2] / digest).read_bytes() == content


def test_a_page_from_elsewhere_cannot_ask_a_local_server(server):
    assert send(server, "GET", "/api/models", headers={"host": "evil.example"}).status_code == 400


def test_downloads_in_parts_and_never_as_pages(server):
    server.api().create_repo("me/parts", exist_ok=True)
    commit(server, "me/parts", small("page.html", b"<script>0123456789</script>"))
    whole = send(server, "GET", "/me/parts/resolve/main/page.html")
    part = send(server, "GET", "/me/parts/resolve/main/page.html", headers={"range": "bytes=8-17"})
    assert (part.status_code, part.content) == (206, b"0123456789")
    assert whole.headers["content-type"] == "application/octet-stream"
    assert whole.headers["x-content-type-options"] == "nosniff"
    missing = send(server, "HEAD", "/me/parts/resolve/main/none.html")
    assert (missing.status_code, missing.headers["x-error-code"]) == (404, "EntryNotFound")
    assert len(missing.headers["x-repo-commit"]) == 40


# A server that is killed


def test_what_is_committed_survives_a_kill(tmp_path):
    started = start(tmp_path / "hub")
    api = started.api()
    api.create_repo("me/kept")
    done: list[str] = []

    def writer() -> None:
        for number in range(1000):
            content = os.urandom(1_100_000 if number % 3 == 0 else 100)
            try:
                api.upload_file(path_or_fileobj=content, path_in_repo=f"{number}.bin", repo_id="me/kept")
            except Exception:
                return
            done.append(f"{number}.bin")

    thread = threading.Thread(target=writer)
    thread.start()
    while len(done) < 5:
        time.sleep(0.005)
    started.process.kill()
    started.process.wait()
    storage = Storage(tmp_path / "hub")
    commits = list(storage.get("models", "me", "kept").history("main"))
    held = commits[0].files
    assert set(done) <= set(held) and len(held) <= len(done) + 1
    for file in held.values():
        assert sha256(storage.blob(file.sha256)) == file.sha256
    storage.close()
    again = start(tmp_path / "hub")
    try:
        assert set(again.api().list_repo_files("me/kept")) == set(held)
    finally:
        again.process.terminate()
    started.process.stderr.close()
    thread.join(120)


def test_the_address_as_json(tmp_path):
    command = [sys.executable, str(REPO / "cli.py"), "serve", str(tmp_path / "hub"), "--port", "0", "--json"]
    environment = os.environ | {"ZOO_HUB_TOKEN": TOKEN}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=tmp_path
    )
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["directory"] == str(tmp_path / "hub")
        assert HfApi(endpoint=said["address"], token=TOKEN).whoami()["name"] == "zoo"
    finally:
        process.terminate()
        process.wait(20)


def test_without_a_token_it_makes_one_and_says_it_once(tmp_path):
    started = start(tmp_path / "hub", token=None)
    try:
        assert started.process.stderr is not None
        assert started.process.stderr.readline() == f"    export HF_ENDPOINT={started.address} HF_HUB_DISABLE_XET=1\n"
        token = started.process.stderr.readline().strip().removeprefix("export HF_TOKEN=")
        assert len(token) > 30 and started.api(token).whoami()["name"] == "zoo"
        kept = [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and token in path.read_text()]
        assert kept == []
    finally:
        started.process.terminate()
        assert started.process.wait(20) in (0, 143)
