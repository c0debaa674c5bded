"""Writes supervisor/schemas/*.json from the program's own types; with --check it only compares.

python docs/make_schemas.py
"""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
from gpusup.supervisor.commands.diagnose import Report
from gpusup.supervisor.core.events import AnyEvent
from gpusup.supervisor.core.run_log import RunLog

FOLDER = Path(__file__).parents[1] / "supervisor" / "schemas"
SCHEMAS: dict[str, tuple[Any, str]] = {
    "log-v1.json": (RunLog, "gpusup log RUN -o json"),
    "diagnosis-v1.json": (Report, "gpusup diagnose LOG --json"),
    "journal-v1.json": (AnyEvent, "one line of a run's journal.jsonl"),
}


def schema(of: Any, title: str) -> str:
    content = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **msgspec.json.schema(of)}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (of, title) in SCHEMAS.items():
        path, text = FOLDER / name, schema(of, title)
        if "--check" not in sys.argv:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{path.name} is not what the program's types say: run `python docs/make_schemas.py`")


if __name__ == "__main__":
    main()
