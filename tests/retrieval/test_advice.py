"""What is advised: chosen by other data, at the learning rate that validation prefers."""

import pytest

pd = pytest.importorskip("pandas", reason="the study needs pandas: pip install '.[study]'")

import advice  # noqa: E402


def rows(*lines):
    """(data set, loss, setting, rate, seed, test, validation), at 100 steps."""
    names = ["dataset", "loss", "setting", "learning_rate", "seed", "value", "seen"]
    return pd.DataFrame(lines, columns=names).assign(steps=100)


def test_the_learning_rate_is_chosen_on_validation():
    made = advice.means(
        rows(
            ("omniglot", "PNP-Ds", 0, 0.1, 1, 30, 50),
            ("omniglot", "PNP-Ds", 0, 0.1, 2, 32, 40),
            ("omniglot", "PNP-Ds", 0, 0.2, 1, 90, 45),
            ("omniglot", "PNP-Ds", 0, 0.2, 2, 90, 44),
            ("omniglot", "PNP-Ds", 0, 0.3, 1, 99, 99),  # one seed of two
        )
    )
    assert made.value.tolist() == [31]
    assert made.seen.tolist() == [45]


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
    assert of["omniglot", "PNP-Ds"].behind == 1
    assert of["omniglot", "Triplet"].behind == -9


def test_the_data_of_a_data_set_does_not_choose_its_own_setting():
    own = grid()
    own.loc[own.dataset == "omniglot", "value"] *= 100  # what it says of itself does not matter
    choices = [advice.left_out(x).set_index(["dataset", "name"]).choice for x in (grid(), own)]
    assert choices[0].omniglot.equals(choices[1].omniglot)


def test_the_spread_has_the_mean_and_the_least_of_every_loss():
    table = advice.spread(advice.left_out(grid()))
    assert list(table.index) == ["PNP-Ds", "SupCon", "Triplet"]
    assert table.loc["Triplet", "mean"] == pytest.approx(-9)
    assert (table.loc["SupCon"] == 0).all()


def test_a_choice_that_did_not_run_everywhere_is_not_made():
    some = grid()
    some = some[~((some.dataset == "grocery") & (some.loss == "PNP-Ds") & (some.setting == 1))]
    found = advice.means(some)
    assert advice.chosen_on(found, ["PNP-Ds"]) == ("PNP-Ds", 0)


def test_every_data_set_of_the_study_belongs_to_some_data():
    from study_data import DATA_SETS

    assert set(advice.DATA_OF) == set(DATA_SETS)
    assert set(advice.FROZEN) < set(DATA_SETS)
