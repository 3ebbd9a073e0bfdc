"""Runs side by side: what differs, which are seeds of one recipe, and what may not be compared."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cluster.__main__ import main
from cluster.compare import Compared, compare, page, pictures, spread, text
from cluster.report.view import View, estimate
from configs.errors import UserError
from tests.simulated import view
from tests.test_report import EVIL, Parsed
from tests.test_watch import csv, refused
from trainers.mismatch import Findings, Series, find, from_means

PARTED, PLATEAU = view("kink middle drop 6"), view("null plateau")


def run(name: str, params: Mapping[str, str], of: View = PARTED, **fields: object) -> View:
    shown = {slot: getattr(of, slot) for slot in View.__slots__}
    return View(**{**shown, "name": name, "params": params, **fields})


def seeds(weak: int = 2, strong: int = 2) -> list[View]:
    """Runs of two recipes that differ in one key, the recipes taking turns."""
    weaks = [run(f"weak-{n}", {"run.seed": str(n), "algorithm.kl.coefficient": "0.02"}) for n in range(weak)]
    strongs = [
        run(f"strong-{n}", {"run.seed": str(n), "algorithm.kl.coefficient": "0.1"}, PLATEAU) for n in range(strong)
    ]
    return [one for pair in zip(weaks, strongs, strict=True) for one in pair]


@pytest.fixture(scope="module")
def two_recipes() -> Compared:
    return compare(seeds())


def test_seeds_of_one_recipe_go_together_and_what_differs_is_named(two_recipes: Compared) -> None:
    assert [one.name for one in two_recipes.views] == ["weak-0", "weak-1", "strong-0", "strong-1"]
    assert two_recipes.recipes == ("A: algorithm.kl.coefficient=0.02",) * 2 + ("B: algorithm.kl.coefficient=0.1",) * 2
    assert two_recipes.differs == {"algorithm.kl.coefficient": ("0.02", "0.02", "0.1", "0.1")}
    assert two_recipes.marks == () and two_recipes.alike


def test_groups_by_a_section_or_a_key() -> None:
    runs = [
        run("a", {"reward.model": "x", "algorithm.name": "grpo"}),
        run("b", {"reward.model": "y", "algorithm.name": "grpo"}),
        run("c", {"reward.model": "x", "algorithm.name": "rloo"}),
    ]
    assert compare(runs, "algorithm").recipes == ("A: algorithm.name=grpo",) * 2 + ("B: algorithm.name=rloo",)
    assert compare(runs, "reward.model").recipes == ("A: reward.model=x",) * 2 + ("B: reward.model=y",)
    assert len(set(compare(runs).recipes)) == 3
    with pytest.raises(UserError, match="--group rewrd: no run has such parameters: there are algorithm, reward"):
        compare(runs, "rewrd")


def test_tables_without_parameters_are_no_seeds_of_each_other() -> None:
    assert compare([run("a", {}), run("b", {})]).recipes == ("A: a", "B: b")


def test_runs_of_one_name_are_told_apart() -> None:
    assert [one.name for one in compare([run("demo", {}), run("demo", {}), run("x", {})]).views] == [
        "demo #1",
        "demo #2",
        "x",
    ]


def test_runs_that_were_evaluated_differently_are_refused_or_marked() -> None:
    runs = [run("a", {}), run("b", {}, evaluation_hash="ffff")]
    with pytest.raises(
        UserError, match="evaluated differently: hash 0123456789ab in a; ffff in b; --across-evaluations"
    ):
        compare(runs)
    marked = compare(runs, across_evaluations=True)
    shown = Parsed(page(marked, []))
    for said in (text(marked), shown.text):
        assert "EVALUATED DIFFERENTLY" in said and "ffff in b" in said
    assert "no run is best" in shown.by_id["best"] and not marked.alike


def test_an_evaluation_hash_that_is_not_known_is_said() -> None:
    found = compare([run("a", {}), run("b", {}, evaluation_hash=None)])
    assert found.alike and "no evaluation hash is known of b" in text(found)


def test_what_cannot_be_compared_is_one_line() -> None:
    reward = from_means("reward", [0, 1], [0.0, 1.0], None)
    other = find(Series(reward=reward, evaluations=(from_means("other", [0, 1], [0.0, 1.0], None),)))
    with pytest.raises(UserError, match="needs two runs or more: there is 1"):
        compare([run("a", {})])
    with pytest.raises(UserError, match="primary evaluations differ: .*a has helpdesk/gold.*--eval"):
        compare([run("a", {}), run("b", {}, findings=other)])


def test_different_rewards_have_no_common_unit() -> None:
    found = compare([run(f"r{n}", {"reward.model": str(n)}) for n in range(6)])
    assert found.correlations == () and "different rewards" in text(found)


def test_correlation_across_runs_equals_scipy_where_there_is_no_error() -> None:
    rng = np.random.default_rng(0)
    reward, gold = rng.normal(size=(2, 7))

    def findings(n: int) -> Findings:
        last = [
            from_means(name, [0, 5], [0.0, float(values[n])], None) for name, values in (("r", reward), ("g", gold))
        ]
        return find(Series(reward=last[0], evaluations=(last[1],)))

    found = compare([run(f"r{n}", {"run.seed": str(n)}, findings=findings(n)) for n in range(7)]).correlations
    oracle = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
    assert {one.kind for one in found} == set(oracle)
    for one in found:
        assert one.estimate == pytest.approx(oracle[one.kind](reward, gold).statistic, abs=1e-10) and one.n == 7
        assert "at the last version of each of these 7 runs" in one.estimand


def test_the_spread_over_seeds_is_student_s() -> None:
    values = [0.61, 0.66, 0.57, 0.70]
    found = spread(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found is not None and (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert spread([0.6]) is None


def test_page_and_terminal_show_every_run_and_the_seeds_together(two_recipes: Compared) -> None:
    drawn = pictures(two_recipes)
    shown, said = Parsed(page(two_recipes, drawn)), text(two_recipes)
    for one in two_recipes.views:
        assert one.name in said and one.name in shown.text and all(one.name in picture.alt for picture in drawn)
        assert one.chosen.value is not None and estimate(one.chosen.value) in said
    assert "2 parted" in said and "2 parted" in shown.by_id["states"] and "SD " in said
    assert "helpdesk/gold" in shown.by_id["best"] and "mean over 2 runs" in shown.by_id["best"]
    assert [image["src"][:26] for image in shown.all("img")] == ["data:image/svg+xml;base64,"] * 2


def test_seeds_of_one_recipe_are_told_apart_in_the_picture() -> None:
    alone = compare([run(f"seed-{n}", {"run.seed": str(n)}, of) for n, of in enumerate((PARTED, PLATEAU, PARTED))])
    for picture in pictures(alone):
        assert all(f">seed-{n}<" in picture.svg for n in range(3)) and picture.caption.endswith("line style: the run.")
    shown, said = Parsed(page(alone, [])).text, text(alone)
    assert "3 runs, 1 recipe" in shown and "1 recipes" not in shown
    for words in (shown, said):
        assert words.count("not enough: 3 runs have both, 5 are needed") == 1
    many = pictures(compare([run(f"seed-{n}", {"run.seed": str(n)}) for n in range(7)]))
    assert all(">A<" in picture.svg and picture.caption.endswith("the recipe.") for picture in many)


def test_names_and_parameters_stay_text() -> None:
    reward, gold = (from_means(name, [0, 1], [0.0, 1.0], None) for name in ("reward", "helpdesk/gold"))
    nothing = find(Series(reward=reward, evaluations=(gold,)))
    runs = [run(EVIL, {EVIL: EVIL}), run("b", {EVIL: "b"}, findings=nothing)]
    shown = Parsed(page(compare(runs), []))
    assert not shown.all("script") and EVIL in shown.text


def test_two_tables_are_compared_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.csv").write_text(csv())
    assert main(["compare", "a.csv", "--output", "out", "b.csv"]) == 0
    printed = capsys.readouterr().out
    assert "no evaluation hash is known of a, b" in printed and printed.endswith("out/comparison.html\n")
    assert {path.name for path in Path("out").iterdir()} == {"comparison.html", "rewards.png", "evaluations.png"}
    refused(["compare", "a.csv"], ["two runs or more"], capsys)
    refused(["compare"], ["two runs or more", "none"], capsys)
    refused(["compare", "a.csv", "c.csv"], ["c.csv", "no such file"], capsys)
    refused(["compare", "a.csv", "b.csv", "--group", "reward", "--output", "no"], ["--group reward"], capsys)
    assert not Path("no").exists()
