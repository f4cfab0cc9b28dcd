"""What a comparison says, the gate, and JUnit's words for it."""

from xml.etree import ElementTree

import pytest
from stored import GREEDY, far, known, path, put, said, small

from awq_jax.errors import InputError
from awq_jax.records.comparison import compared
from awq_jax.records.gate import judge, parse_gate
from awq_jax.records.junit import junit
from awq_jax.records.prompt import Prompt
from awq_jax.records.store import store


@pytest.fixture
def comparison(tmp_path):
    with store(path(tmp_path)) as one:
        base, other, prompts = small(one)
        yield compared(one, prompts, base, [other], [GREEDY])


def test_figures_are_those_of_all_tokens(comparison):
    (side,) = comparison.others
    n = [len("It is Paris.") + 1, len("Hi.") + 1]
    mean = (0.4 * n[0] + 0.01 * n[1]) / sum(n)
    assert side.kl == pytest.approx(mean)
    assert side.ppl == pytest.approx(2.718281828 ** (mean / 2))
    assert side.checks == 1
    assert [run.diverges for run in side.runs] == [6, None]
    assert [run.lost for run in side.runs] == [("contains",), ()]
    assert comparison.base.kl is None
    assert [past.name for past in comparison.history] == ["small"]


def test_an_answer_that_goes_on_diverges_at_its_end(tmp_path):
    base, other, prompt = known("a"), known("b"), Prompt("p", "q")
    with store(path(tmp_path)) as one:
        put(one, prompt, base, said("Hi."))
        put(one, prompt, other, said("Hi. And", stopped=False))
        (side,) = compared(one, [prompt], base, [other], [GREEDY]).others
    assert side.runs[0].diverges == 3
    assert (side.kl, side.top1, side.ppl, side.kl_p99) == (None,) * 4


def test_the_gate_names_who_is_to_blame(comparison):
    kl, top1, ppl, checks = judge(comparison, parse_gate("kl=0.05, top1=0.5,ppl=9,checks=0"))
    assert [one.passed for one in (kl, top1, ppl, checks)] == [False, True, True, False]
    assert kl.names == checks.names == ["capital"]
    assert str(checks) == "small: checks is 1 (answers that fail a check the base passes, at most 0): capital"
    assert all(one.passed for one in judge(comparison, parse_gate("kl=0.5,checks=1")))


def test_what_is_not_known_is_not_within(tmp_path):
    with store(path(tmp_path)) as one:
        found = compared(one, [Prompt("p", "q")], known("a"), [known("b")], [GREEDY])
    (verdict,) = judge(found, {"kl": 1.0})
    assert not verdict.passed
    assert "kl is not known" in str(verdict)


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ("kll=1", r"no limit 'kll' \(did you mean kl\?\)"),
        ("kl", "'kl' gives no number: give it as in kl=0.05"),
        ("kl=nan", "gives no number"),
        ("", "it says no limit"),
        ("kl=-1", "'kl=-1': give 0 or more"),
        ("top1=97", "'top1=97': give 0 to 1"),
        ("kl=0.1,kl=5", "kl is given twice"),
    ],
)
def test_gates_that_are_none(gate, says):
    with pytest.raises(InputError, match=says):
        parse_gate(gate)


def test_junit_has_a_case_for_each_limit_and_prompt(comparison):
    verdicts = judge(comparison, parse_gate("kl=0.05,top1=0.5"))
    (suite,) = ElementTree.fromstring(junit(comparison, verdicts))
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("4", "2")
    failures = {case.attrib["name"]: case.find("failure") for case in suite}
    assert failures["gate top1"] is None
    assert failures["greeting (greedy)"] is None
    assert "capital" in failures["gate kl"].text
    assert failures["capital (greedy)"].text == "fails contains, which the base passes; beyond kl: It is Lyon."


def test_junit_takes_any_answer(tmp_path):
    base, other = known("a"), known("b")
    prompt = Prompt("p", "q", checks={"contains": "x"})
    with store(path(tmp_path)) as one:
        put(one, prompt, base, first := said("x"))
        put(one, prompt, other, said("\x00\x1b<&\ud800"), base, far(first, 1))
        found = compared(one, [prompt], base, [other], [GREEDY])
    assert "\ufffd" in ElementTree.fromstring(junit(found, [])).find("*/testcase/failure").text
