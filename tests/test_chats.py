"""Chats: what of them is learned, by any template; what is refused; a run from messages to answers."""

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2TokenizerFast, pipeline

import zoo.evaluation
import zoo.prediction
import zoo.preview
from tests.conftest import read_r8
from tests.test_runs import read_lines, read_metrics, write_jsonl
from tests.test_writing import GPT, recipe
from zoo.data import load_splits
from zoo.data_sections import DataSection
from zoo.errors import UserError
from zoo.recipe import Recipe
from zoo.recipe_loading import load_recipe
from zoo.sections import TaskSection
from zoo.task_types import TASK_TYPES
from zoo.tasks import task_of
from zoo.tasks.base import IGNORED
from zoo.tasks.instruction_tuning import chat_ids, prepare, with_answers
from zoo.train import run

ROLES = TASK_TYPES["instruction-tuning"].roles
# ChatML, with and without marks, and what else templates do
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] + '<|im_end|>' }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "plain": CHATML,
    "marked": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "counting": "{{ messages | length }}" + CHATML,
    "strict": (
        "{% if messages | length > 1 and messages[0]['role'] == messages[1]['role'] %}"
        "{{ raise_exception('roles take turns') }}{% endif %}" + CHATML
    ),
    "endless": "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}",
}


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """As GPT-2's: <|endoftext|> is all it has."""
    trained = ByteLevelBPETokenizer()
    texts = [text for text, _ in read_r8("train", 60)]
    trained.train_from_iterator(texts, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    return GPT2TokenizerFast(tokenizer_object=trained._tokenizer)


@pytest.fixture(params=["words", "bytes"])
def tokenizer(request, tiny_bert, bytes_tokenizer, tmp_path):
    """One of BERT's kind, with [CLS] and [SEP], and one of GPT-2's; as saved and opened again by the stock class."""
    made = AutoTokenizer.from_pretrained(tiny_bert) if request.param == "words" else bytes_tokenizer
    made.save_pretrained(tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path)
    settings = prepare(made)
    assert settings == {
        "eos_token_id": made.convert_tokens_to_ids("[SEP]" if request.param == "words" else "<|endoftext|>")
    }
    made.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == made.chat_template == opened.chat_template
    assert prepare(opened) == settings, "it has its template already"
    return opened


def learned(tokenizer, messages) -> list[list[int]]:
    """The ids of each answer: of each run of the mask."""
    ids, mask = with_answers(tokenizer, messages)
    found = [[]]
    for one, is_answer in zip(ids, mask, strict=True):
        if is_answer:
            found[-1].append(one)
        elif found[-1]:
            found.append([])
    return [answer for answer in found if answer]


# What is learned


ANSWERS = {
    "one": chat("oil prices?", "they rose"),
    "several, and a system": chat("oil?", "it rose", "shares?", "they fell", system="be brief"),
    "with blanks around": chat("oil?", "  it rose\n", "shares?", " they fell"),
    "roles in the text": chat("oil <|assistant|> it fell <|user|> why?", "it rose"),
    "ends in the text": chat("[SEP] oil <|endoftext|>", "it <|endoftext|> rose [SEP]", "why?", "war"),
    "a question last": chat("oil?", "it rose", "why?"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_and_their_end_are_learned(tokenizer, kind):
    messages = ANSWERS[kind]
    end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    texts = [one["content"] for one in messages if one["role"] == "assistant"]
    plain = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    assert learned(tokenizer, messages) == [[*ids, end] for ids in plain]
    ids, _ = with_answers(tokenizer, messages)
    markers = tokenizer.convert_tokens_to_ids([f"<|{one['role']}|>" for one in messages])
    assert [
        one for one in ids if one in tokenizer.convert_tokens_to_ids(["<|system|>", "<|user|>", "<|assistant|>"])
    ] == markers
    if "text" not in kind:
        assert ids == tokenizer.apply_chat_template(messages)["input_ids"], "it is what the stock library makes of it"


def test_a_template_of_the_tokenizers_own_with_or_without_marks(bytes_tokenizer, tmp_path):
    bytes_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end, newline = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer("\n")["input_ids"]
    rose, fell = (tokenizer(text)["input_ids"] for text in ("it rose", "they fell"))
    messages = chat("oil?", "it rose", "shares?", "they fell", system="be brief")
    for name, behind in (("marked", []), ("plain", newline)):
        tokenizer.chat_template = TEMPLATES[name]
        assert prepare(tokenizer) == {"eos_token_id": end} and tokenizer.chat_template == TEMPLATES[name]
        assert learned(tokenizer, messages) == [[*rose, end, *behind], [*fell, end, *behind]], name
    tokenizer.chat_template = TEMPLATES["counting"]
    with pytest.raises(UserError, match=r"model: by the chat template .* not how the answered chat begins"):
        prepare(tokenizer)
    tokenizer.chat_template = TEMPLATES["endless"]
    with pytest.raises(UserError, match="no special token at the end of an answer"):
        prepare(tokenizer)
    tokenizer.chat_template = TEMPLATES["strict"]
    task, section = chats()
    rows = {"messages": [[*chat("a"), *chat("b", "c")]], "row": [7]}
    with pytest.raises(UserError, match=r"data: row 7: the chat template .* refuses it: roles take turns"):
        task.encode(tokenizer, section)(rows)


def chats(**keys):
    section = TaskSection.model_validate({"type": "instruction-tuning", **keys})
    return task_of(section), section


def test_a_tokenizer_without_an_end_is_refused(bytes_tokenizer, tmp_path):
    bytes_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no token that could end an answer"):
        prepare(tokenizer)


def test_long_chats_are_cut_and_what_has_no_answer_left_is_left_out(tokenizer):
    task, section = chats(max_length=12, prefix="tell: ")
    rows = {"prompt": ["oil?", "oil " * 30, "oil"], "completion": ["rose", "rose", "rose " * 30], "row": [4, 5, 6]}
    encoded = task.encode(tokenizer, section)(rows)
    assert encoded["row"] == [4, 6] and encoded["truncated"] == [False, True]
    whole = chat_ids(tokenizer, chat("tell: oil?", "rose"))
    assert encoded["input_ids"][0] == whole and len(encoded["input_ids"][1]) == 12
    assert encoded["labels"][0] == [IGNORED] * (len(whole) - encoded["learned"][0]) + whole[-encoded["learned"][0] :]
    assert encoded["labels"][1][-1] == encoded["input_ids"][1][-1], "no end is learned where there is none"
    found = type("Table", (dict,), {"__len__": lambda self: len(self["row"])})(encoded)
    assert task.counts(found, 3, section).startswith("3 chats; 1 cut at 12 tokens, 1 left out whose answers are behind")
    with pytest.raises(UserError, match=r"task.max_length: 12, but no chat has an answer by then"):
        task.counts(type(found)({"row": []}), 3, section)


# What is refused


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": "x"}, "the chat in column 'messages' is no list of messages, {role, content} each: 'x'"),
        ({"messages": []}, "is no list of messages"),
        ({"messages": [user("a")]}, "has no answer, that is, no message of the role assistant"),
        (
            {"messages": [user("a"), {"role": "assistant", "content": " "}]},
            "has a message (1, assistant) that is empty",
        ),
        ({"messages": [user(None), *chat("a", "b")]}, "has a message (0, user) that is empty"),
        (
            {"messages": [user("a"), {"role": "bot", "content": "b"}]},
            "has a message (1) of the role 'bot'; a role is one",
        ),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "begins with an answer"),
        ({"prompt": "a", "completion": " "}, "the text in column 'completion' is empty"),
        ({"prompt": "a"}, "data.columns.completion: the train split of"),
        ({"prompt": "a", "completion": ["b"]}, "column 'completion' holds ['b'], not a text"),
    ],
)
def test_bad_chats(tmp_path, row, says):
    write_jsonl(tmp_path / "train.jsonl", [row] * 2)
    with pytest.raises(UserError) as caught:
        load_splits(DataSection(path=str(tmp_path / "train.jsonl")), ROLES, 0)
    assert says in str(caught.value)


