"""One line out of a parser's many: the key, what is wrong with it, and the nearest right name."""

import difflib
import inspect
import re
import sys
from collections.abc import Iterable

OURS = ("models", "data", "trainer")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean `this`?" for the known name nearest to a word, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line; a reading process's comes with its traceback, of which the last line counts."""
    text = str(error)
    if text.startswith("Caught ") and " in DataLoader worker process" in text:
        text = re.split(r"\n[\w.]+: ", text)[-1]
    return re.sub(r"\s*\n\s*", " ", text).strip()


def classes() -> list[str]:
    """Return the short class names that a configuration can use: ours, and torch's optimizers and schedules."""
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] in OURS or name.startswith("torch.optim")]
    return sorted({name for module in modules for name, thing in vars(module).items() if inspect.isclass(thing)})


def explain(error: BaseException, options: Iterable[str]) -> str:
    """Return what jsonargparse means: it reports a typo as the failure of every type that it tried.

    Args:
        error: its error.
        options: the parser's option names, dotted.
    """
    text, options = one_line(error), list(options)
    path = ".".join(re.findall(r'Parser key "([\w.]+)"', text))
    where = f"{path}: " if path else ""
    if found := re.search(r"unrecognized arguments: (.*)", text):
        word = next((part for part in found[1].split() if part.startswith("-")), found[1]).partition("=")[0].lstrip("-")
        return f"no option `{word}`{nearest(word, options)}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text):
        word = f"{found[1]}.{found[2]}"
        return f"no option `{word}`{nearest(word, options)}"
    if found := re.search(r"class_path '([\w.]+)': Option '([\w.]+)' is not accepted", text):
        module, _, name = found[1].rpartition(".")
        known = inspect.signature(getattr(sys.modules[module], name)).parameters
        return f"{where}{name} has no `{found[2]}`{nearest(found[2], known) or '; it takes ' + ', '.join(known)}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", text):
        word = found[1]
        tops = {option.partition(".")[0] for option in options}
        top, _, rest = word.partition(".")
        return f"no option `{word}`{nearest(word, options) or nearest(top, tops)}"
    if found := re.search(r"Expected a dot import path string: ([\w.]+)", text):
        return f"{where}no class `{found[1]}`{nearest(found[1], classes())}"
    if raised := re.search(r"Errors: - (?!Does not validate|Problem with|Expected|Parser key)(.*?) - Expected a", text):
        return f"{where}{raised[1]}"
    if causes := re.findall(r"class_path '([\w.]+)': (?!Parser key|Option)(.*?)(?: - Expected a| Given value|$)", text):
        return f"{where}{causes[-1][0].rpartition('.')[2]}: {causes[-1][1]}"
    return text.partition(" Given value type: <class 'dict'>")[0]
