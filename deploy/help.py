"""The help of a verb, read from the source of its function.

Nothing of the verb is imported, because torch alone takes seconds to import.
"""

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent  # folder of our packages
VALUE_NAMES = {"Path": "PATH", "int": "INT", "float": "FLOAT", "str": "TEXT", "bool": "BOOL"}
WIDEST = 100  # characters of a line, at most
TEXT_COLUMN = 30  # at which an option's description begins
BOOL_HELP = "A BOOL may be omitted: `--NAME` means `--NAME true`."
LIST_HELP = "A list is one word: `--NAME [1,2]`, or in quotes `--NAME '[1, 2]'`."


class Definition(NamedTuple):
    """A statement that defines a name, and the module that it is in."""

    module: str
    node: ast.stmt


class Option(NamedTuple):
    """An option of a verb."""

    name: str
    annotation: ast.expr  # with aliases replaced by the types that they mean
    default: ast.expr | None  # None: the option is required
    description: str


class OptionGroup(NamedTuple):
    """Options that are listed together."""

    title: str
    options: list[Option]


def format_help(
    verb: str, module: str, name: str, positional: str = "", see_also: Sequence[str] = ()
) -> str:
    """Return the help of a verb.

    Args:
        verb: the verb.
        module: module of its function.
        name: name of its function.
        positional: the option that has no name.
        see_also: verbs that begin with this verb's word.
    """
    definition = find_definition(module, name)
    assert definition, f"{module} has no {name}"
    groups = read_groups(definition)
    options = [option for group in groups for option in group.options]

    # What it does
    required = [format_head(option, positional) for option in options if option.default is None]
    description, _, _ = read_docstring(definition.node).partition("\n\nArgs:")
    usage = ["usage: rectify", verb, *required]
    if len(options) > len(required):
        usage.append("[options]")
    if verb == "spread":  # its command is all that follows two dashes
        usage = ["usage: rectify spread [options] --", *required]
    lines = [" ".join(usage), "", description]

    # Its options
    width = min(WIDEST, shutil.get_terminal_size().columns)
    for title, members in groups:
        lines += ["", f"{title}:"]
        for option in members:
            lines += format_option(option, positional, width)

    # Notes
    values = " ".join(describe_type(option.annotation) for option in options)
    lines.append("")
    if "BOOL" in values:
        lines.append(BOOL_HELP)
    if "[" in values:
        lines.append(LIST_HELP)
    if see_also:
        lines.append(f"See also: rectify {', rectify '.join(see_also)}.")
    return "\n".join(lines).rstrip()


def format_option(option: Option, positional: str, width: int) -> list[str]:
    """Return the lines about an option.

    Args:
        option: the option.
        positional: the option that has no name.
        width: characters of a line.
    """
    # Description, possible values, default
    sentences = [option.description]
    choices = re.findall(r"'(\w+)'", ast.unparse(option.annotation))
    if choices:
        sentences.append(f"One of {', '.join(dict.fromkeys(choices))}.")
    if "CLASS" in describe_type(option.annotation):
        sentences.append(f"`--{option.name}.help CLASS` lists the arguments of a class.")
    if option.default and ast.unparse(option.default) not in ("None", "False"):
        sentences.append(f"Default: {format_default(option.default)}.")

    # In two columns
    indent = " " * TEXT_COLUMN
    text = " ".join(sentences)
    lines = textwrap.wrap(text, width - TEXT_COLUMN, break_on_hyphens=False)
    left = f"  {format_head(option, positional)}"
    if len(left) < TEXT_COLUMN - 1:
        return [left.ljust(TEXT_COLUMN) + lines[0], *(indent + line for line in lines[1:])]
    return [left, *(indent + line for line in lines)]


def format_default(default: ast.expr) -> str:
    """Return a default as it would be written in a command."""
    text = ast.unparse(default)
    if isinstance(default, ast.Tuple):
        return f"[{text[1:-1]}]"
    return text.strip("'")


def format_head(option: Option, positional: str) -> str:
    """Return an option and the kind of its value as they are written in a command."""
    if option.name == positional:
        return option.name.upper()
    return f"--{option.name} {describe_type(option.annotation)}"


