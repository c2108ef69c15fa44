"""The tree in the docstring of `errors.py` is the tree of the classes."""

from __future__ import annotations

import re

from openweights import errors


def test_the_tree_is_that_of_the_classes() -> None:
    listed = re.findall(r"^ {4}([│├└─ ]*)(\w+Error)(?: \((\w+)\))?", errors.__doc__ or "", re.M)
    path: list[str] = []
    found: dict[str, tuple[str, str]] = {}
    for depth, (_, name, builtin) in ((len(one[0]) // 4, one) for one in listed):
        path[depth:] = [name]
        found[name] = (path[depth - 1] if depth else "Exception", builtin)
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.OpenWeightsError)
    }
    assert list(found) == list(classes) and len(found) > 8
    for name, (parent, builtin) in found.items():
        bases = [base.__name__ for base in classes[name].__bases__]
        assert bases == [parent, builtin] if builtin else bases == [parent], name
