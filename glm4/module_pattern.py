r"""Regular expressions over names of modules, matched without backtracking.

They come with a checkpoint, and one such as (a+)+$ keeps `re` busy for ever. Here an expression is
a graph of states, and a set of places in the name, a bit for each, goes through it. A state passes
on only places that are new to it, so the time is at most states times places:

    text ab       places where an "a" stands, moved by one; of them those with a "b", moved by one
    one [0-9]     likewise, for any character of a class
    span .*       all that can be reached from a place through characters of the class
    split         to two states or more
    at ^          of the places those at which an assertion holds
    look (?!...)  of the places those from which another graph does (not) reach its end

Read are literals, classes, groups, alternatives, repeats (lazy ones too), ^ $ \A \Z \b \B and
lookahead. What checkpoints do without is refused: references, lookbehind, flags, named groups.
"""

from __future__ import annotations

import re
from functools import cached_property
from itertools import groupby
from typing import Any

# Parts of one expression after its repeats are written out, and groups within groups.
SIZE_LIMIT = 1000
LENGTH_LIMIT = 100_000  # characters of one expression
DEPTH_LIMIT = 50
REPEAT = re.compile(r"[*+?]|\{(\d+)\}|\{(\d*),(\d*)\}")
ASSERTIONS = {"^": "^", "$": "$", r"\A": "^", r"\Z": r"\Z", r"\b": r"\b", r"\B": r"\B"}

Node = tuple[Any, ...]  # what it is, and its parts
State = tuple[Any, ...]  # what it is, its argument, the states that follow


