"""Turns a parser's long message into one line: the key, the problem, the nearest right name."""

import difflib
import inspect
import re
import sys
from collections.abc import Iterable

MAX_LINE_LENGTH = 1000  # characters
COMPONENT_PACKAGES = ("models", "data", "trainer")
MIN_SIMILARITY = 0.6  # of a name that is suggested, from 0 to 1
# What jsonargparse writes of a class that is built later: an optimizer or a schedule.
BUILT_LATER = re.compile(
    r"Type typing\.Callable\[.*?\] expects a function or a callable class: (.*?)"
    r"(?:\. Got value: | - Expected a .*?Given value: )Namespace\(class_path='([\w.]+)'.*"
)


def nearest(word: str, names: Iterable[str]) -> str:
    """Return "; did you mean `NAME`?" for the name most similar to a word, or "" if none is."""
    similar = difflib.get_close_matches(word, list(names), 1, MIN_SIMILARITY)
    return f"; did you mean `{similar[0]}`?" if similar else ""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line.

    Of an error from a worker process, which contains a traceback, only the last line is kept.
    """
    text = str(error).strip()
    if isinstance(error, OSError) and error.filename and error.strerror and not error.filename2:
        text = f"{error.filename}: {error.strerror}"
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    text = re.sub(r"\s*\n\s*", " ", text)
    return text if len(text) < MAX_LINE_LENGTH else f"{text[:MAX_LINE_LENGTH]}..."


def component_names() -> list[str]:
    """Return the class names that a configuration can use: this project's and torch.optim's."""
    names = set()
    for module_name, module in sys.modules.items():
        is_component = module_name.split(".")[0] in COMPONENT_PACKAGES
        if is_component or module_name.startswith("torch.optim"):
            names |= {name for name, value in vars(module).items() if inspect.isclass(value)}
    return sorted(names)


def explain(error: BaseException, options: Iterable[str]) -> str:
    """Return the cause of a jsonargparse error as one line.

    jsonargparse tries every type that an option may have, and reports a typo as the failure of
    them all. The cause is found in its text.

    Args:
        error: an error of jsonargparse.
        options: the parser's option names, with dots.
    """
    text = BUILT_LATER.sub(r"class_path '\2': \1 - Expected a", one_line(error))
    text = re.sub(r" - Not a valid subclass of .*?\(implicit class_path\)\.?", "", text)
    options = list(options)
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', text))
    prefix = f"{key}: " if key else ""

    # an argument that a class does not have
    found = re.search(r"class_path '([\w.]+)': (?:Option '|unrecognized arguments: --)(\w+)", text)
    if found:
        module, _, class_name = found[1].rpartition(".")
        parameters = inspect.signature(getattr(sys.modules[module], class_name)).parameters
        hint = nearest(found[2], parameters) or f"; it takes {', '.join(parameters)}"
        return f"{prefix}{class_name} has no `{found[2]}`{hint}"

    # an option that does not exist
    found = re.search(r"unrecognized arguments: (.*)", text)
    if found:
        words = found[1].split()
        dashed = [word for word in words if word.startswith("-")]
        name = (dashed or words)[0].partition("=")[0].lstrip("-")
        return f"no option `{name}`{nearest(name, options)}"
    found = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
    if found:
        name = f"{found[1]}.{found[2]}"
        return f"no option `{name}`{nearest(name, options)}"

    found = re.search(r"Option '([\w.]+)' is not accepted", text)
    if found:
        name = found[1]
        groups = {option.partition(".")[0] for option in options}
        hint = nearest(name, options) or nearest(name.partition(".")[0], groups)
        return f"no option `{name}`{hint}"

    # a value of another type
    found = re.search(
        r"Expected a <class '(int|float|bool|tuple|list)'>"
        r"(?:\. Got value:| - Expected a dot import path string:) (.+?)(?:\. Got | - | Given |$)",
        text,
    )
    if found:
        return f"{prefix}{found[2]} is not of type {found[1]}"

    # a class that does not exist
    found = re.search(r"Expected a dot import path string: ([\w.]+)", text)
    if found:
        return f"{prefix}no class `{found[1]}`{nearest(found[1], component_names())}"

    # something that is no class of the right kind
    found = re.search(r"Expected '([\w.]+)' to be (.*?)\.? - Expected a", text)
    if found:
        return f"{prefix}`{found[1]}` is not {found[2]}"

    # a constructor that refused its arguments
    found = re.search(
        r"Errors: - (?!Does not validate|Problem with|Expected|Parser key|class_path)(.*?)"
        r" - Expected a",
        text,
    )
    if found:
        return f"{prefix}{found[1]}"
    causes = re.findall(
        r"class_path '([\w.]+)': (?!Parser key|Option)(.*?)(?: - Expected a| Given value|$)", text
    )
    if causes:
        class_path, cause = causes[-1]
        return f"{prefix}{class_path.rpartition('.')[2]}: {cause}"

    # a value that is none of the choices
    given = re.search(r"(?:Got|Given) value: (.+?)(?: Given value| - Expected|$)", text)
    literals = re.findall(r"typing\.Literal\[(.*?)\]", text)
    if given and literals:
        choices = dict.fromkeys(re.findall(r"'(.*?)'", " ".join(literals)))
        hint = nearest(given[1], choices) or f"; it must be one of {', '.join(choices)}"
        return f"{prefix}no choice `{given[1]}`{hint}"

    # a value that is no list
    if given and "Expected a <class 'list'>" in text:
        return f"{prefix}{given[1]} is not a list; write it in one word, [1,2] for example"

    # a value of another type, of a class's argument
    found = re.search(
        r"Expected a <class '(int|float|bool)'>"
        r" Given value type: <class '\w+'> Given value: (.+?)(?: - |$)",
        text,
    )
    if found:
        return f"{prefix}{found[2]} is not of type {found[1]}"

    # anything else
    return text.partition(" Given value type: <class 'dict'>")[0]
