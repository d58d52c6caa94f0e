"""Tagged texts as CoNLL has them: a line for each token, its tag last, an empty line after each text.

The datasets library has no reader of this kind: `data.format: conll` is ours.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, List, Value

from zoo.errors import UserError
from zoo.recipe import DataSection

_FEATURES = Features({"tokens": List(Value("string")), "tags": List(Value("string"))})


def read_conll(section: DataSection, files: Mapping[str, str] | None) -> DatasetDict:
    """The splits of a recipe's files, with columns `tokens` and `tags`. `options.sep`: between columns, any space."""
    for key in section.options:
        if key != "sep":
            raise UserError(f"data.options.{key}: the format conll has one option, sep")
    if not files:
        raise UserError("data: the format conll wants data.files, or a file as data.path")
    return DatasetDict({split: _read(Path(file), section.options.get("sep")) for split, file in files.items()})


def _read(file: Path, separator: str | None) -> Dataset:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data {file.name}: cannot be read: {error}") from error
    return Dataset.from_list(list(_texts(file, lines, separator)), features=_FEATURES)


def _texts(file: Path, lines: list[str], separator: str | None) -> Iterator[dict[str, list[str]]]:
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        columns = line.strip().split(separator)
        # a document's first line, as CoNLL 2003 marks it, stands alone
        if line.strip() == "" or columns[0] == "-DOCSTART-":
            if tokens:
                yield {"tokens": tokens, "tags": tags}
            tokens, tags = [], []
        elif len(columns) < 2:
            raise UserError(f"data {file.name}:{number}: {line.strip()!r} has one column; it wants a token and a tag")
        else:
            tokens.append(columns[0])
            tags.append(columns[-1].strip())
