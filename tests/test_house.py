"""The code's shape: options written out in few places, short functions, and every formula where the map says it is."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import sre_triton
from sre_triton import functional, modules, options, reference

PACKAGE = Path(sre_triton.__file__).parent
PUBLIC = {"self_regularized_entropy", "linear_self_regularized_entropy"}
NAMES = options.Options._fields


def functions():
    """Every function of the package: its file, its node."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            # Overloads, and what is there for type checkers alone, have no body.
            if isinstance(node, ast.FunctionDef) and ast.unparse(node.body[-1]) != "...":
                yield path.relative_to(PACKAGE).as_posix(), node


def parameters(node):
    arguments = node.args
    return [arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if arg.arg != "self"]


def lines_of_code(path, node):
    """Without the docstring, comments and empty lines."""
    lines = (PACKAGE / path).read_text().splitlines()
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    skipped = range(docstring.lineno, docstring.end_lineno + 1) if docstring else ()
    numbers = [number for number in range(node.lineno, node.end_lineno + 1) if number not in skipped]
    return sum(bool(re.match(r"\s*[^\s#]", lines[number - 1])) for number in numbers)


def test_options_are_written_out_in_few_places():
    places = [f"{path} {node.name}" for path, node in functions() if len({*NAMES} & {*parameters(node)}) >= 5]
    assert sorted(places) == [
        "functional.py linear_self_regularized_entropy",
        "functional.py self_regularized_entropy",
        "modules.py __init__",
        "modules.py __init__",
        "reference.py self_regularized_entropy",
    ]


@pytest.mark.parametrize("public", [functional.self_regularized_entropy, functional.linear_self_regularized_entropy])
def test_signatures_have_the_same_names_order_and_defaults(public):
    keywords = {p.name: p.default for p in inspect.signature(public).parameters.values() if p.kind is p.KEYWORD_ONLY}
    shared = [name for name in keywords if name in NAMES]
    tail = ("inplace", "recompute", "chunk_rows")  # of one function alone
    assert [name for name in shared if name not in tail] == [name for name in NAMES if name not in tail]
    module = {
        "self_regularized_entropy": modules.SelfRegularizedEntropyLoss,
        "linear_self_regularized_entropy": modules.LinearSelfRegularizedEntropyLoss,
    }[public.__name__]
    of_module = {name: p.default for name, p in inspect.signature(module).parameters.items() if name in NAMES}
    assert list(of_module.items()) == [(name, keywords[name]) for name in shared]
    definition = [name for name in inspect.signature(reference.self_regularized_entropy).parameters if name in NAMES]
    assert definition == [name for name in NAMES if name in definition]


def test_the_types_of_the_keywords_are_those_of_the_options():
    of_both = options.KeywordsOfLogits.__annotations__ | options.KeywordsOfLinear.__annotations__
    assert of_both | {"return_parts": bool} == options.Options.__annotations__


def test_the_options_reach_the_call_in_their_places(monkeypatch):
    made = []
    monkeypatch.setattr(functional, "result_of", lambda arguments, compute: made.append(arguments))
    for name in ("of_logits", "of_linear"):
        monkeypatch.setattr(functional, name, lambda *args: args[-1])
    for public in PUBLIC:
        function = getattr(functional, public)
        keywords = [name for name in NAMES if name in inspect.signature(function).parameters]
        tensors = [None] * (2 if public == "self_regularized_entropy" else 3)
        function(*tensors, **{name: f"the {name}" for name in keywords})
        assert all(getattr(made[-1], name) == f"the {name}" for name in keywords)


def test_functions_are_short():
    long = [f"{path} {node.name}" for path, node in functions() if lines_of_code(path, node) > 60]
    assert long == []
    many = [f"{path} {node.name}" for path, node in functions() if len(parameters(node)) > 14]
    allowed = {"functional.py self_regularized_entropy", "functional.py linear_self_regularized_entropy"}
    assert {*many} <= allowed | {"modules.py __init__"}


def test_every_function_says_what_it_is_for():
    silent = [f"{path} {node.name}" for path, node in functions() if ast.get_docstring(node) is None]
    assert silent == []


def test_files_are_short():
    # internals.py is one file, whatever its length: what leans on PyTorch's private parts stands together.
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py") if path.name != "internals.py"}
    assert {path.name: count for path, count in lines.items() if count > 330} == {}


def test_the_map_of_rooms_has_every_file():
    rooms, _, _ = sre_triton.__doc__.partition("Where a formula stands")
    named = {"", *re.findall(r"(?<![\w/])(\w+)\.py", rooms)}
    assert {path.stem for path in PACKAGE.rglob("*.py")} - {"__init__"} == named - {""}


def test_every_formula_is_where_the_map_says():
    table = re.search(r"    formula +reference.*?\n(.*?)\n\n", sre_triton.__doc__ + "\n\n", re.DOTALL)[1]
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    assert len(rows) >= 8
    for _, *places in rows:
        for module, place in zip(("reference", "kernels", "compiled"), places, strict=True):
            if place != "-":
                place = "reference.self_regularized_entropy" if place == "reference" else place
                name = f"sre_triton.{place}" if module == "reference" else f"sre_triton.{module}.{place}"
                file, _, function = name.rpartition(".")
                if module == "kernels":
                    pytest.importorskip("triton")
                assert callable(getattr(importlib.import_module(file), function)), name
