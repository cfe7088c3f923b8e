"""Every TRACE metric against known answers, and against the packages where they are installed."""

import random

import pytest

from tracebench.scores import TASKS, backward_transfer, bootstrap, floor, score, summarize

ODD = ["", ".", "...", " ", "\n", "a", "a.", ".a", "a b. c d", "c d. a b", "A b", "a  b\tc", "für."]


def random_texts(count, alphabet="a b c d e f . , x. ..".split()):
    rng = random.Random(0)
    return [[" ".join(rng.choices(alphabet, k=rng.randint(0, 14))) for _ in range(2)]
            for _ in range(count)]


def test_accuracy_wants_the_whole_string_and_strips_nothing():
    assert score("FOMC", ["A", "A ", "", "a"], ["A"] * 4, [""] * 4) == 25.0


def test_scienceqa_wants_the_first_letter_and_an_empty_prediction_scores_zero():
    assert score("ScienceQA", ["B because", "C", "", " B"], ["B\nfor .."] * 4, [""] * 4) == 25.0


def test_the_floor_of_scienceqa_is_its_most_frequent_letter_though_all_answers_differ():
    train = [{"prompt": f"{i}", "answer": f"{letter}\nSince {i}"} for i, letter in enumerate("DBABB")]
    test = [{"prompt": "x", "answer": "B\nSo"}, {"prompt": "y", "answer": "A\nSo"}]
    assert floor("first_letter", train, test) == [100.0, 0.0]
    assert floor("accuracy", train, test) == [0.0, 0.0]  # control: as a whole, no answer is right


def test_rouge_l_equals_the_package():
    rouge = pytest.importorskip("rouge").Rouge(metrics=["rouge-l"])
    for prediction, gold in random_texts(1500) + [[p, g] for p in ODD for g in ODD]:
        try:
            want = 100 * rouge.get_scores(gold, prediction, avg=True)["rouge-l"]["f"]
        except ValueError:  # the package refuses '' and '.'; TRACE crashes there
            want = 0.0
        assert score("MeetingBank", [prediction], [gold], [""]) == want, (prediction, gold)


def test_rouge_l_of_known_answers():
    assert score("MeetingBank", ["", ".", "...", "x y"], ["a b"] * 4, [""] * 4) == 0.0
    assert score("MeetingBank", ["a b c"], ["a b c"], [""]) == pytest.approx(100.0)
    assert score("MeetingBank", ["a c"], ["a b"], [""]) == pytest.approx(50.0)


def test_edit_similarity_equals_the_package():
    fuzz = pytest.importorskip("rapidfuzz").fuzz
    for prediction, gold in random_texts(1500):
        if prediction and gold:
            want = float(round(fuzz.ratio(prediction, gold)))
            assert score("Py150", [prediction], [gold], [""]) == want, (prediction, gold)


def test_edit_similarity_counts_literals_as_their_values():
    assert score("Py150", ["x = <NUM_LIT>"], ["x = 0"], [""]) == 100.0
    assert score("Py150", ["f ( <STR_LIT:ab> )"], ["f ( ab )"], [""]) == 100.0
    assert score("Py150", [""], ["x"], [""]) == 0.0
    assert score("Py150", ["abcd"], ["abxx"], [""]) == 50.0


def test_sari_of_the_known_answer():
    source = "About 95 species are currently accepted ."
    references = ["About 95 species are currently known .", "About 95 species are now accepted .",
                  "95 species are now accepted ."]
    value = score("20Minuten", ["About 95 you now get in ."], [references], [source])
    assert value == pytest.approx(26.953601953601954, abs=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_no_odd_text_crashes_a_score(task):
    for prediction in ODD:
        for gold in ODD[5:]:
            assert 0.0 <= score(task, [prediction], [gold], ["a prompt ."]) <= 100.0 + 1e-6


def test_another_metric_can_be_named():
    assert score("my task", ["a b"], ["a c"], [""], metric="rouge_l") == pytest.approx(50.0)
    with pytest.raises(KeyError):
        score("my task", ["a"], ["a"], [""])


def test_backward_transfer_is_signed_over_all_tasks_but_the_last():
    R = [[50.0, None, None], [40.0, 60.0, None], [20.0, 70.0, 9.0]]
    assert backward_transfer(R) == (20.0 - 50.0 + 70.0 - 60.0) / 2
    assert backward_transfer([[50.0]]) == 0.0


def test_summaries_of_a_small_matrix():
    R = [[50.0, 12.0, None], [80.0, 60.0, 23.0], [20.0, 70.0, 90.0]]
    got = summarize(R, zero_shot=[1.0, 2.0, 3.0])
    assert got == {"op": 60.0, "learned": (50 + 60 + 90) / 3, "bwt": (-30 + 10) / 2, "fwt": 15.0,
                   "bwt_treelora": 30 / 3, "forgetting": (60 + 0) / 2}


def test_what_was_not_tested_is_not_summed_up():
    ends = [[50.0, None, None], [None, 60.0, None], [20.0, 70.0, 90.0]]
    got = summarize(ends)
    assert (got["op"], got["bwt"], got["bwt_treelora"]) == (60.0, -10.0, 10.0)
    assert got["forgetting"] is got["fwt"] is None
    at_once = summarize([[20.0, 70.0, 90.0]])
    assert at_once["op"] == 60.0 and at_once["learned"] is at_once["bwt"] is None
    alone = summarize([[20.0]], zero_shot=[1.0])  # one task: nothing can be lost
    assert alone["op"] == 20.0 and alone["learned"] is alone["bwt"] is alone["forgetting"] is alone["fwt"] is None


def test_the_standard_error_is_that_of_the_mean():
    rows = [[0.0, 100.0] * 50, [100.0] * 100]
    assert bootstrap(rows) == pytest.approx(50 / 100**0.5 / 2, rel=0.1)
    assert bootstrap([[7.0] * 9]) == 0.0
