"""The page in a real browser: its keys, filters and orders work, it asks the network for nothing."""

import html
import json
import re
import shutil
import subprocess

import pytest
from stored import GREEDY, far, known, path, put, said

from awq_jax.records.comparison import compared
from awq_jax.records.page import page
from awq_jax.records.prompt import Prompt
from awq_jax.records.store import store

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not here")]
SCRIPT = """
<pre id="found"></pre><script>
onerror = (what, _, line) => $("found").textContent = JSON.stringify({ failed: what + " " + line });
const press = (key, on = document.body) => on.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const names = () => [...document.querySelectorAll("details:not([hidden]) .name")].map(e => e.firstChild.textContent);
const choose = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); };
const seen = name => getComputedStyle(document.querySelector(name)).display !== "none";
const found = { first: names(), theme: document.documentElement.dataset.theme };
choose("sort", "name"); found.named = names();
choose("sort", "order"); found.ordered = names();
choose("search", "LYON"); found.searched = names(); press("Escape");
choose("tag", "chat"); found.tagged = names(); choose("tag", "");
choose("which", "lost"); found.lost = names(); choose("which", "");
found.words = [seen(".by-words"), seen(".by-kl")];
press("e"); found.open = [...document.querySelectorAll("details")].every(d => d.open);
found.words = [seen(".by-words"), seen(".by-kl")];
press("v"); found.kl = [seen(".by-words"), seen(".by-kl")];
press("d"); found.flipped = document.documentElement.dataset.theme;
press("j"); press("j"); found.at = document.activeElement.querySelector(".name").firstChild.textContent;
press("/"); found.search = document.activeElement.id;
document.querySelector("td[data-t]").dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
found.readout = $("readout").textContent;
found.wide = document.documentElement.scrollWidth - innerWidth;
found.asked = performance.getEntriesByType("resource").length;
$("found").textContent = JSON.stringify(found);
</script>"""


@pytest.mark.parametrize("width", [1280, 500])
def test_keys_filters_and_orders(tmp_path, width):
    base, other = known("dense"), known("small", 2e9, 0.005)
    prompts = [
        Prompt("b capital", "Capital?", ("facts",), {"contains": "Paris"}),
        Prompt("a greeting", "Hello", ("chat",)),
        Prompt("c word", "long" * 100),
    ]
    with store(path(tmp_path)) as one:
        for k, (prompt, answers) in enumerate(zip(prompts, (("Paris", "Lyon"), ("Hi", "Hi"), ("x", "y")), strict=True)):
            put(one, prompt, base, first := said(answers[0]))
            put(one, prompt, other, said(answers[1]), base, far(first, (0.4, 0.01, 2.0)[k]))
        found = compared(one, prompts, base, [other], [GREEDY])
    file = tmp_path / "index.html"
    file.write_text(page(found) + SCRIPT, "utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    flags += [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'user'}"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    told = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert "failed" not in told, told
    assert told["first"] == ["c word", "b capital", "a greeting"]
    assert told["named"] == ["a greeting", "b capital", "c word"]
    assert told["ordered"] == [prompt.name for prompt in prompts]
    assert told["searched"] == told["lost"] == ["b capital"]
    assert told["tagged"] == ["a greeting"]
    assert told["open"]
    assert (told["words"], told["kl"]) == ([True, False], [False, True])
    assert {told["theme"], told["flipped"]} == {"light", "dark"}
    assert (told["at"], told["search"]) == ("a greeting", "search")
    assert told["readout"].startswith("layers_0/attn/q/kernel: 4 bits")
    assert told["wide"] <= 0 == told["asked"]
