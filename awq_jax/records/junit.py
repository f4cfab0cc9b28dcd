"""Verdicts as JUnit XML, which every CI shows: a suite for each checkpoint, a case for each limit and each prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from awq_jax.records.comparison import Comparison, Side
from awq_jax.records.gate import Verdict

FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML does not have."""


def junit(comparison: Comparison, verdicts: Sequence[Verdict]) -> str:
    """The XML. A prompt's case fails where an answer lost a check that its base passes, or is beyond a limit that its
    checkpoint is beyond."""
    root = ElementTree.Element("testsuites", name="awq-jax compare")
    for side in comparison.others:
        suite(root, side, [one for one in verdicts if one.digest == side.known.digest])
    ElementTree.indent(root)
    return ElementTree.tostring(root, "unicode", xml_declaration=True) + "\n"


def suite(root: ElementTree.Element, side: Side, verdicts: Sequence[Verdict]) -> None:
    """Adds the suite of one checkpoint."""
    cases = [(f"gate {one.limit}", 0.0, "" if one.passed else str(one)) for one in verdicts]
    for run in side.runs:
        beyond = [one.limit for one in verdicts if any(run is other for other in one.offending)]
        faults = [f"fails {name}, which the base passes" for name in run.lost] + [f"beyond {name}" for name in beyond]
        seconds = run.answer["prefill"] + run.answer["decode"] if run.answer else 0.0
        told = "; ".join(faults) + (f": {run.answer['text']}" if faults and run.answer else "")
        cases.append((f"{run.prompt.name} ({run.setting.name})", seconds, told))
    failures = sum(bool(fault) for *_, fault in cases)
    of = ElementTree.SubElement(root, "testsuite", name=clean(side.name), tests=str(len(cases)), failures=str(failures))
    for name, seconds, fault in cases:
        case = ElementTree.SubElement(
            of, "testcase", classname=clean(side.name), name=clean(name), time=f"{seconds:.3f}"
        )
        if fault:
            ElementTree.SubElement(case, "failure", message=clean(fault)[:200]).text = clean(fault)


def clean(text: str) -> str:
    return FORBIDDEN.sub("\ufffd", text)
