"""What benchmarks/pages.py reads, prints and writes."""

import sys
from pathlib import Path

import pytest

pd = pytest.importorskip("pandas", reason="the reports need pandas: pip install '.[benchmarks]'")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import pages  # noqa: E402


def test_rows_are_read_to_the_last_digit_and_a_line_cut_short_is_not(tmp_path):
    value = "0.30071715780780156"
    (tmp_path / "a.csv").write_text(f"loss,value\none,{value}\ntwo,0.2\n")
    (tmp_path / "b.csv").write_text("loss,value\nthree,0.3\nfour,0.")
    (tmp_path / "c.csv").write_text("loss,va")  # its header is being written
    rows = pages.read(sorted(tmp_path.glob("*.csv")))
    assert rows.loss.tolist() == ["one", "two", "three"]
    assert rows.value[0] == float(value)
    assert pages.read([]).empty


def test_a_table_has_two_digits_text_as_it_is_and_empty_cells():
    table = pd.DataFrame({"MAP@R": [1.005, None], "p": ["< 0.001", "0.5"]}, ["one", "two"])
    lines = [
        "| loss | MAP@R | p |",
        "|---|---|---|",
        "| one | 1.00 | < 0.001 |",
        "| two |  | 0.5 |",
    ]
    assert pages.markdown(table, "loss").splitlines() == lines
    assert pages.markdown(table.rename_axis("loss")).splitlines() == lines


def test_a_page_that_the_rows_do_not_make_is_found_and_not_written(tmp_path):
    page, missing = tmp_path / "page.md", tmp_path / "missing.md"
    pages.write({page: "new"}, check=False)
    pages.write({page: "new"}, check=True)
    for texts in ({page: "newer"}, {missing: "new"}):
        with pytest.raises(SystemExit, match="is not what the rows say"):
            pages.write(texts, check=True)
    assert page.read_text() == "new" and not missing.exists()
