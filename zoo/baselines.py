"""`zoo baseline`: what the simplest methods reach on a recipe's data, measured as its model is."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import regex
from datasets import Dataset
from scipy.ndimage import distance_transform_edt
from scipy.sparse import vstack
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from zoo.building import training_arguments
from zoo.data import Splits, load_splits
from zoo.errors import UserError
from zoo.fitting import fit_images
from zoo.images import open_image
from zoo.loading import load_model, load_processor
from zoo.recipe import Recipe
from zoo.tasks import spans, task_of
from zoo.tasks.base import IGNORED
from zoo.tasks.masked_images import hidden_pixels
from zoo.tasks.retrieval import ranks, retrieval, text_id
from zoo.tasks.squad import squad
from zoo.tasks.summarization import rouge
from zoo.tasks.translation import translated
from zoo.tokenizer import processor_for

PIXELS = 28  # a side of the images that logistic regression sees
# tokens that count, and pairs of a token that is measured and the one before it
Piece = tuple[list[int], list[tuple[int, int]]]
SENTENCE = regex.compile(r".+?[.!?](?=\s|$)|.+$", regex.DOTALL)


def run(recipe: Recipe, split: str = "test") -> dict[str, dict[str, float]]:
    """Baseline -> its metrics on a split, learned on train. Raises UserError where the task has none."""
    task = task_of(recipe.task)
    if task.problem_type != "single_label_classification" and task.name not in _OTHERS:
        raise UserError(f"baseline: {task.name} has none; there are some for {', '.join(('classes', *_OTHERS))}")
    seed = training_arguments(recipe, Path()).seed
    splits = load_splits(recipe.data, task.roles, seed, kind=task.labels)
    for note in splits.notes:
        print(note)
    if getattr(splits, split) is None:
        raise UserError(f"--split {split}: the data has no such split")
    measure = _OTHERS.get(task.name, _classes)
    return dict(measure(recipe, splits, getattr(splits, split)))


# Classes


def _classes(recipe: Recipe, splits: Splits, rows: Dataset) -> Iterator[tuple[str, dict[str, float]]]:
    images = "image" in rows.column_names
    given, asked = (_pixels(part) if images else _texts(part) for part in (splits.rows, rows))
    methods = {
        "the largest class": DummyClassifier(),
        "logistic regression of pixels" if images else "logistic regression of TF-IDF": make_pipeline(
            *([MaxAbsScaler()] if images else [TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2))]),
            LogisticRegression(max_iter=1000, C=1.0 if images else 30.0),
        ),
    }
    for name, method in methods.items():
        predicted = method.fit(given, splits.rows["label"]).predict(asked)
        gold = rows["label"]
        yield (
            name,
            {
                "accuracy": float(accuracy_score(gold, predicted)),
                "f1_macro": float(f1_score(gold, predicted, average="macro", zero_division=0)),
            },
        )


def _texts(rows: Dataset) -> list[str]:
    roles = [role for role in ("text", "text_pair") if role in rows.column_names]
    return ["\n".join(texts) for texts in zip(*(rows[role] for role in roles), strict=True)]


def _pixels(rows: Dataset) -> np.ndarray:
    small = (open_image(image, "data").convert("L").resize((PIXELS, PIXELS)) for image in rows["image"])
    return np.stack([np.asarray(image, dtype=np.float32).ravel() for image in small])


# Choices


def _choices(recipe: Recipe, splits: Splits, rows: Dataset) -> Iterator[tuple[str, dict[str, float]]]:
    """Any choice; the one whose words are most like those of the text, any of them where several are."""
    texts = [text for row in splits.rows for text in (row["text"], *row["choices"])]
    words = TfidfVectorizer(sublinear_tf=True).fit(texts)
    likeness = [(words.transform(row["choices"]) @ words.transform([row["text"]]).T).toarray()[:, 0] for row in rows]
    for name, scores in (
        ("any choice", [np.zeros_like(alike) for alike in likeness]),
        ("the choice most like the text by TF-IDF", likeness),
    ):
        best = [np.isclose(score, score.max()) for score in scores]
        found = [one[right] / one.sum() for one, right in zip(best, rows["label"], strict=True)]
        yield name, {"accuracy": float(np.mean(found))}


# Texts


def _copies(recipe: Recipe, splits: Splits, rows: Dataset) -> Iterator[tuple[str, dict[str, float]]]:
    yield "the text itself", translated(list(rows["translation"]), list(rows["text"]))


def _leads(recipe: Recipe, splits: Splits, rows: Dataset) -> Iterator[tuple[str, dict[str, float]]]:
    """The first sentence, whole, and cut to as many words as summaries of train usually have."""
    usual = int(np.median([len(summary.split()) for summary in splits.rows["summary"]]))
    leads = [SENTENCE.match(text.strip()).group() for text in rows["text"]]
    gold = list(rows["summary"])
    yield "the lead sentence", rouge(gold, leads)
    yield f"its first {usual} words", rouge(gold, [" ".join(lead.split()[:usual]) for lead in leads])


# Texts that belong together


def _retrieved(recipe: Recipe, splits: Splits, rows: Dataset) -> Iterator[tuple[str, dict[str, float]]]:
    """By the words that an anchor shares with other texts of the split; the words' weights are those of train."""
    roles = [role for role in ("text", "text_pair", "negative") if role in rows.column_names]
    weigh = TfidfVectorizer(sublinear_tf=True).fit([text for role in roles for text in splits.rows[role]])
    ids = np.array([[text_id(text) for text in rows[role]] for role in roles])
    anchors, texts, *negatives = (weigh.transform(rows[role]) for role in roles)
    found = ranks(anchors, vstack([texts, *negatives]).tocsr(), ids[:2].T, ids[1:].ravel())
    yield "TF-IDF", retrieval(list(found), np.asarray(anchors.multiply(texts).sum(1)).ravel())


