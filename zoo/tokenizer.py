"""Vocabularies that are learned from a recipe's own train split, by the tokenizer classes of transformers.

WordPiece (Schuster and Nakajima 2012), BPE on bytes (Radford et al. 2019, section 2.2), Unigram (Kudo 2018, arXiv
1804.10959), with bytes for what the vocabulary lacks if that is wanted (Kudo and Richardson 2018, arXiv 1808.06226).
"""

import inspect
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.trainers import WordPieceTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from zoo.data import Splits, load_splits
from zoo.errors import UserError, did_you_mean
from zoo.files import write_json, write_text
from zoo.loading import Processor, complete, load_processor
from zoo.recipe import Recipe
from zoo.sections import ModelSection, TokenizerSection
from zoo.streaming import Unread
from zoo.tasks import task_of

CLASSES = {
    "bert": transformers.BertTokenizer,
    "roberta": transformers.RobertaTokenizer,
    "gpt2": transformers.GPT2Tokenizer,
    "t5": transformers.T5Tokenizer,
    "albert": transformers.AlbertTokenizer,
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = 1000  # of an alphabet, the most frequent
BATCH = 1000  # texts that are handed over at once
LEARNED = ("label", "tags", "row")


def processor_for(section: ModelSection, kind: str, splits: Splits, kept: Path | None = None) -> Processor:
    """What makes a model's inputs: the checkpoint's own, or a tokenizer that is learned from train.

    kept: where the tokenizer stands that a run has learned before, if it has.
    """
    wanted = section.tokenizer
    if isinstance(wanted, TokenizerSection) and kind != "tokenizer":
        raise UserError("model.tokenizer: images have none; remove the key")
    if not isinstance(wanted, TokenizerSection):
        return load_processor(section, kind)
    if kept is not None and kept.is_dir():
        return load_processor(section.model_copy(update={"tokenizer": str(kept)}), kind)
    tokenizer = learned(wanted, splits.train)
    complete(tokenizer, section.added_tokens)
    return tokenizer


def learned(section: TokenizerSection, rows: Dataset | Unread | None) -> PreTrainedTokenizerBase:
    """A tokenizer of the kind that a family has, with a vocabulary of at most `vocab_size`. Raises UserError."""
    if rows is None:
        raise UserError("model.tokenizer: is learned from train, and the data has no such split")
    if isinstance(rows, Unread):
        if section.rows is None:
            raise UserError("model.tokenizer.rows: required with data.streaming: so many rows are read for it")
        rows = rows.first(section.rows)
    elif section.rows is not None:
        rows = rows.select(range(min(section.rows, len(rows))))
    made = CLASSES[section.type]
    known = [name for name in inspect.signature(made).parameters if name not in ("vocab", "merges", "kwargs")]
    for name in section.options:
        if name not in known:
            near = did_you_mean(name, known)
            raise UserError(f"model.tokenizer.options.{name}: {made.__name__} has no such option{near}")
    texts = list(_texts(rows))
    if not texts:
        raise UserError("model.tokenizer: train has no text to learn it from")
    blank: Any = made(**section.options)
    size = section.vocab_size - (len(BYTES) if section.byte_fallback else 0)
    least = len(blank) + (256 if section.type in ("gpt2", "roberta") else 1)
    if size < least:
        raise UserError(f"model.tokenizer.vocab_size: {section.vocab_size}; special tokens and bytes alone are more")
    print(f"tokenizer: {section.type}, at most {section.vocab_size:,} tokens, from {len(texts):,} texts")
    batches = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
    try:
        if section.type == "bert":
            tokenizer = made(vocab=_word_pieces(blank, texts, size), **section.options)
        else:
            tokenizer = blank.train_new_from_iterator(batches, size, length=len(texts), show_progress=False)
    except Exception as error:
        # the trainers are not Python's, and say no more than that
        raise UserError(f"model.tokenizer: cannot be learned: {error}; set another vocab_size") from error
    if section.byte_fallback:
        tokenizer = _with_bytes(tokenizer)
    print(f"tokenizer: {len(tokenizer):,} tokens")
    return tokenizer


def _texts(rows: Dataset) -> Iterator[str]:
    columns = [name for name in rows.column_names if name not in LEARNED]
    for row in rows.select_columns(columns):
        for name in columns:
            yield from _strings(row[name])


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value: words are one, and of a message its content."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and value and isinstance(value[0], str):
        yield " ".join(value)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict):
        yield from _strings([value["content"]] if "content" in value else list(value.values()))


