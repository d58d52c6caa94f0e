"""The section `data` of a recipe: where rows come from, and which of them are learned.

Nothing here imports torch or transformers.
"""

import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from zoo.derived import DERIVED
from zoo.errors import Keys, did_you_mean
from zoo.sections import Section, Text, revision_contradiction
from zoo.task_types import Role

# a share of the rows, or how many
Share = Annotated[
    Annotated[float, Field(gt=0, lt=1), Tag("share")] | Annotated[int, Field(gt=0), Tag("rows")],
    Discriminator(lambda value: "rows" if type(value) is int else "share"),
]


class Pixels(Section):
    """Images whose pixels are columns of their own, row by row: all columns that have no role, `max` being white."""

    height: int = Field(gt=0)
    width: int = Field(gt=0)
    max: int = Field(default=255, gt=0)


class SourceSection(Section):
    """Where rows are read from. `options` goes verbatim to the `datasets` builder that `format` names.

    `files`: the dataset's split -> file under `path`; `splits`: our split -> the dataset's; `columns`: our role ->
    column. `derive`: the name of a way to make other rows of these (zoo/derived.py), whose `columns` count then.
    `drop_empty` leaves out rows that lack a value, which are an error otherwise.
    """

    path: Text | None = None
    revision: Text | None = None
    name: Text | None = None
    files: dict[str, Text] = Field(default_factory=dict)
    format: Text | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    columns: dict[Role, Text] = Field(default_factory=dict)
    splits: dict[Literal["train", "validation", "test"], Text] = Field(default_factory=dict)
    derive: str | None = None
    pixels: Pixels | None = None
    drop_empty: bool = False

    @property
    def place(self) -> str:
        """The path, which is there once the section has been checked."""
        assert self.path is not None
        return self.path

    @field_validator("derive")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in DERIVED:
            known = f"unknown name {value}{did_you_mean(value, DERIVED)} (known: {', '.join(DERIVED)})"
            raise PydanticCustomError("derive", "{text}", {"text": known})
        return value

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        for split, file in self.files.items():
            parts = PurePosixPath(file.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts:
                yield ("files", split), f"{file} is not under data.path; name a file below it"
        for ours, theirs in self.splits.items():
            if self.files and theirs not in self.files:
                yield ("splits", ours), f"data.files has no split {theirs}{did_you_mean(theirs, self.files)}"
        for kind in ("columns", "splits"):
            named: dict[str, str] = dict(getattr(self, kind))
            for key, value in named.items():
                first = next(other for other in named if named[other] == value)
                if first != key:
                    yield (kind, key), f"data.{kind}.{first} is {value} already; one {kind[:-1]} has one use"
        path = self.path or ""
        if self.name is not None and (self.format or self.files or "://" in path):
            yield ("name",), "name is a configuration of a hub dataset; with files or a format nothing reads it"
        yield from revision_contradiction(path, self.revision)


class PartSection(SourceSection):
    """One source of a mixture, and its share of the rows that are trained on."""

    path: Text
    weight: float = Field(gt=0, le=1)


class DataSection(SourceSection):
    """Which rows: of one source, or of a `mixture` of several.

    `validation` and `test` are the shares of train, or the numbers of its rows, held out where there is no such split:
    those of test are the same rows for each seed. `limit`: rows of each split. `stopping_strategy`: a mixture ends with
    its first source, or with its last, the others being repeated. `deduplicate`: leaves out of train what stands there
    already, or in another split: texts alike but for case and space, or all whose word 5-grams have a Jaccard
    `similarity` (0.8). `streaming`: train is read while it is learned, over and over, and in blocks of `buffer_size`
    rows that are shuffled; of the other splits as many rows are read as `validation` and `test` say.
    """

    mixture: list[PartSection] = Field(default_factory=list)
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] | None = None
    validation: Share = 0.1
    test: Share | None = None
    limit: int | None = Field(default=None, gt=0)
    deduplicate: Literal["exact", "near"] | None = None
    similarity: float | None = Field(default=None, ge=0.5, le=0.95)  # what 128 hashes can tell apart
    streaming: bool = False
    buffer_size: int | None = Field(default=None, gt=0)

    @property
    def parts(self) -> list[PartSection]:
        """The sources, of which one alone has the weight 1."""
        if self.mixture:
            return self.mixture
        return [PartSection(weight=1.0, **{key: getattr(self, key) for key in SourceSection.model_fields})]

    def contradictions(self) -> Iterator[tuple[Keys, str]]:
        yield from super().contradictions()
        if self.path is None and not self.mixture:
            yield ("path",), "required, and not there"
        if self.mixture:
            for key in sorted(self.model_fields_set & SourceSection.model_fields.keys()):
                if getattr(self, key) not in (None, {}, False):
                    yield (key,), "a mixture has one in each of its parts; move it there, or remove data.mixture"
            total = sum(part.weight for part in self.mixture)
            if not math.isclose(total, 1, abs_tol=1e-6):
                yield ("mixture",), f"the weights of its parts add up to {total:g}; make it 1"
        elif self.stopping_strategy is not None:
            yield ("stopping_strategy",), "there is no data.mixture that could end; remove the key"
        if self.similarity is not None and self.deduplicate != "near":
            yield ("similarity",), "it is that of near duplicates; set deduplicate: near"
        if not self.streaming:
            if self.buffer_size is not None:
                yield ("buffer_size",), "it is that of a stream; set streaming: true, or remove the key"
            return
        for key in ("validation", "test"):
            if isinstance(getattr(self, key), float):
                yield (key,), f"{getattr(self, key)} is a share, and a stream has no length; give a number of rows"
        for key, why in (
            ("deduplicate", "a stream is not held in memory; deduplicate it beforehand"),
            ("stopping_strategy", "the parts of a stream begin again, each by itself"),
        ):
            if getattr(self, key) is not None:
                yield (key,), f"{why}; remove the key"
        sources: list[tuple[Keys, SourceSection]] = [((), self)]
        sources += [(("mixture", number), part) for number, part in enumerate(self.mixture)]
        for keys, source in sources:
            if source.pixels is not None:
                yield (*keys, "pixels"), "a stream has no columns of pixels; remove the key"
            if source.derive is not None:
                yield (*keys, "derive"), "a stream gives its rows as they are; derive them beforehand"