def describe_type(annotation: ast.expr) -> str:
    """Return how the values of a type are shown, e.g. INT or [FLOAT,...]."""
    match annotation:
        case ast.Name(id=name):
            return VALUE_NAMES.get(name, "CLASS")
        case ast.BinOp(left=left, right=ast.Constant(value=None)):
            return describe_type(left)
        case ast.BinOp(left=left, right=right):
            return " or ".join(dict.fromkeys([describe_type(left), describe_type(right)]))
        case ast.Subscript(value=ast.Name(id="Literal")):
            return "NAME"
        case ast.Subscript(value=ast.Name(id="list"), slice=part):
            return f"[{describe_type(part)},...]"
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=parts)):
            return f"[{','.join(map(describe_type, parts))}]"
    return "CLASS"


def read_groups(definition: Definition) -> list[OptionGroup]:
    """Return the options of a verb's function: required ones, others, those of its dataclasses."""
    required = OptionGroup("required", [])
    others = OptionGroup("options", [])
    shared = []
    for option in read_options(definition):
        group = None
        if isinstance(option.annotation, ast.Name):
            group = find_definition(definition.module, option.annotation.id)
        if group and isinstance(group.node, ast.ClassDef) and group.node.decorator_list:
            title = read_docstring(group.node).partition(".\n")[0]
            shared.append(OptionGroup(title, list(read_options(group))))
        elif option.default is None:
            required.options.append(option)
        else:
            others.options.append(option)
    return [group for group in (required, others, *shared) if group.options]


def read_options(definition: Definition) -> Iterator[Option]:
    """Yield an option for each parameter of a function, or each field of a dataclass."""
    module, node = definition
    descriptions = read_descriptions(read_docstring(node))
    aliases = AliasReplacer(module)
    if isinstance(node, ast.ClassDef):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                name = field.target.id
                annotation = aliases.visit(field.annotation)
                yield Option(name, annotation, field.value, descriptions[name])
    if isinstance(node, ast.FunctionDef):
        missing = [None] * (len(node.args.args) - len(node.args.defaults))
        for argument, default in zip(node.args.args, [*missing, *node.args.defaults]):
            assert argument.annotation
            annotation = aliases.visit(argument.annotation)
            name = argument.arg.rstrip("_")  # `from_` is an option --from
            yield Option(name, annotation, default, descriptions[argument.arg])


def read_docstring(node: ast.stmt) -> str:
    """Return the docstring of a function or class."""
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    return ast.get_docstring(node) or ""


def read_descriptions(docstring: str) -> dict[str, str]:
    """Return the descriptions of the arguments in a docstring, by name."""
    descriptions: dict[str, str] = {}
    name = ""
    _, _, section = docstring.partition("\nArgs:\n")
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        if line.startswith("        "):
            descriptions[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            descriptions[name] = text
    return descriptions


class AliasReplacer(ast.NodeTransformer):
    """Replaces the aliases in an annotation, such as AnySampler, by the types that they mean.

    Args:
        module: where the annotation is.
    """

    def __init__(self, module: str):
        self.module = module

    def visit_Name(self, node: ast.Name) -> ast.AST:
        definition = find_definition(self.module, node.id)
        if definition and isinstance(definition.node, ast.Assign):
            return AliasReplacer(definition.module).visit(definition.node.value)
        return node


def find_definition(module: str, name: str) -> Definition | None:
    """Return the definition of a name that a module uses, or None if a library defines it."""
    for node in read_module(module):
        match node:
            case ast.FunctionDef(name=found) | ast.ClassDef(name=found) if found == name:
                return Definition(module, node)
            case ast.Assign(targets=[ast.Name(id=found)]) if found == name:
                return Definition(module, node)
            case ast.ImportFrom(module=str(source), names=imported):
                for alias in imported:
                    if (alias.asname or alias.name) == name:
                        return find_definition(source, alias.name)
    return None


@cache
def read_module(module: str) -> list[ast.stmt]:
    """Return the statements of a module of ours, or none of a library's."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text()).body if file.is_file() else []