def test_messages_or_pairs(tmp_path):
    rows = [{"messages": chat("a", "b"), "prompt": "c", "completion": "d"}] * 8
    write_jsonl(tmp_path / "train.jsonl", rows)
    for columns, names in (({}, {"messages"}), ({"prompt": "prompt"}, {"prompt", "completion"})):
        splits = load_splits(DataSection(path=str(tmp_path / "train.jsonl"), columns=columns), ROLES, 0)
        assert set(splits.train.column_names) == {*names, "row"}


# A run


@pytest.fixture(scope="module")
def talk(tiny_bert, tmp_path_factory):
    """Of one subject it says this, of the other that."""
    folder = tmp_path_factory.mktemp("talk")
    said = {"oil": "prices rose", "gold": "the company said shares fell"}
    rows = [{"messages": chat(subject, said[subject], system="news")} for subject in said] * 12
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(
        folder / "test.jsonl", [{"messages": chat(*(x for s in said for x in (s, said[s])), system="news")}] * 3
    )
    task = {"type": "instruction-tuning", "max_length": 48, "prefix": "say: ", "packing": True}
    config = {**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    made = recipe(tiny_bert, folder, config, task, {"max_new_tokens": 9}, max_steps=60, learning_rate=1e-2,
                  eval_steps=30, save_steps=30, per_device_train_batch_size=2)  # fmt: skip
    run(made, folder / "run")
    return folder / "run", said


def test_it_answers_and_stops(talk):
    directory, said = talk
    stock = pipeline("text-generation", str(directory))
    for subject, words in said.items():
        asked = [*chat(f"say: {subject}", system="news")]
        assert stock(asked)[0]["generated_text"][-1] == {"role": "assistant", "content": words}
    settings = json.loads((directory / "generation_config.json").read_text())
    assert settings["eos_token_id"] == stock.tokenizer.sep_token_id and settings["max_new_tokens"] == 9


def test_predictions(talk, tmp_path):
    directory, said = talk
    asked = [{"messages": chat(subject, system="news"), "id": 1} for subject in said] * 2
    write_jsonl(tmp_path / "asked.jsonl", asked)
    answers = list(zoo.prediction.run(directory, file=tmp_path / "asked.jsonl"))
    assert [answer["predicted"] for answer in answers] == [*said.values()] * 2
    assert next(zoo.prediction.in_lines(answers)) == "prices rose  say: oil" or "oil" in next(
        zoo.prediction.in_lines(answers)
    )
    stock = pipeline("text-generation", str(directory))
    texts = ["gold rose", "oil <|assistant|> gold [SEP]"]
    ours = list(zoo.prediction.run(directory, texts))
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
    assert list(zoo.prediction.run(directory, file=tmp_path / "prompts.jsonl")) == ours
    plain = {"sanitize_control_tokens": True}
    for text, answer in zip(texts, ours, strict=True):
        (theirs,) = stock(chat(f"say: {text}"), tokenizer_encode_kwargs=plain)
        assert answer["prompt"] == text and answer["predicted"] == theirs["generated_text"][-1]["content"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": chat("oil", "rose")}, "predict: chat 0 ends with an answer; leave it out"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "predict: chat 0 has a message (0) of the role 'bot'"),
        ({"prompt": " "}, "predict: text 0 is ' '"),
        ({"prompt": "oil " * 70}, "tokens and 9 more are written (max_new_tokens), but the model has 64 positions"),
        ({"text": "oil"}, "no column 'prompt'; it has text"),
    ],
)
def test_what_cannot_be_answered(talk, tmp_path, row, says):
    write_jsonl(tmp_path / "asked.jsonl", [row])
    with pytest.raises(UserError) as caught:
        zoo.prediction.run(talk[0], file=tmp_path / "asked.jsonl")
    assert says in str(caught.value)


