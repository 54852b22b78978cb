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


@pytest.mark.parametrize("begun", ["", "a,"])
def test_a_file_of_a_begun_header_gets_a_whole_one(tmp_path, begun):
    path = tmp_path / "rows.csv"
    path.write_text(begun)
    add(path, {"a": 1, "b": 2})
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("mine", ["mine", "c,d\n1,2", "a,c\n1,2\n3,"])
def test_a_file_of_other_columns_is_left_as_it_is(tmp_path, mine):
    path = tmp_path / "rows.csv"
    path.write_text(mine)
    with pytest.raises(SystemExit, match="has other columns than a, b"):
        add(path, {"a": 1, "b": 2})
    assert path.read_text() == mine
