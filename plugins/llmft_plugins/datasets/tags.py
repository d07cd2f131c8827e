"""tokens.json → which tags open and close which role, and which stand alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmft_core import InputError, Role

EXAMPLE = '{"tokens": ["<USER>", "</USER>", "<ASSISTANT>", "</ASSISTANT>"]}'
KEYS = ("tokens", "single", "roles")
PAIRED_WORDS = (("start", "end"), ("begin", "end"), ("open", "close"))

# What a role is called by people: a role of one of these names answers, asks or instructs.
ANSWERS = ("assistant", "answer", "a", "bot", "model", "gpt", "ai", "response", "completion", "output")
QUESTIONS = ("user", "question", "q", "human", "prompt", "instruction", "input", "client", "customer")
SYSTEMS = ("system", "sys")


@dataclass(frozen=True)
class Tags:
    """What tokens.json declares. `tokens` in its order, which is the order of their ids."""

    tokens: tuple[str, ...]
    roles: tuple[Role, ...]
    single: tuple[str, ...]


def read_tags(content: bytes) -> Tags:
    """The declarations of a tokens.json. Raises InputError with what is wrong in it."""
    data = _json_object(content)
    tokens = _tokens(data)
    single = _listed(data.get("single", []), "single", tokens)
    given = _given_roles(data.get("roles", {}), tokens)
    taken = {tag for tags in given.values() for tag in tags}
    if both := sorted(taken & set(single)):
        raise InputError(f"{both[0]} is declared under roles and under single: leave one of them out")
    found = derive_roles([token for token in tokens if token not in taken and token not in single])
    for name in found:
        if name in given:
            raise InputError(f"roles: {name} is declared there and derived from {found[name][0]}: rename one of them")
    order = {token: index for index, token in enumerate(tokens)}
    pairs = dict(sorted((given | found).items(), key=lambda item: order[item[1][0]]))
    if not pairs:
        raise InputError(f"no role can be made of {', '.join(tokens)}: write pairs of tags, as in {EXAMPLE}")
    return Tags(tokens, _with_meaning(pairs), single)


def derive_roles(tokens: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Role → its opening and closing tag, from the names alone. Raises InputError for a tag without its partner, or
    with several.

    >>> derive_roles(["<USER>", "</USER>", "<START_A>", "<END_A>"])
    {'USER': ('<USER>', '</USER>'), 'A': ('<START_A>', '<END_A>')}
    """
    roles: dict[str, tuple[str, str]] = {}
    alone = dict.fromkeys(tokens)
    for opening in tokens:
        closings = [closing for closing in dict.fromkeys(_closings(opening)) if closing in tokens]
        if len(closings) > 1:
            raise InputError(f"{opening} may be closed by {' and '.join(closings)}: say which under roles")
        if closings:
            name = role_name(opening)
            if name in roles:
                raise InputError(f"{roles[name][0]} and {opening} would both be the role {name}: name them under roles")
            roles[name] = (opening, closings[0])
            alone.pop(opening, None)
            alone.pop(closings[0], None)
    if alone:
        token = next(iter(alone))
        partner = next(_closings(token), "a closing tag")
        raise InputError(
            f"{token} has no partner (such as {partner}): add it to tokens, declare {token} as one that stands alone "
            f'with "single": [{json.dumps(token, ensure_ascii=False)}], or name the pair with "roles": '
            '{"ROLE": ["OPENING", "CLOSING"]}'
        )
    return roles


def role_name(opening: str) -> str:
    """`<USER>` → USER, `<START_Q>` → Q, `<|im_start|>` → im."""
    bare = re.sub(r"^\W+|\W+$", "", opening)
    words = "|".join(start for start, _ in PAIRED_WORDS)
    short = re.sub(rf"(?i)(?<![^\W_])({words})(?![^\W_])", "", bare)
    return re.sub(r"^[\W_]+|[\W_]+$", "", short) or bare


