"""What is advised: chosen by other data, at the learning rate that validation prefers."""

import pytest

pd = pytest.importorskip("pandas", reason="the study needs pandas: pip install '.[study]'")

import advice  # noqa: E402


def rows(*lines):
    """(data set, loss, setting, rate, seed, test, validation), at 100 steps."""
    names = ["dataset", "loss", "setting", "learning_rate", "seed", "value", "seen"]
    return pd.DataFrame(lines, columns=names).assign(steps=100)


def test_the_learning_rate_is_chosen_on_validation():
    own = rows(
        ("omniglot", "PNP-Ds", 0, 0.1, 1, 30, 50),
        ("omniglot", "PNP-Ds", 0, 0.1, 2, 32, 40),
        ("omniglot", "PNP-Ds", 0, 0.2, 1, 90, 45),
        ("omniglot", "PNP-Ds", 0, 0.2, 2, 90, 44),
        ("omniglot", "PNP-Ds", 0, 0.3, 1, 99, 99),  # one seed of two
    )
    (made,) = advice.means(own).itertuples()
    assert made.value == 31 and made.seen == 45


def grid():
    """Setting 1 of each loss is the better on CLINC150 and on Grocery, setting 0 on Omniglot."""
    lines = []
    for data in ("clinc150", "grocery", "grocery_lite0", "omniglot"):
        better = 0 if data == "omniglot" else 1
        for loss, value in (("PNP-Ds", 50), ("SupCon", 49), ("Triplet", 40)):
            for setting in (0, 1):
                test = value + 5 * (setting == better)
                lines.append((data, loss, setting, 0.1, 1, test, test))
    return rows(*lines)


def test_a_setting_is_chosen_without_the_data_that_it_is_measured_on():
    made = advice.left_out(grid(), {"any peer": ["SupCon", "Triplet"]})
    of = {(r.dataset, r.name): r for r in made.itertuples(index=False)}
    for name, value in (("PNP-Ds", 50), ("SupCon", 49), ("any peer", 49)):
        assert of["omniglot", name].value == value  # the setting of the others
        # Of Omniglot and the other data; not of the other data set of the same photographs.
        assert of["grocery", name].choice == of["grocery_lite0", name].choice
    assert of["omniglot", "PNP-Ds"].choice == ("PNP-Ds", 1)
    assert of["omniglot", "any peer"].choice == ("SupCon", 1)
    assert of["omniglot", "PNP-Ds"].behind == 1 and of["omniglot", "Triplet"].behind == -9
    own = grid()
    own.loc[own.dataset == "omniglot", "value"] *= 100  # what it says of itself does not matter
    choices = [advice.left_out(x).set_index(["dataset", "name"]).choice for x in (grid(), own)]
    assert choices[0].omniglot.equals(choices[1].omniglot)


def test_validation_chooses_a_setting_in_every_split_and_a_rate_beside_it():
    own = rows(
        ("omniglot", "PNP-Ds", 0, 0.1, 1, 30, 50),
        ("omniglot", "PNP-Ds", 1, 0.1, 1, 40, 49),
        ("omniglot", "PNP-Ds", 0, 0.1, 2, 30, 40),
        ("omniglot", "PNP-Ds", 1, 0.1, 2, 34, 41),
        ("omniglot", "PNP-Ds", 0, 0.2, 1, 45, 51),
        ("omniglot", "PNP-Ds", 0, 0.2, 2, 45, 39),
        ("omniglot", "SupCon", 0, 0.1, 1, 42, 10),
        ("omniglot", "SupCon", 0, 0.1, 2, 42, 10),
    )
    own = own.assign(label="at " + own.setting.astype(str))
    of = advice.by_validation(own).set_index(["loss", "learning_rate"])
    assert of.loc["PNP-Ds", 0.1][["chosen", "at 0", "at 1"]].tolist() == [-5, -7, 0]
    assert of.loc["PNP-Ds", 0.2].chosen == 0
    behind = advice.from_best_peer(own).set_index("loss").behind
    assert behind.to_dict() == {"PNP-Ds": (45 + 34) / 2 - 42, "SupCon": 0}


def test_settings_that_lack_a_split_are_not_averaged_over_others():
    own = advice.read()
    own = own[(own.dataset == "clinc150") & (own.loss == "SupCon")]
    both, one_lacks = map(advice.settings_table, (own, own[1:]))
    assert both.count("steps at") == 4 and "| split" not in both
    assert all(f"| split {x}, 100 steps at 0.001 |" in one_lacks for x in own.seed.unique())
    assert one_lacks.count("|  |") == 1
    assert "| split" not in advice.settings_table(own[own.seed == own.seed.min()][1:])


def test_the_picture_is_the_same_for_the_same_rows(tmp_path):
    own = advice.read()
    for name in ("one.svg", "two.svg"):
        advice.plot(own[own.dataset == "emoji_lite0"], tmp_path / name)
    one = (tmp_path / "one.svg").read_text()
    assert one == (tmp_path / "two.svg").read_text() and "emoji_lite0" in one


def test_what_did_not_run_everywhere_is_neither_chosen_nor_compared():
    own = grid()

    def without(loss):
        return own[~((own.dataset == "grocery") & (own.loss == loss) & (own.setting == 1))]

    assert advice.chosen_on(advice.means(without("PNP-Ds")), ["PNP-Ds"]) == ("PNP-Ds", 0)
    found = advice.everywhere(without("Triplet"), ("grocery", "omniglot"))
    assert {*found.loss} == {"PNP-Ds", "SupCon"} and {*found.dataset} == {"grocery", "omniglot"}


@pytest.mark.parametrize("of", [advice.everywhere, advice.complete])
def test_a_split_that_is_run_in_part_changes_nothing(of):
    own = grid()[lambda x: x.dataset.isin(["grocery", "omniglot"])]
    part = own[(own.dataset == "omniglot") & (own.loss != "Triplet")].assign(seed=2)
    found = of(pd.concat([own, part[1:], part.assign(seed=3, dataset="grocery")[:1]]))
    assert found.equals(own)
    whole = pd.concat([own, own.assign(seed=2)])
    assert of(whole).equals(whole)


def test_a_run_that_was_made_twice_counts_once(tmp_path):
    (path,) = advice.FOLDER.glob("emoji_lite0.csv")
    lines = path.read_text().splitlines()
    (tmp_path / path.name).write_text("\n".join(lines + lines[3:4]))
    assert len(advice.read(tmp_path)) == len(lines) - 1


def test_every_data_set_of_the_study_belongs_to_some_data():
    from study_data import DATA_SETS

    assert set(advice.DATA_OF) == set(DATA_SETS)