# Answers


def _sentences(recipe: Recipe, splits: Splits, rows: Dataset) -> Iterator[tuple[str, dict[str, float]]]:
    """The first sentence of the context, and the one that shares most with the question, rare words weighing more."""
    gold = [answers["text"] for answers in rows["answers"]]
    learned = [sentence for context in splits.rows["context"] for sentence in SENTENCE.findall(context)]
    weigh = TfidfVectorizer(sublinear_tf=True).fit(learned)
    first, nearest = [], []
    for question, context in zip(rows["question"], rows["context"], strict=True):
        sentences = SENTENCE.findall(context)
        shared = (weigh.transform(sentences) @ weigh.transform([question]).T).toarray()[:, 0]
        first.append(sentences[0])
        nearest.append(sentences[int(shared.argmax())])
    if recipe.task.version_2_with_negative:
        yield "no answer", squad(gold, [""] * len(gold))
    yield "the first sentence", squad(gold, first)
    yield "the sentence nearest to the question", squad(gold, nearest)


# Tags


def _usual_tags(recipe: Recipe, splits: Splits, rows: Dataset) -> Iterator[tuple[str, dict[str, float]]]:
    """Of each word the tag that it has most often in train, and of one that is not there the most frequent tag."""
    names = splits.labels
    pairs = Counter(pair for row in splits.rows for pair in zip(row["tokens"], row["tags"], strict=True))
    usual: dict[str, int] = {}
    for (word, tag), _ in pairs.most_common():
        usual.setdefault(word, tag)
    (often, _), *_ = Counter(tag for row in splits.rows for tag in row["tags"]).most_common(1)
    gold = [[names[tag] for tag in tags] for tags in rows["tags"]]
    predicted = [[names[usual.get(word, often)] for word in words] for words in rows["tokens"]]
    right = [one == other for row in zip(gold, predicted, strict=True) for one, other in zip(*row, strict=True)]
    found = spans.scores(gold, predicted)[""]
    measured = {name: found[name] for name in ("precision", "recall", "f1")}
    yield "the usual tag of each word", {"accuracy": float(np.mean(right)), **measured}


# Hidden tokens


def _frequent(recipe: Recipe, splits: Splits, rows: Dataset) -> Iterator[tuple[str, dict[str, float]]]:
    """By how often each token comes in train, of any token of the texts; which of them a run hides is no matter."""
    tokenizer: Any = processor_for(recipe.model, "tokenizer", splits)
    train, asked = (
        Counter(
            chain.from_iterable(tokenizer(list(part["text"]), add_special_tokens=False, verbose=False)["input_ids"])
        )
        for part in (splits.rows, rows)
    )
    total, count = sum(train.values()) + len(tokenizer), sum(asked.values())
    nats = -sum(times * log((train[token] + 1) / total) for token, times in asked.items()) / count
    often = train.most_common(1)[0][0]
    yield "the most frequent token", {"accuracy": asked[often] / count, "perplexity": exp(nats)}


# Next tokens


