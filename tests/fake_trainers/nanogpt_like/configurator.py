"""Overrides in nanoGPT's manner: config files and --key=value, left to right, types must match, else it dies."""

import sys
from ast import literal_eval

for argument in sys.argv[1:]:
    if "=" not in argument:
        assert not argument.startswith("--")
        exec(open(argument).read())  # noqa: SIM115
    else:
        assert argument.startswith("--")
        name, text = argument[2:].split("=")
        if name not in globals():
            raise ValueError(f"Unknown config key: {name}")
        try:
            wanted = literal_eval(text)
        except (SyntaxError, ValueError):
            wanted = text
        assert type(wanted) is type(globals()[name]), name
        globals()[name] = wanted
