"""Instruction tuning: the answers of chats, each given what stands before it (InstructGPT, arXiv 2203.02155, section
3.2), in TRL's conversational and prompt-completion formats."""

import json
import re
from functools import partial
from itertools import pairwise
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, TextGenerationPipeline

from zoo.chats import ROLES, Chat, chat_fault, with_prefix
from zoo.errors import UserError
from zoo.sections import TaskSection
from zoo.task_types import TASK_TYPES
from zoo.tasks.base import IGNORED, Rows, Task, ask_text, check_length
from zoo.tasks.text_generation import LOSS_METRICS, collate_next_tokens, loss_metrics, token_losses, written

# for a tokenizer without one: each message behind a special token of its role, an answer ending as a text does
TEMPLATE = """{{{{ {begin} }}}}{{% for message in messages %}}{{{{ '<|' + message['role'] + '|>' }}}}\
{{% if message['role'] == 'assistant' %}}{{% generation %}}{{{{ message['content'] + {end} }}}}{{% endgeneration %}}\
{{% else %}}{{{{ message['content'] }}}}{{% endif %}}{{% endfor %}}\
{{% if add_generation_prompt %}}{{{{ '<|assistant|>' }}}}{{% endif %}}"""
MARKED = re.compile(r"{%-?\s*generation\s*-?%}")


