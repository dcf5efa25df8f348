"""Read tables whose columns have types: Parquet files and data sets of the Hugging Face hub."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pkd_dist.data.delimited import is_quoted
from pkd_dist.data.tables import Row, Table, TableSpec, place
from pkd_dist.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetDict

_PARQUET_BATCH_ROWS = 4096


def read_parquet(path: Path, spec: TableSpec) -> Table:
    """Open a Parquet file."""
    from datasets import Features
    from pyarrow import schema, types
    from pyarrow.parquet import ParquetFile

    def unreadable(error: Exception) -> UserError:
        return UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}")

    try:
        table = ParquetFile(path, memory_map=True)
        whole = table.schema_arrow
        requested = [  # `datasets` reads the names of class labels from the metadata, but no categories of pandas
            column.with_type(column.type.value_type) if types.is_dictionary(column.type) else column
            for column in whole
            if column.name in spec.columns
        ]
        features = Features.from_arrow_schema(schema(requested, whole.metadata))
    except Exception as error:  # pyarrow and datasets raise many types
        raise unreadable(error) from None
    duplicate = next((name for name in spec.columns if whole.names.count(name) > 1), None)
    if duplicate:
        raise UserError(f"{path}: has two columns {duplicate!r}; keep one")

    def records(columns: list[str]) -> Iterator[dict[str, object]]:
        try:
            for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
        except Exception as error:
            raise unreadable(error) from None

    return _typed(str(path), whole.names, features, records, spec)


def load_hub(name: str) -> DatasetDict:
    """Return the splits of a hub data set, or of a local folder in its layout.

    Args:
        name: `NAME` or `NAME:CONFIGURATION`.

    Raises:
        UserError: no network, no such data set or configuration.
    """
    from datasets import load_dataset

    parts = name.split(":")
    try:
        return load_dataset(*parts, **_csv_options(parts))
    except Exception as error:  # of many types
        raise UserError(
            f"hub:{name} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "task.data",
        ) from None


def _csv_options(parts: Sequence[str]) -> dict[str, object]:
    """Return options with which CSV files on the hub are read as `delimited.py` reads them: every field is text.

    By default `datasets` guesses types: the text NA becomes a missing value, and 007 becomes 7.
    """
    from datasets import load_dataset, load_dataset_builder
    from datasets.packaged_modules.csv.csv import CsvConfig

    builder = load_dataset_builder(*parts)
    config = builder.config
    if not isinstance(config, CsvConfig):
        return {}
    files = [Path(str(file)) for split in config.data_files.values() for file in split]
    options: dict[str, object] = {"keep_default_na": False}
    if config.sep == "\t" and all(map(Path.is_file, files)) and not any(map(is_quoted, files)):
        options["quoting"] = csv.QUOTE_NONE
    if builder.info.features is not None:  # declared by the data set
        return options | {"na_values": [""]}
    splits = load_dataset(*parts, streaming=True, **options)
    names = {name for split in splits.values() for name in next(iter(split), {})}
    return options | {"converters": dict.fromkeys(sorted(names), str)}


def read_hub(name: str, splits: Sequence[str], spec: TableSpec) -> Table:
    """Open the first of `splits` that a hub data set has.

    Raises:
        UserError: the data set has none of them, or a column is missing.
    """
    tables = load_hub(name)
    for split in splits:
        if split in tables:
            features = tables[split].features
            return _typed(f"hub:{name}/{split}", features, features, tables[split].select_columns, spec)
    raise UserError(f"hub:{name} has no split {splits[0]!r}; it has {', '.join(tables)}", "task.data")


def _typed(
    name: str,
    available: Iterable[str],
    features: Mapping[str, object],
    select: Callable[[list[str]], Iterable[Mapping[str, object]]],
    spec: TableSpec,
) -> Table:
    """Return a table whose columns have types.

    Args:
        name: of the table, for messages.
        available: all its columns.
        features: requested column -> its `datasets` feature.
        select: column names -> one mapping per row.
        spec: columns to read.
    """
    if missing := spec.missing(features):
        raise UserError(f"{name}: has no column {missing!r}; it has {', '.join(map(repr, available))}")
    class_names = {column: names for column in spec.columns if (names := _names_of(features.get(column)))}

    def rows() -> Iterator[Row]:
        requested = [column for column in spec.columns if column in features]
        for number, record in enumerate(select(list(available) if spec.keep_others else requested), start=1):
            spec.update_others(record, others)
            if class_names:
                record = dict(record)
                for column, names in class_names.items():
                    value = record[column]
                    record[column] = (
                        [_class_name(each, names) for each in value]
                        if isinstance(value, list)
                        else _class_name(value, names)
                    )
            yield number, spec.fields(record, partial(place, name, number, "row"))

    unused: dict[str, None] = {}
    others: dict[str, object] = {}
    spec.add_unused(available, unused)
    return Table(name, rows(), "row", unused=unused, others=others)


def _names_of(feature: object) -> Sequence[str] | None:
    """Return the names of a class label, or of the class labels in a list."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    inner = getattr(feature, "feature", feature)
    return getattr(inner, "names", None)


def _class_name(value: object, names: Sequence[str]) -> object:
    """Return the name of a class label; None for -1, which marks a missing one. Anything else is returned unchanged."""
    if isinstance(value, int) and value < len(names):
        return names[value] if value >= 0 else None
    return value