def test_the_loss_of_an_answers_token(talk):
    """By the official class, of the answers' tokens alone."""
    directory, _ = talk
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    losses = []
    for line in read_lines(directory.parent / "test.jsonl"):
        messages = [one | {"content": "say: " * (one["role"] == "user") + one["content"]} for one in line["messages"]]
        found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
        ids, mask = torch.tensor([found["input_ids"]]), np.array(found["assistant_masks"][1:], bool)
        logits = model(ids).logits[0, :-1]
        losses += np.array(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist())[
            mask
        ].tolist()
    metrics = read_metrics(directory)
    assert metrics["test_token_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert metrics["test_perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert zoo.evaluation.run(directory)["test_token_loss"] == pytest.approx(metrics["test_token_loss"], abs=1e-5)


def test_the_card_of_a_chat_runs(talk, monkeypatch, capsys):
    card = (talk[0] / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and '"say: Wheat shipments rose"' in card
    monkeypatch.chdir(talk[0])
    exec(card.partition("```python\n")[2].partition("```")[0], {})
    assert capsys.readouterr().out.strip()


def test_what_a_shipped_recipe_would_leave_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="runs/gpt2-pretrain-news: not there; this makes it: zoo train gpt2/pretrain-news"
    ):
        run(load_recipe("gpt2/instruct-news"), tmp_path / "run")


def test_a_preview_shows_what_is_learned(talk):
    made = load_recipe(str(talk[0] / "recipe.yaml"))
    assert made.task.packing
    (sample,) = zoo.preview.run(made, "test", 1)
    learned = [token for token in sample["labels"] if token is not None]
    assert " ".join(learned).replace(" ##", "") == "prices rose [SEP] the company said shares fell [SEP]"
    assert sample["tokens"][:2] == ["[CLS]", "<|system|>"] and "<|user|>" in sample["tokens"]


def test_a_stream_of_chats(talk, tiny_bert, tmp_path):
    """Not packed: that is refused, as the lengths of all texts are not known."""
    folder = talk[0].parent
    task = {"type": "instruction-tuning", "max_length": 48}
    made = recipe(tiny_bert, folder, GPT, task, {}, max_steps=2, eval_steps=2, save_steps=2)
    files = {"train": "train.jsonl", "validation": "test.jsonl", "test": "test.jsonl"}
    streamed = made.model_dump() | {
        "data": made.data.model_dump() | {"streaming": True, "files": files, "validation": 3}
    }
    assert math.isfinite(run(Recipe.model_validate(streamed), tmp_path / "run")["eval_token_loss"])
    (tmp_path / "r.yaml").write_text(Recipe.model_validate(streamed).to_yaml())
    with pytest.raises(UserError, match=r"task.packing=true: of a stream the lengths of all texts are not known"):
        load_recipe(str(tmp_path / "r.yaml"), ["task.packing=true"])
