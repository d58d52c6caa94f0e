"""What a chat is: a list of messages, {role, content} each, in TRL's conversational format."""

from collections.abc import Sequence
from typing import Any

ROLES = ("system", "user", "assistant")
Chat = list[dict[str, str]]


def chat_fault(chat: Any, answered: bool) -> str | None:
    """What is wrong with a chat, in words, or None. answered: it must hold an answer; else it must want one."""
    if not isinstance(chat, list) or not all(isinstance(one, dict) for one in chat) or not chat:
        return f"is no list of messages, {{role, content}} each: {str(chat)[:60]!r}"
    for number, message in enumerate(chat):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            return f"has a message ({number}) of the role {role!r}; a role is one of {', '.join(ROLES)}"
        if not isinstance(content, str) or not content.strip():
            held = "empty" if isinstance(content, str) or content is None else f"no text: {str(content)[:60]!r}"
            return f"has a message ({number}, {role}) that is {held}"
    if chat[0]["role"] == "assistant":
        return "begins with an answer; before it stands what is answered"
    if answered and all(message["role"] != "assistant" for message in chat):
        return "has no answer, that is, no message of the role assistant"
    if not answered and chat[-1]["role"] == "assistant":
        return "ends with an answer; leave it out, and it is written anew"
    return None


def with_prefix(prefix: str | None, chat: Sequence[dict[str, str]]) -> Chat:
    """The prefix before what each user says; of a message only its role and content stay."""
    added = {"user": prefix or ""}
    return [{"role": one["role"], "content": added.get(one["role"], "") + one["content"]} for one in chat]
