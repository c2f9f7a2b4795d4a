"""The answer to a query as a table for the terminal."""

from typing import TYPE_CHECKING

from flows.show.formats import cells, is_number, shown
from flows.show.table import Column, Table
from flows.show.text import count

if TYPE_CHECKING:
    import pyarrow as pa


def answer_table(answer: "pa.Table", most_rows: int) -> Table:
    """Return the first rows of an answer, numbers with four digits; the caption says how many rows there are."""
    columns = [Column(field.name, is_number(field.type)) for field in answer.schema]
    rows = [[shown(value) for value in row] for row in cells(answer.slice(0, most_rows))]
    caption = count(answer.num_rows, "row")
    if answer.num_rows > most_rows:
        caption = f"the first {most_rows} of {caption}; --csv gives all of them"
    return Table("answer", "", columns, [rows], caption)
