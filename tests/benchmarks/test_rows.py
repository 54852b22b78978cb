"""What benchmarks/rows.py writes."""

import pytest
from rows import add


def test_a_row_is_added_after_the_last_whole_one_of_the_same_columns(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    add(path, {"a": 1, "b": "x, y"})
    with path.open("a") as file:
        file.write("2,a line that a kill cut sh")
    add(path, {"a": 3, "b": None})
    with pytest.raises(SystemExit, match="rows.csv has other columns than a, c"):
        add(path, {"a": 4, "c": 5})
    assert path.read_text() == 'a,b\n1,"x, y"\n3,\n'