def give_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Puts TEMPLATE and its special tokens on a tokenizer. A chat begins and ends as its texts do. Raises UserError."""
    end = tokenizer.eos_token or tokenizer.sep_token
    if end is None:
        raise UserError("model: its tokenizer has no token that could end an answer; save it with an eos_token")
    first = [one for one in tokenizer("")["input_ids"][:1] if one in (tokenizer.cls_token_id, tokenizer.bos_token_id)]
    begin, quoted = tokenizer.decode(first), partial(json.dumps, ensure_ascii=False)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [f"<|{role}|>" for role in ROLES]}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = TEMPLATE.format(begin=quoted(begin), end=quoted(end))
    print(f"the tokenizer has no chat template: it gets one, in which {end} ends an answer, and is saved so")


def chat_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat, ask: bool = False) -> list[int]:
    """A chat by the tokenizer's template; ask: up to where an answer begins.

    What a message says is text: a special token that it spells is none. Raises ValueError where the template refuses.
    """
    try:
        found: Any = tokenizer.apply_chat_template(chat, sanitize_control_tokens=True, add_generation_prompt=ask)
        return found["input_ids"]
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template of the tokenizer refuses it: {error}") from error


def with_answers(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[list[int], list[bool]]:
    """(ids, whether each is part of an answer, the token that ends it included).

    By the template's own {% generation %}, where that has found every answer and no message spells a special token;
    else by lengths: what a chat that ends with the answer has more than one that asks for it. Raises ValueError.
    """
    ids = chat_ids(tokenizer, chat)
    answers = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    if MARKED.search(str(tokenizer.get_chat_template())):
        marked: Any = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
        mask = [bool(one) for one in marked["assistant_masks"]]
        begun = sum(later and not earlier for earlier, later in pairwise([False, *mask]))
        # answers in a row may be one to the template
        apart = sum(number - 1 not in answers for number in answers)
        if marked["input_ids"] == ids and begun >= apart:
            return ids, mask
    mask = [False] * len(ids)
    for number in answers:
        before, whole = chat_ids(tokenizer, chat[:number], ask=True), chat_ids(tokenizer, chat[: number + 1])
        if ids[: len(before)] != before or ids[: len(whole)] != whole:
            raise ValueError(
                "by the chat template of the tokenizer what asks for an answer is not how the answered chat begins, so "
                "that answers cannot be told apart; mark them in it, {% generation %} ... {% endgeneration %}"
            )
        mask[len(before) : len(whole)] = [True] * (len(whole) - len(before))
    return ids, mask


def prepare(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Sees to a chat template; returns for `generate` the special tokens behind an answer. Raises UserError."""
    if tokenizer.chat_template is None:
        give_template(tokenizer)
    try:
        ids, mask = with_answers(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    known = tokenizer.added_tokens_decoder
    ends = [one for one, learned in zip(ids, mask, strict=True) if learned and one in known and known[one].special]
    if not ends:
        raise UserError(
            "model: the chat template of its tokenizer has no special token at the end of an answer, or leaves it out "
            "of {% generation %}: writing would never stop; write one there"
        )
    return {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def _chats(rows: Rows) -> list[Chat]:
    if "messages" in rows:
        return rows["messages"]
    pairs = zip(rows["prompt"], rows["completion"], strict=True)
    return [[{"role": "user", "content": one}, {"role": "assistant", "content": other}] for one, other in pairs]


def _encode(tokenizer: PreTrainedTokenizerBase, section: TaskSection):
    """Each chat, cut at its end; one of which no answer is left is left out."""

    def encode(rows: Rows) -> Rows:
        names = ("input_ids", "attention_mask", "labels", "row", "truncated", "unknown", "tokens", "learned")
        found: Rows = {name: [] for name in names}
        for row, chat in zip(rows["row"], _chats(rows), strict=True):
            try:
                whole, mask = with_answers(tokenizer, with_prefix(section.prefix, chat))
            except ValueError as error:
                raise UserError(f"data: row {row}: {error}") from error
            ids = whole[: section.max_length]
            # nothing stands before the first token, so that it is no label
            labels = [one if answer and n else IGNORED for n, (one, answer) in enumerate(zip(ids, mask, strict=False))]
            learned = sum(answer for answer in mask[1 : len(ids)])
            if not learned:
                continue
            unknown = 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
            values = (ids, [1] * len(ids), labels, row, len(ids) < len(whole), unknown, len(ids), learned)
            for name, value in zip(names, values, strict=True):
                found[name].append(value)
        return found

    return encode


def _counts(encoded: Dataset, texts: int, section: TaskSection) -> str:
    if len(encoded) == 0:
        raise UserError(f"task.max_length: {section.max_length}, but no chat has an answer by then; give more")
    cut_off, unknown, tokens, learned = (sum(encoded[name]) for name in ("truncated", "unknown", "tokens", "learned"))
    left_out = texts - len(encoded)
    words = f"{texts:,} chats; {cut_off:,} cut at {section.max_length} tokens, {left_out:,} left out whose answers are "
    return f"{words}behind the cut; {learned:,} of {tokens:,} tokens are answers, {unknown:,} unknown"


def _ask(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> Chat:
    if "messages" in row and (fault := chat_fault(row["messages"], answered=False)):
        raise UserError(f"predict: chat {number} {fault}")
    # the prefix comes with the recipe
    asked = row.get("messages") or [{"role": "user", "content": ask_text({"text": row["prompt"]}, number, tokenizer)}]
    chat = with_prefix(None, asked)
    try:
        chat_ids(tokenizer, chat, ask=True)
    except ValueError as error:
        raise UserError(f"predict: chat {number}: {error}") from error
    return chat


def _pipeline(section: TaskSection):
    plain = {"sanitize_control_tokens": True}
    return TextGenerationPipeline, {"return_full_text": False, "tokenizer_encode_kwargs": plain}


USAGE = """from transformers import pipeline

pipe = pipeline("text-generation", "."{trusted})
messages = [{{"role": "user", "content": "{prefix}Wheat shipments rose"}}]
print(pipe(messages)[0]["generated_text"][-1]["content"])"""

INSTRUCTION_TUNING = Task(
    name="instruction-tuning",
    auto_class="AutoModelForCausalLM",
    roles=TASK_TYPES["instruction-tuning"].roles,
    labels=None,
    prepare=prepare,
    encode=_encode,
    counts=_counts,
    check=check_length,
    collate=collate_next_tokens,
    metrics=loss_metrics,
    metric_names=LOSS_METRICS,
    reduce=token_losses,
    asked=("prompt", "messages"),
    ask=_ask,
    pipeline=_pipeline,
    answer=written,
    usage=USAGE,
    tag="text-generation",
)
