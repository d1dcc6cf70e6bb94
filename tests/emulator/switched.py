"""Many mutants of a file in one compilation: where the grammar lets it, a line is written so that a call,
`emulated_mutant()` (emulator.cpp), decides at run time whether the line itself or one of its mutants runs. Compiling is
most of what judging a mutant takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Set for a process: the number of the mutant that runs, from 1; without it none does.
NUMBER = "EMULATED_MUTANT"
DECLARATION = 'extern "C" int emulated_mutant();\n#line 1\n'

# Lines of which the parts in groups may vary, and of a statement that may vary as a whole.
CONDITION = re.compile(r"((?:\} else )?(?:if|while) \()(?!.*;)(.*)(\)(?: \{)?)")
LOOP = re.compile(r"for \(([^;]*); ?([^;]*); ?([^;]*)\)((?: \{)?)")
DECLARED = re.compile(r"((?:const )?[\w:]+(?:<[^=;()]*>)?[ *&]+)(\w+ = .*)")
VARIABLE = re.compile(r"(\W*(\w+) = )([^{}]+)")
PLACE = r"[*+-]*[\w.:]+(?:->\w+|\.\w+|<[^;()]*>|\[[^;]*?\])*"  # what is assigned to, or called
STATEMENT = re.compile(rf"(?:{PLACE}(?: ?[-+*/|&^%]?= |\+\+|--|\()|return\b|if \(|for \().*;")
KEYWORDS = re.compile(r"\b(constexpr|static|using|template|struct|extern|case|default|asm|static_assert)\b|auto \[")


@dataclass(frozen=True)
class Line:
    """A line of code as it is compiled."""

    text: str
    numbers: frozenset[int] = frozenset()  # of the mutants that it holds
    names: frozenset[str] = frozenset()  # of the variables that it declares


def balanced(text: str) -> bool:
    return all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}"))


def apart(text: str) -> list[str]:
    """What commas outside of brackets divide."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def chosen(original: str, mutants: Mapping[int, str], form: str = "({})") -> str:
    """An expression of which the mutant that runs decides what it is."""
    text = form.format(original)
    for number, mutated in mutants.items():
        if mutated != original:
            text = f"(emulated_mutant() == {number} ? {form.format(mutated)} : {text})"
    return text


def condition(code: str, mutants: Mapping[int, str]) -> Line | None:
    if (m := CONDITION.fullmatch(code)) is None or not balanced(m[2]):
        return None
    forms = {n: f for n, text in mutants.items() if (f := CONDITION.fullmatch(text))}
    held = {n: f[2] for n, f in forms.items() if (f[1], f[3]) == (m[1], m[3]) and balanced(f[2])}
    return Line(m[1] + chosen(m[2], held) + m[3], frozenset(held))


def declaration(code: str, mutants: Mapping[int, str]) -> Line | None:
    """`code` and the mutants without the semicolon at their ends."""

    def parse(text: str) -> tuple[str, list[re.Match[str]]] | None:
        m = DECLARED.fullmatch(text)
        if m is None or m[1].startswith("return ") or not balanced(text):
            return None
        each = [VARIABLE.fullmatch(part) for part in apart(m[2])]
        return (m[1], each) if all(each) else None

    if (parsed := parse(code)) is None:
        return None
    kind, variables = parsed
    shape = [v[1] for v in variables]
    forms = {
        n: f for n, text in mutants.items() if (f := parse(text)) and f[0] == kind and [v[1] for v in f[1]] == shape
    }
    each = (start + chosen(variables[i][3], {n: f[1][i][3] for n, f in forms.items()}) for i, start in enumerate(shape))
    return Line(kind + ",".join(each), frozenset(forms), frozenset(v[2] for v in variables))


def loop(code: str, mutants: Mapping[int, str]) -> Line | None:
    if (m := LOOP.fullmatch(code)) is None:
        return None
    forms = {n: f for n, text in mutants.items() if (f := LOOP.fullmatch(text)) and f[4] == m[4]}
    first = declaration(m[1], {n: f[1] for n, f in forms.items()}) or Line(m[1])
    held = {n: f for n, f in forms.items() if f[1] == m[1] or n in first.numbers}
    middle = chosen(m[2], {n: f[2] for n, f in held.items()}) if m[2].strip() else ""
    step = chosen(m[3], {n: f[3] for n, f in held.items()}, "void({})") if m[3].strip() else ""
    return Line(f"for ({first.text}; {middle}; {step}){m[4]}", frozenset(held), first.names)


def statement(before: str, code: str, mutants: Mapping[int, str], after: str) -> Line | None:
    """`before` and `after`: the code of the lines around it, for what begins and ends here."""
    if not before.endswith((";", "{", "}", ":", ")")) or not code.endswith(";") or not balanced(code):
        return None
    if not before.endswith(")") and (line := declaration(code[:-1], {n: text[:-1] for n, text in mutants.items()})):
        return Line(line.text + ";", line.numbers, line.names)
    if not STATEMENT.fullmatch(code) or after.startswith("else"):
        return None
    branches = "".join(f"if (emulated_mutant() == {n}) {{ {text} }} else " for n, text in mutants.items())
    return Line(f"{{ {branches}{{ {code} }} }}", frozenset(mutants))


def switched(source: str, mutants: Mapping[int, tuple[int, str]]) -> tuple[str, dict[int, Line]]:
    """(the source with these mutants in it, the lines by their numbers). `mutants`, by numbers of their own: the line,
    from 1, that is changed, and the whole source after the change.
    """
    lines = source.split("\n")
    code = [line.split("//")[0].strip() for line in lines]
    of_line: dict[int, dict[int, str]] = {}
    for number, (at, changed) in mutants.items():
        of_line.setdefault(at, {})[number] = changed.split("\n")[at - 1].split("//")[0].strip()
    real = [i for i, text in enumerate(code, 1) if text and not text.startswith("#")]
    held: dict[int, Line] = {}
    for before, at, after in zip([0, *real], real, [*real[1:], 0], strict=False):
        changes, text = of_line.get(at), code[at - 1]
        if not changes or KEYWORDS.search(text):
            continue
        line = condition(text, changes) or loop(text, changes)
        line = line or statement(code[before - 1] if before else ";", text, changes, code[after - 1] if after else "")
        if line and line.numbers:
            lines[at - 1], held[at] = line.text, line
    return DECLARATION + "\n".join(lines), held


def at_fault(file: str, errors: str, held: Mapping[int, Line]) -> set[int]:
    """The lines, by number, that a compiler's errors speak of: those with one, or else those of variables that no
    longer are constants.
    """
    wrong = {int(n) for n in re.findall(rf"\b{re.escape(file)}:(\d+):\d+: error:", errors)}
    words = set(re.findall(r"\w+", errors))
    return wrong & set(held) or {at for at, line in held.items() if line.names & words}