def _word_pieces(blank: Any, texts: Sequence[str], size: int) -> dict[str, int]:
    """Token -> number, the same each time: the trainer numbers the letters within words in an order of chance, which
    decides between pairs that are equally frequent, unless it has them before."""
    backend = blank.backend_tokenizer
    inside: Counter[str] = Counter()
    for text in texts:
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal):
            inside.update(word[1:])
    frequent = sorted(inside, key=lambda letter: (-inside[letter], letter))[:LETTERS]
    first = [*blank.all_special_tokens, *(f"##{letter}" for letter in frequent)]
    trainer = WordPieceTrainer(vocab_size=size, special_tokens=first, limit_alphabet=LETTERS, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend.get_vocab()


def _with_bytes(tokenizer: Any) -> PreTrainedTokenizerBase:
    """A Unigram vocabulary with the 256 bytes for what it lacks, as which a text that spells one out is read too."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    lowest = min(score for _, score in state["model"]["vocab"])
    state["model"]["vocab"] += [[byte, lowest] for byte in BYTES]
    state["model"]["byte_fallback"] = True
    state["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, state["decoder"]]}
    # the family's own class would open it without them
    kept = {name: value for name, value in tokenizer.init_kwargs.items() if name.endswith("_token")}
    others = [token for token in tokenizer.all_special_tokens if token not in kept.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), extra_special_tokens=others, **kept
    )


def save(tokenizer: Processor, directory: Path) -> None:
    """Whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    started = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(started, ignore_errors=True)
    tokenizer.save_pretrained(started)
    started.rename(directory)


def run(recipe: Recipe, output_dir: Path) -> dict[str, Any]:
    """The stage `tokenizer`: learns `model.tokenizer` of a recipe into a directory; returns what it makes of texts.

    Measured on the validation split. Raises UserError for a recipe without one and a directory that is there.
    """
    section = recipe.model.tokenizer
    if not isinstance(section, TokenizerSection):
        there = "names one that there is" if section else "is not there"
        raise UserError(f"model.tokenizer: {there}; write what is to be learned: {{type: bert, vocab_size: 8000}}")
    if output_dir.exists():
        raise UserError(f"--output-dir {output_dir}: is there already; delete it, or choose another directory")
    task = task_of(recipe.task)
    if task.processor != "tokenizer":
        raise UserError(f"model.tokenizer: {task.name} reads no text")
    splits = load_splits(recipe.data, task.roles, recipe.train.get("seed", 42), kind=task.labels)
    for note in splits.notes:
        print(note)
    tokenizer = learned(section, splits.train)
    complete(tokenizer, recipe.model.added_tokens)
    metrics = {"vocab_size": float(len(tokenizer))}
    if splits.validation is not None:
        metrics |= measured(tokenizer, _texts(splits.validation))
    save(tokenizer, output_dir)
    write_text(output_dir / "recipe.yaml", recipe.to_yaml())
    write_json(output_dir / "metrics.json", metrics)
    return metrics


def measured(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, float]:
    """Tokens a word, bytes of UTF-8 a token, and the shares of unknown tokens and of texts that come back as they were,
    but for space."""
    tokens = words = size = unknown = whole = count = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens, words, size = tokens + len(ids), words + len(text.split()), size + len(text.encode())
        unknown += 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
        whole += "".join(str(tokenizer.decode(ids)).split()) == "".join(text.split())
        count += 1
    return {
        "tokens_per_word": tokens / max(words, 1),
        "bytes_per_token": size / max(tokens, 1),
        "unknown": unknown / max(tokens, 1),
        "lossless": whole / max(count, 1),
    }
