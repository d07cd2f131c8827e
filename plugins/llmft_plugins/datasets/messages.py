"""OpenAI-style chats, `{"messages": [{"role": "user", "content": …}, …]}`, in the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmft_core import Conversation, DatasetFormat, Message, Options, Role, RowProblem, SourceOptions, hookimpl
from llmft_plugins.datasets.fields import missing_field, shown_key, wrong_text

llmft_api = 1

FIELD = "messages"
ONLY_TEXT = "only messages of text are trained"
TOOLS = ("tools", "functions")  # what others put beside the messages
MESSAGE_KEYS = ("role", "content", "weight")


class Messages(DatasetFormat):
    """All turns of the assistant are trained, but those with `"weight": 0`. What a chat may be is the template's to
    say: whether there is a system message, whether turns alternate."""

    name: ClassVar[str] = "messages"
    summary: ClassVar[str] = "chats as lists of role and content, written in the model's own chat template"
    options_type: ClassVar[type[Options]] = SourceOptions
    keys: ClassVar[tuple[str, ...]] = (FIELD, *TOOLS)
    roles = (
        Role("system", served_as="system"),
        Role("user", served_as="user"),
        Role("assistant", trained=True, served_as="assistant"),
    )

    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        for key in TOOLS:
            if row.get(key):
                return RowProblem(key, f"is of no use here: {ONLY_TEXT}; remove it")
        if problem := missing_field(row, [FIELD]):
            return problem
        given = row[FIELD]
        if not isinstance(given, list):
            return RowProblem(FIELD, f"is {type(given).__name__}, not a list of messages")
        messages: list[Message] = []
        for index, entry in enumerate(given):
            message = self._message(entry, f"{FIELD}[{index}]")
            if isinstance(message, RowProblem):
                return message
            messages.append(message)
        if not messages:
            return RowProblem(FIELD, "is empty")
        if messages[-1].role != "assistant":
            return RowProblem(FIELD, f"ends with a message of the {messages[-1].role}, which nothing answers")
        return Conversation(tuple(messages), template=True)

    def _message(self, entry: Any, field: str) -> Message | RowProblem:
        if not isinstance(entry, Mapping):
            return RowProblem(field, f"is {type(entry).__name__}, not an object with role and content")
        role = entry.get("role")
        if role in ("tool", "function") or any(entry.get(key) for key in ("tool_calls", "function_call")):
            return RowProblem(field, f"is a call of a tool or its result: {ONLY_TEXT}; remove such rows")
        known = [each.name for each in self.roles]
        if not isinstance(role, str) or role not in known:
            said = f"is {shown_key(str(role))}" if "role" in entry else "is missing"
            return RowProblem(f"{field}.role", f"{said}; there are {', '.join(known)}")
        content = entry.get("content")
        if isinstance(content, list):
            return RowProblem(f"{field}.content", f"is a list of parts: {ONLY_TEXT}; join the parts to one text")
        if problem := wrong_text(content, f"{field}.content"):
            return problem if "content" in entry else RowProblem(f"{field}.content", "is missing")
        for key in entry:
            # Loggers write null for what a message does not have.
            if key not in MESSAGE_KEYS and entry[key] is not None:
                return RowProblem(f"{field}.{shown_key(key)}", f"is unknown; a message has {', '.join(MESSAGE_KEYS)}")
        weight = entry.get("weight")
        if not (weight is None or (isinstance(weight, int) and weight in (0, 1))):
            return RowProblem(f"{field}.weight", f"is {weight!r}; it is 1 (trained) or 0 (not trained)")
        return Message(role, str(content), trained=role == "assistant" and weight != 0)


@hookimpl
def llmft_dataset_formats() -> list[type[DatasetFormat]]:
    return [Messages]