def _closings(opening: str) -> Iterator[str]:
    """The tags that would close this one, by its name."""
    first = re.search(r"\w", opening)
    if first is None or "/" in opening[: first.start()]:
        return
    yield opening[: first.start()] + "/" + opening[first.start() :]
    if first.start() > 1:
        yield opening[0] + "/" + opening[1:]  # <|user|> and </|user|>
    for start, end in PAIRED_WORDS:
        for found in re.finditer(rf"(?i)(?<![^\W_]){start}(?![^\W_])", opening):
            word = found.group()
            closing = end.upper() if word.isupper() else end.capitalize() if word[0].isupper() else end
            yield opening[: found.start()] + closing + opening[found.end() :]


def _with_meaning(pairs: Mapping[str, tuple[str, str]]) -> tuple[Role, ...]:
    """The role that answers is trained, where just one is called so, or where there is just one."""

    def only(names: Sequence[str]) -> str:
        found = [name for name in pairs if name.casefold() in names]
        return found[0] if len(found) == 1 else ""

    trained = next(iter(pairs)) if len(pairs) == 1 else only(ANSWERS)
    served = {only(ANSWERS): "assistant", only(QUESTIONS): "user", only(SYSTEMS): "system"}
    return tuple(
        Role(name, opening, closing, trained=name == trained, served_as=served.get(name, ""))
        for name, (opening, closing) in pairs.items()
    )


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.start + 1}): save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"line {error.lineno}: is not valid JSON: {error.msg} (column {error.colno}); write {EXAMPLE}"
        ) from None
    except RecursionError:
        raise InputError(f"is nested too deeply; write {EXAMPLE}") from None
    if not isinstance(data, dict) or "tokens" not in data:
        raise InputError(f"has no tokens; write {EXAMPLE}")
    if unknown := [key for key in data if key not in KEYS]:
        raise InputError(f"{unknown[0]}: no such key; there are {', '.join(KEYS)}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise InputError(f"{twice[0]} is given twice")
    return dict(pairs)


def _tokens(data: Mapping[str, Any]) -> tuple[str, ...]:
    tokens = _strings(data["tokens"], "tokens")
    if not tokens:
        raise InputError(f"tokens is empty; write {EXAMPLE}")
    for token in tokens:
        if not token or token != token.strip() or not token.isprintable():
            raise InputError(f"tokens: {token!r} is no tag: it is empty, or has spaces around it, or unprintable signs")
        if tokens.count(token) > 1:
            raise InputError(f"tokens: {token} is given twice")
    return tokens


def _listed(value: Any, key: str, tokens: Sequence[str]) -> tuple[str, ...]:
    names = _strings(value, key)
    for name in names:
        if name not in tokens:
            raise InputError(f"{key}: {name} is not among the tokens: add it to them")
    return names


def _strings(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f'{key} is no list of texts; write "{key}": ["<USER>", …]')
    return tuple(value)


def _given_roles(value: Any, tokens: Sequence[str]) -> dict[str, tuple[str, str]]:
    if not isinstance(value, dict):
        raise InputError('roles is no object; write "roles": {"ROLE": ["OPENING", "CLOSING"]}')
    roles: dict[str, tuple[str, str]] = {}
    for name, pair in value.items():
        if not name.strip() or name != name.strip() or "," in name or not name.isprintable():
            raise InputError(f"roles: {name!r} cannot be written as --data.train-on ROLE: rename it")
        tags = _listed(pair, f"roles: {name}", tokens)
        if len(tags) != 2:
            raise InputError(f'roles: {name} needs two tags; write "{name}": ["OPENING", "CLOSING"]')
        roles[name] = (tags[0], tags[1])
    openings = Counter(opening for opening, _ in roles.values())
    closings = {closing for _, closing in roles.values()}
    for name, (opening, _) in roles.items():
        if openings[opening] > 1 or opening in closings:
            raise InputError(f"roles: {name}: {opening} must open this role and nothing else")
    return roles
