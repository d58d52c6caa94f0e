"""The hub of a directory as a source and a home of data sets: the stock clients, each with only HF_ENDPOINT set."""

import csv
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests.hub_server import TOKEN
from tests.web_data import ARTICLES, C4, FINEWEB, IMAGENET, PICTURES, WIKIPEDIA, news
from zoo.service.app import make_app
from zoo.service.storage import Storage


@pytest.fixture(scope="module")
def server(web):
    return web


# Data sets of the web

READ = f"""
import json
from datasets import get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfFileSystem

found = {{}}
try:
    load_dataset("{IMAGENET}", token=False)
except DatasetNotFoundError as error:
    found["private"] = str(error)
for path, name in (("{WIKIPEDIA}", "20231101.en"), ("{C4}", "en"), ("{FINEWEB}", "sample-10BT")):
    for split, rows in load_dataset(path, name, streaming=True).items():
        types = {{name: feature.dtype for name, feature in rows.features.items()}}
        found[f"{{path}} {{split}}"] = [types, rows.num_shards, [row["text"] for row in rows]]
for split, rows in load_dataset("{IMAGENET}", streaming=True).items():
    pictures = [[row["label"], row["image"].mode, *row["image"].size] for row in rows]
    found[f"{IMAGENET} {{split}}"] = [rows.features["label"].names, pictures]
files = HfFileSystem()
with files.open("datasets/{FINEWEB}/sample/10BT/000_00000.parquet", "rb") as file:
    file.seek(-4, 2)
    found["end"] = file.read().decode()
by_address = load_dataset("parquet", data_files="hf://datasets/{FINEWEB}/sample/*/001*.parquet", split="train")
by_pattern = load_dataset("{C4}", data_files={{"test": "en/c4-validation.*.json.gz"}})
found |= {{
    "whole": load_dataset("{WIKIPEDIA}", "20231101.simple", split="train")["title"][:],
    "address": by_address.num_rows, "pattern": by_pattern.num_rows, "configs": get_dataset_config_names("{C4}"),
    "glob": files.glob("datasets/{C4}/**/*validation*.gz"), "found": files.find("datasets/{WIKIPEDIA}"),
    "folder": files.isdir("datasets/{C4}/en"), "nothing": files.exists("datasets/{C4}/fr"),
    "changed": files.modified("datasets/{C4}/README.md").isoformat(),
}}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(web, tmp_path_factory):
    return web.asked(READ, tmp_path_factory.mktemp("client"))


def test_data_sets_of_the_web_stream(found):
    texts = [row["text"] for row in news()]
    strings = dict.fromkeys(("id", "url", "title", "text"), "string")
    assert found[f"{WIKIPEDIA} train"] == [strings, 2, texts[:ARTICLES]]
    columns = {"text": "string", "timestamp": "timestamp[s]", "url": "string"}
    assert found[f"{C4} train"] == [columns, 2, texts[:ARTICLES]]
    assert found[f"{C4} validation"] == [columns, 1, texts[ARTICLES : ARTICLES + 16]]
    strings = dict.fromkeys(("text", "id", "dump", "url", "date", "file_path", "language"), "string")
    assert found[f"{FINEWEB} train"] == [
        strings | {"language_score": "float64", "token_count": "int64"}, 2, texts[:ARTICLES],
    ]  # fmt: skip
    for split, count in PICTURES.items():
        names, pictures = found[f"{IMAGENET} {split}"]
        assert names == ["palace", "daisy"] and len(pictures) == count
        assert {label for label, *_ in pictures} == ({-1} if split == "test" else {0, 1})
        assert {mode for _, mode, *_ in pictures} == {"RGB", "L"} and len({tuple(size) for _, _, *size in pictures}) > 5


def test_data_sets_are_read_in_every_way(found, web):
    assert "doesn't exist on the Hub or cannot be accessed" in found["private"], "without its token"
    assert found["whole"] == [row["title"] for row in news()[ARTICLES : ARTICLES + 16]]
    assert (found["end"], found["address"], found["pattern"]) == ("PAR1", ARTICLES // 2, {"test": 16})
    assert found["configs"] == ["en", "realnewslike"]
    assert found["glob"] == [f"datasets/{C4}/en/c4-validation.00000-of-00008.json.gz"]
    names = (
        "20231101.en/train-00000-of-00041",
        "20231101.en/train-00001-of-00041",
        "20231101.simple/train-00000-of-00001",
    )
    paths = ["README.md", *(f"{name}.parquet" for name in names)]
    assert sorted(found["found"]) == sorted(f"datasets/{WIKIPEDIA}/{path}" for path in paths)
    assert found["folder"] and not found["nothing"]
    commits = httpx2.get(f"{web.address}/api/datasets/{C4}/commits/main").json()
    assert found["changed"][:19] == commits[0]["date"][:19]


WRITTEN = """
import json
from datasets import Dataset, DatasetDict, Features, Image, load_dataset
from huggingface_hub import HfApi

