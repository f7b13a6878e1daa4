"""Verdicts on claims: estimates by hand, one correction, figures beside those of null networks."""

import numpy as np
import pytest
from scipy import stats

from evaluation.verdicts import (
    Claim,
    Verdict,
    above_draws,
    above_nulls,
    claims_table,
    difference,
    estimate,
    figures_table,
    judge,
    judge_networks,
)


def verdict(figures, untrained, **options):
    nulls = [{name: (mean, 0.01, 49) for name in figures} for mean in untrained]
    return above_nulls("push", **options)({"figures": figures, "nulls": {"untrained": nulls}})


CLOSE = [0.0, 0.01, -0.01, 0.02, -0.02]


@pytest.mark.parametrize(
    "own, untrained, error, expected",
    [
        (0.2, CLOSE, 0.01, True),
        (-0.2, CLOSE, 0.01, False),
        (0.2, [0.5, 0.51, 0.49], 0.01, False),  # a null has more
        (0.2, [-0.5, 0.1, 0.3], 0.01, None),  # a further one may
        (0.02, CLOSE, 0.1, None),
        (0.2, [9.0], 0.01, True),  # one draw says nothing of another
    ],
)
def test_a_claim_is_seen_above_its_nulls_alone(own, untrained, error, expected):
    found = verdict({"push": (own, error, 99), "rank": (-1, 1, 9)}, untrained)
    assert (found.seen if found.p < 0.05 else None) is expected


def test_the_words_of_a_claim_beside_its_nulls():
    found = verdict({"push": (0.2, 0.01, 99)}, CLOSE)
    assert found.deciding == ("push", "+0.2 [+0.18, +0.22]", "untrained +0.000 ± 0.016")
    assert found.figures == "push: +0.2 [+0.18, +0.22], untrained +0.000 ± 0.016"
    assert above_nulls("push")({"figures": {}, "nulls": {}}) is None


def test_a_claim_that_may_hold_anywhere_is_corrected_for_the_choice():
    figures = {"push, 1: a": (1, 0.3, 99), "push, 1: b": (2, 0.3, 99), "push, 2: a": (-1, 0.3, 99)}
    found = verdict(figures, [])
    assert not found.seen and found.deciding[0] == "push, 2: a"
    found = verdict(figures, [], anywhere=True)
    assert found.seen and found.deciding[0] == "push, 1: a"
    one_sided = stats.t.sf(1 / 0.3, 99)
    assert found.p == pytest.approx(2 * 2 * one_sided)
    # not seen: below at every place, by one of the figures there
    figures["push, 1: a"] = (-1, 0.3, 99)
    found = verdict(figures, [], anywhere=True)
    assert not found.seen and found.p == pytest.approx(2 * 2 * one_sided)


def test_a_null_network_stands_beside_all_others():
    values = {"mine": 1.0, "other 1": 0.3, "other 2": 0.31, "other 3": 0.29}
    networks = {name: {"push": (value, 0.01, 99)} for name, value in values.items()}
    claims, nulls = [Claim("It pushes", "", "", above_nulls("push"))], list(values)[1:]
    ((claim, found),) = judge_networks(claims, networks, nulls)
    assert found["mine"].seen and found["other 1"].seen is None
    assert found["mine"].deciding[2] == "other +0.300 ± 0.010"
    assert found["other 1"].deciding[2] == "other +0.300 ± 0.014"
    table = figures_table([(claim, found)], "mine", nulls).splitlines()
    assert table[0] == "| claim | figure | mine | nulls | verdict | nulls, seen |"
    beside = "other +0.300 ± 0.010 | seen | 0 of 3"
    assert table[2] == f"| It pushes | push | +1 [+0.98, +1.02] | {beside} |"


def test_verdicts_of_many_claims_are_corrected():
    claims = [Claim("", "", "", lambda result, n=n: result["p"][n]) for n in range(4)]
    verdicts = [Verdict(True, "", 0.04), Verdict(True, "", 0.01), Verdict(True, "", 0.02)]
    result = {"p": [*verdicts, Verdict(False, "")]}
    corrected = [by_name["one"] for _, by_name in judge(claims, {"one": result})]
    # Holm: 3 · .01, then 2 · .02, then no less than that
    assert [verdict.p for verdict in corrected[:3]] == pytest.approx([0.04, 0.03, 0.04])
    assert [verdict.seen for verdict in corrected] == [True, True, True, False]
    results = {"teacher": result, "null 1": result, "null 2": {"p": [Verdict(None, "")] * 4}}
    table = claims_table(judge(claims, results), ["null 1", "null 2"]).splitlines()
    assert table[0] == "| claim | teacher | nulls, seen |"
    assert table[2] == "|  | seen | 1 of 2 |" and table[5] == "|  | not seen | 0 of 2 |"


def test_estimates_by_hand():
    one = estimate([1.0, 2.0, 3.0])
    assert (one.mean, one.dof) == (2, 2) and one.error == pytest.approx(1 / np.sqrt(3))
    assert str(one) == "+2 [-0.484, +4.48]"  # t = 4.303
    assert one.p_above == pytest.approx(
        stats.ttest_1samp([1, 2, 3], 0, alternative="greater").pvalue
    )
    other = estimate([0.0, 0.5, 0.2, 0.4])
    test = stats.ttest_ind([1, 2, 3], [0, 0.5, 0.2, 0.4], equal_var=False, alternative="greater")
    assert difference(one, other).p_above == pytest.approx(test.pvalue)
    assert difference(one, other).dof == pytest.approx(test.df)
    ahead = above_draws(estimate([5.0, 5.0]), [1.0, 2.0, 3.0])
    assert (ahead.mean, ahead.dof) == (3, 2) and ahead.error == pytest.approx(np.sqrt(4 / 3))