def _tokens(recipe: Recipe, splits: Splits, rows: Dataset) -> Iterator[tuple[str, dict[str, float]]]:
    """Nats a token, of the tokens that the model is measured on: all but the first of each piece, or of answers alone.

    unigram, bigram: counts of train, smoothed by interpolation, their weights chosen on the validation split. entropy:
    of the counts of the measured text itself, which no unigram model of it can undercut; that of its bigrams falls with
    every pair that occurs once, and is no floor for anything.
    """
    assert splits.validation is not None
    tokenizer = processor_for(recipe.model, "tokenizer", splits)
    task_of(recipe.task).prepare(tokenizer)
    train, tuned, asked = (_pieces(recipe, tokenizer, part) for part in (splits.rows, splits.validation, rows))
    once, twice = Counter(t for tokens, _ in train for t in tokens), Counter(p for _, pairs in train for p in pairs)
    first = Counter(a for _, pairs in train for a, _ in pairs)
    total, size = sum(once.values()), len(tokenizer)  # type: ignore[arg-type]

    def nats(pieces: list[Piece], bigrams: float) -> float:
        losses = []
        for a, b in (pair for _, pairs in pieces for pair in pairs):
            unigram = (once[b] + 1) / (total + size)
            # the rarer a token is, the less is known of what follows it (Witten and Bell 1991)
            weight = first[a] / (first[a] + bigrams) if bigrams else 0.0
            losses.append(-log(weight * twice[a, b] / max(first[a], 1) + (1 - weight) * unigram))
        return float(np.mean(losses))

    yield "unigram of train", {"token_loss": nats(asked, 0.0)}
    best = min((10.0, 30.0, 100.0, 300.0, 1000.0), key=lambda weight: nats(tuned, weight))
    yield "bigram of train", {"token_loss": nats(asked, best)}
    learned = Counter(b for _, pairs in asked for _, b in pairs)
    joint = _entropy(Counter(p for _, pairs in asked for p in pairs))
    single, before = _entropy(learned), _entropy(Counter(a for _, pairs in asked for a, _ in pairs))
    yield "unigram entropy of the text itself", {"token_loss": single}
    yield "bigram entropy of the text itself", {"token_loss": joint - before}


def _pieces(recipe: Recipe, tokenizer: Any, rows: Dataset) -> list[Piece]:
    encode = task_of(recipe.task).encode(tokenizer, recipe.task)
    # of several texts a piece, and chats without an answer are none
    pieces = rows.map(encode, batched=True, remove_columns=rows.column_names)
    if "learned" not in pieces.column_names:
        return [(piece, list(pairwise(piece))) for piece in pieces["input_ids"]]
    found = []
    for piece, labels in zip(pieces["input_ids"], pieces["labels"], strict=True):
        pairs = [pair for pair, label in zip(pairwise(piece), labels[1:], strict=True) if label != IGNORED]
        found.append(([token for _, token in pairs], pairs))
    return found


def _entropy(counts: Counter) -> float:
    shares = np.array(list(counts.values())) / sum(counts.values())
    return float(-(shares * np.log(shares)).sum())


# Hidden pixels


def _hidden(recipe: Recipe, splits: Splits, rows: Dataset) -> Iterator[tuple[str, dict[str, float]]]:
    """Made of the visible pixels of the same image, and measured on the hidden ones that an evaluation hides."""
    task = task_of(recipe.task)
    model, processor = load_model(recipe.model, task.auto_class), load_processor(recipe.model, task.processor)
    fit_images(model, processor, recipe.task.image_size)
    task.check(recipe.task, model)
    collate = task.collate(processor, recipe.task, patch_size=model.config.patch_size)
    # the median is the number that is the least far from all of them
    methods: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "the mean visible pixel": lambda image, hidden: image[:, ~hidden].mean(axis=1, keepdims=True),
        "the median visible pixel": lambda image, hidden: np.median(image[:, ~hidden], axis=1, keepdims=True),
        "the nearest visible pixel": _nearest,
    }
    distances: dict[str, list[float]] = {name: [] for name in methods}
    for row in rows:
        batch = collate([row])
        image = batch["pixel_values"][0].numpy()
        hidden = hidden_pixels(batch["bool_masked_pos"], model.config.patch_size)[0, 0].numpy()
        for name, method in methods.items():
            distances[name].append(float(np.abs(image[:, hidden] - method(image, hidden)).mean()))
    yield from ((name, {"mae": float(np.mean(values))}) for name, values in distances.items())


def _nearest(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    above, left = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return image[:, above[hidden], left[hidden]]


_OTHERS: dict[str, Callable[..., Iterator[tuple[str, dict[str, float]]]]] = {
    "sentence-similarity": _retrieved,
    "question-answering": _sentences,
    "multiple-choice": _choices,
    "summarization": _leads,
    "translation": _copies,
    "token-classification": _usual_tags,
    "fill-mask": _frequent,
    "next-sentence-prediction": _frequent,
    "sentence-order-prediction": _frequent,
    "span-corruption": _frequent,
    "text-generation": _tokens,
    "instruction-tuning": _tokens,
    "masked-image-modeling": _hidden,
}
