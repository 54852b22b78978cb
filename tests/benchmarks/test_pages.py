"""What benchmarks/pages.py reads, prints and writes."""

import pytest

pytest.importorskip("pandas", reason="the reports need pandas: pip install '.[benchmarks]'")

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


def test_only_what_stands_between_the_markers_is_made_anew(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Before\n<!-- a b, of x.py -->\nold\n<!-- end -->\nafter\n<!-- c, of y.py -->\n"
    )
    new = page.read_text().replace("old", "new\nlines")
    with pytest.raises(SystemExit, match="page.md is not what the rows say"):
        pages.publish([page], {"a b": "new\nlines"}, "x.py", check=True)
    assert "old" in page.read_text()
    for check in (False, True):
        pages.publish([page], {"a b": "new\nlines", "d": ""}, "x.py", check)
        assert page.read_text() == new


@pytest.mark.parametrize(
    "marker", ["<!-- lost, of x.py -->\n<!-- end -->", "<!-- a, of x.py -->\n"]
)
def test_no_page_is_written_if_a_marker_has_no_part_or_no_end(marker, tmp_path):
    one, two = tmp_path / "one.md", tmp_path / "two.md"
    one.write_text("<!-- a, of x.py -->\nold\n<!-- end -->")
    two.write_text(marker)
    with pytest.raises(SystemExit, match="two.md: <!-- .* has no rows, or no <!-- end -->"):
        pages.publish([one, two], {"a": "new"}, "x.py")
    assert "old" in one.read_text()