api = HfApi()
api.create_repo("me/by-name", repo_type="dataset")
api.upload_folder(repo_id="me/by-name", folder_path="words", repo_type="dataset")
rows = [{"text": f"row {n}", "label": n % 2} for n in range(10)]
DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:4])).push_to_hub("me/pushed")
Dataset.from_list(rows[:3]).push_to_hub("me/pushed", "small")
Dataset.from_list(rows[3:5]).push_to_hub("me/pushed", "small", split="validation")
photographs = Dataset.from_dict({"image": ["a/one.png"]}, features=Features({"image": Image()}))
photographs.push_to_hub("me/photographs", private=True)
print(json.dumps({
    "first": load_dataset("me/pushed")["train"].to_list(),
    "small": {split: rows["text"][:] for split, rows in load_dataset("me/pushed", "small").items()},
    "photograph": next(iter(load_dataset("me/photographs", split="train", streaming=True)))["image"].size,
    "folders": {split: [[row["label"], *row["image"].size] for row in rows]
                for split, rows in load_dataset("me/by-folder").items()},
    "names": load_dataset("me/by-folder", split="train", streaming=True).features["label"].names,
    "by name": {config: load_dataset("me/by-name", config, split="train")["word"][:] for config in ("fr", "de")},
}))
"""


def test_data_sets_are_written_in_every_way(web, tmp_path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    Image.new("RGB", (5, 7)).save(tmp_path / "a" / "one.png")
    for split in ("train", "test"):
        for width, name in enumerate(("cat", "dog"), start=3):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (width, 9)).save(folder / "1.png")
    for language, word in (("de", "Wort"), ("fr", "mot")):
        (tmp_path / "words" / language).mkdir(parents=True)
        with (tmp_path / "words" / language / "train.csv").open("w") as file:
            csv.writer(file).writerows([["word"], [word]])
    configs = "".join(f"- {{config_name: {name}, data_dir: {name}}}\n" for name in ("de", "fr"))
    (tmp_path / "words" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    hf = Path(sys.executable).with_name("hf")
    command = [hf, "upload", "me/by-folder", "pictures", "--repo-type", "dataset", "--private"]
    done = subprocess.run(command, cwd=tmp_path, env=web.environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = web.asked(WRITTEN, tmp_path)
    assert found["first"] == [{"text": f"row {n}", "label": n % 2} for n in range(10)]
    assert found["small"] == {"train": ["row 0", "row 1", "row 2"], "validation": ["row 3", "row 4"]}
    assert found["photograph"] == [5, 7] and found["names"] == ["cat", "dog"]
    assert found["folders"] == {split: [[0, 3, 9], [1, 4, 9]] for split in ("train", "test")}
    assert found["by name"] == {"fr": ["mot"], "de": ["Wort"]}
    assert (web.directory / "repos" / "datasets" / "me" / "pushed" / "repo.json").exists()


# The protocol


@pytest.mark.usefixtures("online")
def test_models_and_data_sets_of_one_name_are_two(server):
    api = server.api()
    for kind, content in (("model", b"{}"), ("dataset", b"a,b\n")):
        assert str(api.create_repo("me/twice", repo_type=kind)).endswith("/me/twice")
        api.upload_file(path_or_fileobj=content, path_in_repo=f"{kind}.txt", repo_id="me/twice", repo_type=kind)
    api.create_tag("me/twice", tag="v1", repo_type="dataset")
    api.create_branch("me/twice", branch="next", repo_type="dataset")
    assert api.list_repo_files("me/twice", revision="v1", repo_type="dataset") == ["dataset.txt"]
    assert api.list_repo_files("me/twice") == ["model.txt"] and api.list_repo_refs("me/twice").tags == []
    assert [found.id for found in api.list_datasets(search="twice")] == ["me/twice"]
    assert api.list_repo_commits("me/twice", repo_type="dataset", revision="next")[0].title.startswith("Upload")
    api.update_repo_settings("me/twice", repo_type="dataset", private=True)
    assert api.dataset_info("me/twice").private and not api.model_info("me/twice").private
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/twice", repo_type="dataset")
    api.delete_branch("me/twice", branch="next", repo_type="dataset")
    api.delete_tag("me/twice", tag="v1", repo_type="dataset")
    api.delete_repo("me/twice", repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("me/twice")
    assert api.list_repo_files("me/twice") == ["model.txt"]
    with pytest.raises(HfHubHTTPError, match="models and datasets only"):
        api.create_repo("me/twice", repo_type="space", space_sdk="static")


@pytest.mark.usefixtures("online")
def test_names_that_are_words_of_addresses(server):
    api = server.api()
    api.create_repo("tree/resolve", repo_type="dataset")
    path = "tree/resolve/tree/resolve/a.txt"
    api.upload_file(path_or_fileobj=b"a", path_in_repo=path, repo_id="tree/resolve", repo_type="dataset")
    assert [entry.path for entry in api.list_repo_tree("tree/resolve", "tree/resolve", repo_type="dataset")] == [
        "tree/resolve/tree"
    ]
    fetched = hf_hub_download("tree/resolve", path, repo_type="dataset", endpoint=server.address)
    assert Path(fetched).read_bytes() == b"a"


@pytest.mark.usefixtures("online")
def test_long_lists_come_in_pages_of_one_commit(server):
    api = server.api()
    api.create_repo("me/long", repo_type="dataset")
    add = [CommitOperationAdd(f"a b/{number:04}.txt", b"x") for number in range(1100)]
    first = api.create_commit("me/long", add, commit_message="many", repo_type="dataset")
    tree = list(api.list_repo_tree("me/long", recursive=True, repo_type="dataset"))
    assert [entry.path for entry in tree] == ["a b", *(operation.path_in_repo for operation in add)]
    address = f"{server.address}/api/datasets/me/long/tree/main/a%20b"
    page = httpx2.get(address, params={"limit": 5000, "recursive": True})
    assert len(page.json()) == 1000, "and no more, whatever is asked"
    delete = {"path_in_repo": "a b/1050.txt", "repo_id": "me/long", "repo_type": "dataset"}
    second = api.delete_file(**delete, commit_message="one less")
    rest = httpx2.get(page.links["next"]["url"])
    assert [entry["path"] for entry in page.json() + rest.json()] == [operation.path_in_repo for operation in add]
    assert "link" not in rest.headers and first.oid in page.links["next"]["url"]
    assert httpx2.get(address, params={"limit": 0}).status_code == 422
    api.upload_file(path_or_fileobj=b"y", path_in_repo="a b/0001.txt", repo_id="me/long", repo_type="dataset")
    paths = ["a b", "a b/0000.txt", "a b/0001.txt"]
    commits = [found.commit_id for found in api.list_repo_commits("me/long", repo_type="dataset")]
    assert commits[1:3] == [second.oid, first.oid]
    infos = api.get_paths_info("me/long", paths, expand=True, repo_type="dataset")
    assert [info.last_commit.oid for info in infos] == [commits[0], first.oid, commits[0]]
    assert (
        next(iter(api.list_repo_tree("me/long", "a b", expand=True, repo_type="dataset"))).last_commit.oid == first.oid
    )


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_no_route_opens_a_private_repository(server, tmp_path, kind):
    """Each way to it, asked without a token: as if it were not there, or the token is wanted."""
    api = server.api()
    api.create_repo("me/hidden", repo_type=kind, private=True)
    api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.txt", repo_id="me/hidden", repo_type=kind)
    app = make_app(Storage(tmp_path / "hub"), TOKEN, "zoo", ["*"])
    words = {"namespace": "me", "name": "hidden", "revision": "main", "branch": "new", "tag": "new"}
    asked = 0
    with httpx2.Client(base_url=server.address) as client:
        for route in app.routes:
            path = route.path.replace(":path", "")
            if "{name}" not in path or ("dataset" in path) != (kind == "dataset"):
                continue
            path = path.format(**words, rest="main/a.txt" if "/resolve/" in path else "main")
            for method in route.methods:
                reads = method in ("GET", "HEAD") or "paths-info" in path
                assert client.request(method, path, json={}).status_code == (404 if reads else 401), path
                asked += 1
    assert asked == 16
    with_token = {"authorization": f"Bearer {TOKEN}"}
    prefix = "datasets/" if kind == "dataset" else ""
    assert httpx2.get(f"{server.address}/{prefix}me/hidden/resolve/main/a.txt", headers=with_token).content == b"secret"
    assert "me/hidden" not in httpx2.get(f"{server.address}/api/{kind}s").text
    assert api.list_repo_files("me/hidden", repo_type=kind) == ["a.txt"]


def test_what_other_services_answer_is_not_there(server):
    """The clients ask for these too; they go on without."""
    of_one = ("croissant", "xet-read-token/main", "revision/refs%2Fconvert%2Fparquet")
    others = (f"/parquet?dataset={C4}", f"/info?dataset={C4}", "/api/agent-harnesses")
    with httpx2.Client(base_url=server.address) as client:
        for path in (*others, *(f"/api/datasets/{C4}/{rest}" for rest in of_one)):
            assert client.get(path).status_code == 404, path
