"""The report is one file, says what the checkpoint is, and its figures agree with the accounting."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from moesvd_quant.checkpoint.density import density, expert_bits
from moesvd_quant.evaluation.inputs import EvalSpec
from moesvd_quant.evaluation.record import RECORD, evaluate, write
from moesvd_quant.evaluation.report import write_report
from moesvd_quant.evaluation.report_stage import stage_of
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that tags close; collects texts, what is loaded from elsewhere, and what is wider than a small screen."""

    def __init__(self, content):
        super().__init__()
        self.open, self.texts, self.sources, self.boxed, self.loose = [], [], [], [], []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        if tag in ("table", "pre", "img"):
            (self.boxed if ("div", "wide") in self.open else self.loose).append(tag)
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def run(make_model, text, tmp_path_factory):
    """A run of MoE-SVD and GPTQ with evaluations, and a healing curve beside its last stage."""
    out = tmp_path_factory.mktemp("report")
    small = [f"calibration.dataset={text}", "calibration.samples=24", "calibration.length=64", "evaluate.perplexity=[]"]
    recipe = load_recipe("moe-svd-paper-gptq4", small)
    folders = Run(recipe, make_model("mixtral"), out).run()
    for source, folder in [(make_model("mixtral"), out / "00-original"), *((f, f) for f in folders)]:
        write(evaluate(source, EvalSpec({"words": str(text)}, length=64)), folder / RECORD)
    (folders[-1] / "loss.csv").write_text("step,loss,validation_perplexity\n1,3.0,\n2,2.5,12.0\n3,2.2,\n")
    return out


def test_it_is_one_file_that_loads_nothing(run, tmp_path):
    write_report(run, tmp_path / "x.html")
    page = Page((tmp_path / "x.html").read_text())
    assert len(page.sources) == 7 and all(s.startswith("data:image/svg+xml;base64,") for s in page.sources)
    for source in page.sources:
        drawn = base64.b64decode(source.partition(",")[2])
        assert ElementTree.fromstring(drawn).tag.endswith("svg")
        assert not re.search(rb"(href|src)=\"(https?:|/)", drawn)
    said = " ".join(" ".join(page.texts).split())
    titles = ("Perplexity against bytes", "Healing of", "Layer sensitivity", "Calibration coverage", "peak memory")
    for wanted in ("moe-svd-paper40-gptq4", "method: moe_svd", "paired bootstrap", *titles):
        assert wanted in said, wanted
    again = tmp_path / "y.html"
    write_report(run, again)
    assert again.read_bytes() == (tmp_path / "x.html").read_bytes()


def test_seconds_of_the_walk_and_of_each_layer_stand_apart(run, tmp_path):
    first, second = (json.loads((run / name / "run.json").read_text()) for name in ("01-svd", "02-gptq"))
    assert len(first["walk_layer_seconds"]) in (0, 2) and second["walk_layer_seconds"] == []  # read once, or known
    for one in (first, second):
        assert len(one["layer_seconds"]) == 2 and 0 < sum(one["layer_seconds"]) <= one["seconds"] + 0.01
    write_report(run, tmp_path / "x.html")
    assert "Seconds over layers" in (tmp_path / "x.html").read_text()


def test_a_folder_of_runs_gives_one_page_that_compares_them(run, tmp_path):
    runs = tmp_path / "runs"
    for name in ("one", "two"):
        shutil.copytree(run, runs / name)
    write_report(runs, tmp_path / "runs.html")
    content = (tmp_path / "runs.html").read_text()
    page = Page(content)
    assert len(page.sources) == 1 and page.sources[0].startswith("data:image/svg+xml;base64,")
    said = " ".join(" ".join(page.texts).split())
    manifest = json.loads((run / "02-gptq" / "moesvd.json").read_text())
    size = round(manifest["accounting"]["disk_bytes"] / 1e6, 2)
    for wanted in (f"one {manifest['name']} {size}", f"two {manifest['name']} {size}", "Recipe of two", "2 runs"):
        assert wanted in said, wanted
    assert content.count("<td>original</td>") == 1 and "paired bootstrap" in said


@pytest.mark.parametrize("several", [False, True])
def test_what_is_wide_scrolls_by_itself(run, tmp_path, several):
    """Tables, pictures and recipes on a telephone: the page itself never becomes wider than the screen."""
    folder = shutil.copytree(run, tmp_path / "runs" / "one").parent if several else run
    write_report(folder, tmp_path / "x.html")
    content = (tmp_path / "x.html").read_text()
    page = Page(content)
    assert page.loose == [] and {"table", "pre", "img"} <= set(page.boxed)
    assert ".wide { overflow-x: auto; }" in content and 'name="viewport" content="width=device-width' in content


@pytest.mark.parametrize("stage", ["01-svd", "02-gptq"])
def test_density_weighs_projections_by_their_size(run, stage):
    found = stage_of(run / stage)
    given = density(StreamedModel(run / stage), found.layout)
    weights = {
        path: sum(shape[0] * shape[1] for name, shape in shapes.items() if name != "gate_up")
        for path, shapes in found.shapes.items()
    }
    assert given.keys() == found.shapes.keys()
    stored = sum(sum(row) * weights[path] for path, row in given.items())
    assert stored == pytest.approx(8 * found.manifest["accounting"]["expert_bytes"])


@pytest.mark.parametrize("stage", ["01-svd", "02-gptq"])
def test_bits_of_the_experts_add_up_to_the_accounting(run, stage):
    found = stage_of(run / stage)
    bits = sum(
        expert_bits(parts, found.shapes[path][name], found.experts[path], found.bits).sum()
        * found.shapes[path][name][0]
        * found.shapes[path][name][1]
        for path, projections in found.layout.experts.items()
        for name, parts in projections.items()
    )
    assert bits == pytest.approx(8 * found.manifest["accounting"]["expert_bytes"])


def test_what_was_not_measured_is_said(run, make_model, tmp_path):
    import shutil

    shutil.copytree(run / "02-gptq", tmp_path / "alone", ignore=shutil.ignore_patterns(RECORD, "run.json", "loss.csv"))
    write_report(tmp_path / "alone", tmp_path / "z.html")
    said = " ".join(Page((tmp_path / "z.html").read_text()).texts)
    assert "Not evaluated yet" in said and "peak memory" not in said
    with pytest.raises(ValueError, match="no checkpoint of ours"):
        write_report(make_model("mixtral"), tmp_path / "w.html")