class Name:
    """A name as sets of places: bit i is the place before its character i."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.all = (2 << len(text)) - 1
        self.places: dict[str, int] = {}
        for i, character in enumerate(text):
            self.places[character] = self.places.get(character, 0) | 1 << i
        self.classes: dict[re.Pattern[str], int] = {}

    def of_class(self, one: re.Pattern[str]) -> int:
        if one not in self.classes:
            found = (places for c, places in self.places.items() if one.match(c))
            self.classes[one] = sum(found)
        return self.classes[one]

    @cached_property
    def assertions(self) -> dict[str, int]:
        end = 1 << len(self.text)
        words = self.of_class(re.compile(r"\w"))
        boundary = words ^ words << 1
        newline = end >> 1 if self.text.endswith("\n") else 0
        not_boundary = self.all & ~boundary if self.text else 0
        return {"^": 1, "$": end | newline, r"\Z": end, r"\b": boundary, r"\B": not_boundary}


class ModulePattern:
    """`re.match(source, name)`, as far as a true or false goes."""

    def __init__(self, source: str) -> None:
        """Raises ValueError if `source` is no regular expression, or not one that is read here."""
        if len(source) > LENGTH_LIMIT:
            raise ValueError(f"has {len(source):,} characters, at most {LENGTH_LIMIT:,} are read")
        self.source = source
        self.at = self.depth = self.size = 0
        tree = self.alternatives()
        if self.at < len(source):
            raise ValueError(f"unbalanced parenthesis at position {self.at}")
        self.states: list[State] = [("end",)]
        self.start = self.add(tree, 0)

    def matches(self, name: Name) -> bool:
        return self.reaches_end(self.start, 1, name, {})

    def reaches_end(self, start: int, places: int, name: Name, looks: dict[Any, bool]) -> bool:
        """Whether the end can be reached from any of `places` at state `start`; `looks` remembers
        what each lookahead found at each place."""
        done: dict[int, int] = {}
        pending = [(start, places)]
        while pending:
            state, places = pending.pop()
            places &= ~done.get(state, 0)
            if not places:
                continue
            done[state] = done.get(state, 0) | places
            kind, *arguments = self.states[state]
            if kind == "end":
                return True
            if kind == "split":
                pending.extend((follower, places) for follower in arguments)
                continue
            argument, follower = arguments
            if kind == "text":
                for character in argument:
                    places = (places & name.places.get(character, 0)) << 1
                    if not places:
                        break
            elif kind == "one":
                places = (places & name.of_class(argument)) << 1
            elif kind == "span":
                # A carry runs through the characters of the class that follow each other.
                inside = name.of_class(argument)
                places |= ((places & inside) + inside) ^ inside
            elif kind == "at":
                places &= name.assertions[argument]
            else:
                places = self.look(state, places, name, looks)
            pending.append((follower, places))
        return False

    def look(self, state: int, places: int, name: Name, looks: dict[Any, bool]) -> int:
        _, (start, wanted), _ = self.states[state]
        kept = 0
        for i in range(places.bit_length()):
            if places >> i & 1:
                if (state, i) not in looks:
                    looks[state, i] = self.reaches_end(start, 1 << i, name, looks)
                kept |= (looks[state, i] == wanted) << i
        return kept

    def add(self, node: Node, follower: int) -> int:
        """The state at which `node` begins, after which comes `follower`."""
        self.size += 1
        if self.size > SIZE_LIMIT:
            raise ValueError(f"has more than {SIZE_LIMIT} parts")
        kind, *parts = node
        if kind == "sequence":
            for part in reversed(parts):
                follower = self.add(part, follower)
            return follower
        if kind == "alternatives":
            return self.state("split", *(self.add(part, follower) for part in parts))
        if kind == "look":
            inner, wanted = parts
            return self.state("look", (self.add(inner, 0), wanted), follower)
        if kind != "repeat":
            return self.state(kind, *parts, follower)
        body, least, most = parts
        if most is None:
            follower = self.loop(body, follower)
        for _ in range(0 if most is None else most - least):
            follower = self.state("split", self.add(body, follower), follower)
        for _ in range(least):
            follower = self.add(body, follower)
        return follower

    def loop(self, body: Node, follower: int) -> int:
        if body[0] == "one":
            return self.state("span", body[1], follower)
        loop = self.state("split")
        self.states[loop] = ("split", self.add(body, loop), follower)
        return loop

    def state(self, *state: Any) -> int:
        self.states.append(state)
        return len(self.states) - 1

    def alternatives(self) -> Node:
        """Reads up to the end or to the parenthesis that closes."""
        branches = [self.sequence()]
        while self.take("|"):
            branches.append(self.sequence())
        return branches[0] if len(branches) == 1 else ("alternatives", *branches)

    def sequence(self) -> Node:
        parts: list[Node] = []
        while self.at < len(self.source) and self.source[self.at] not in "|)":
            parts.append(self.repeated(self.atom()))
        joined: list[Node] = []
        for is_text, run in groupby(parts, lambda part: part[0] == "text"):
            nodes = list(run)
            joined += [("text", "".join(text for _, text in nodes))] if is_text else nodes
        return ("sequence", *joined)

    def repeated(self, atom: Node) -> Node:
        found = REPEAT.match(self.source, self.at)
        if found is None:
            return atom
        if atom[0] in ("at", "look") or atom == ("sequence",):
            raise ValueError(f"nothing to repeat at position {self.at}")
        self.at = found.end()
        self.take("?")  # lazy: the same names
        if REPEAT.match(self.source, self.at):
            raise ValueError(f"multiple repeat at position {self.at}")
        if found[0] in "*+?":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[0]]
        else:
            exactly, low, high = found.groups()
            if max(map(len, (exactly or "", low or "", high or ""))) > 9:
                raise ValueError(f"has more than {SIZE_LIMIT} parts")
            least = int(exactly or low or 0)
            most = least if exactly else int(high) if high else None
            if most is not None and most < least:
                raise ValueError("min repeat greater than max repeat")
        if atom[0] == "text":
            atom = ("one", re.compile(re.escape(atom[1])))
        return ("repeat", atom, least, most)

    def atom(self) -> Node:
        start = self.at
        self.at += 1
        character = self.source[start]
        if character == "(":
            return self.group()
        if character == "\\":
            self.at += 1
        elif character == "[":
            # A bracket that closes at once is one of the class.
            found = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL).match(self.source, start)
            if found is None:
                raise ValueError(f"unterminated character set at position {start}")
            self.at = found.end()
        elif REPEAT.match(self.source, start):
            raise ValueError(f"nothing to repeat at position {start}")
        text = self.source[start : self.at]
        if text in ASSERTIONS:
            return ("at", ASSERTIONS[text])
        if character == "\\" and len(text) == 2 and not text[1].isalnum():
            return ("text", text[1])
        if character not in "\\[.":
            return ("text", text)
        if re.match(r"\\[0-9xuUN]", text):
            raise ValueError(f"references and numbers of characters are not read, got {text}")
        try:
            return ("one", re.compile(text))
        except (re.error, OverflowError) as error:
            raise ValueError(f"{error}, in {text[:40]}") from None

    def group(self) -> Node:
        start = self.at - 1
        look = next((mark for mark in ("?=", "?!") if self.take(mark)), None)
        if look is None and not self.take("?:") and self.source.startswith("?", self.at):
            raise ValueError(f"only (...), (?:...), (?=...) and (?!...) are read, at {start}")
        self.depth += 1
        if self.depth > DEPTH_LIMIT:
            raise ValueError(f"more than {DEPTH_LIMIT} groups within each other")
        inner = self.alternatives()
        self.depth -= 1
        if not self.take(")"):
            raise ValueError(f"missing ), unterminated subpattern at position {start}")
        return inner if look is None else ("look", inner, look == "?=")

    def take(self, text: str) -> bool:
        found = self.source.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found
