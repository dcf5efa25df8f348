"""Write the parts of one file as tables: the folder can be `task.data` of another run, which reads the same examples."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pkd_dist.config.paths import project_path
from pkd_dist.data.examples import Split
from pkd_dist.data.json_rows import as_json
from pkd_dist.data.rows import read_file
from pkd_dist.data.tables import TableSpec
from pkd_dist.data.tasks import Task
from pkd_dist.files import make_folder, written_atomically


def write(folder: Path, data: str, splits: Mapping[str, Split], task: Task) -> None:
    """Write each part of one file as SPLIT.jsonl, with all its columns.

    Texts and labels are written as they were read, other columns as JSON can hold them.

    Args:
        folder: made where it is missing.
        data: `task.data`.
        splits: name -> part, from `text.read_all`.
    """
    make_folder(folder)
    part_of = np.full(1 + max(max(split.rows) for split in splits.values()), -1, np.int8)  # by row number
    for part, split in enumerate(splits.values()):
        part_of[np.asarray(split.rows)] = part
    columns = (*task.inputs, *(task.label_columns if task.has_labels else ()))
    spec = TableSpec(
        columns, headerless=task.headerless, allow_short=task.skip_broken, keep_others=True, lists=task.list_columns
    )
    table = read_file(project_path(data), spec)
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(written_atomically(folder / f"{name}.jsonl")) for name in splits]
        # An unpaired surrogate, which UTF-8 cannot hold, is written as its escape in JSON.
        open_parts = [path.open("w", encoding="utf-8", errors="backslashreplace") for path in paths]
        for file in open_parts:
            stack.enter_context(file)
        for number, fields in table.rows:
            if number < len(part_of) and part_of[number] >= 0:
                record = dict(zip(columns, fields, strict=True)) | table.others
                open_parts[part_of[number]].write(json.dumps(as_json(record), ensure_ascii=False) + "\n")
