"""A newcomer's way, step by step: from the demo to an approved, served model, in the browser."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from playwright.sync_api import Frame, Page, expect

from pruners import PrunableViT
from search.records.files import read_front
from search.records.front import Front
from search.tracking.addresses import local_uri
from tests.browser.copied import block, blocks
from tests.browser.demo import Demo, keep, python, server

CODE = [*blocks("Serve it", "python"), *blocks("Load it", "python")]
"""Lines that use a model: what was approved, and what was exported."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="session")
def client(demo: Demo) -> MlflowClient:
    return MlflowClient(tracking_uri=local_uri(demo.directory))


@pytest.fixture(scope="session")
def front(demo: Demo) -> Front:
    return read_front(demo.directory / "front.json")


def page_of_the_parent(demo: Demo, mlflow_ui: str) -> str:
    """The address that the sweep has printed, on the server's port."""
    printed = re.search(r"http://127\.0\.0\.1:5000(/\S+)", demo.said)
    assert printed, demo.said
    return mlflow_ui + printed[1]


def test_the_sweep_says_how_to_look_at_it(demo: Demo) -> None:
    command = f"mlflow ui --backend-store-uri sqlite:///{demo.directory}/mlflow.db"
    assert command in demo.said


def test_the_parent_run_reads_like_a_page(
    demo: Demo, front: Front, mlflow_ui: str, browser_page: Page
) -> None:
    page = browser_page
    page.goto(page_of_the_parent(demo, mlflow_ui))
    page.get_by_text("Show more").click()
    note = page.locator("table", has=page.get_by_role("columnheader", name="images/s"))
    rows = note.locator("tbody tr")
    expect(rows).to_have_count(len(front.members) + 1)
    for row, member in zip(rows.all(), front.members, strict=False):
        expect(row).to_contain_text(f"{member.val_top1:.1f}")
        expect(page.get_by_text(member.plan_line[:60]).first).to_be_visible()
    expect(page.get_by_text(f"{demo.directory.parent}/val.parquet").first).to_be_visible()
    keep(page, "parent")
    member = front.members[0]
    with page.context.expect_page() as opened:  # in a window of its own
        note.get_by_role("link", name=member.trial).click()
    child = opened.value
    expect(child.get_by_role("heading", name=member.name)).to_be_visible()
    expect(child.get_by_text("effective_gmacs").first).to_be_visible()
    keep(child, "child")
    child.get_by_role("tab", name="Artifacts").click()
    child.get_by_text("plan.png", exact=True).first.click()
    child.locator("img[src^='blob:']").first.wait_for()
    keep(child, "plan")
    child.close()


def frame_of(page: Page) -> Frame:
    """The sandboxed frame in which MLflow shows an artifact."""
    frame = page.locator("iframe").first
    assert frame.get_attribute("sandbox") == "allow-scripts"
    handle = frame.element_handle()
    assert handle is not None
    content = handle.content_frame()
    assert content is not None
    return content


def test_the_plot_is_found_and_says_a_plan(
    demo: Demo, front: Front, mlflow_ui: str, browser_page: Page
) -> None:
    page, asked_for = browser_page, []
    page.on("request", lambda request: asked_for.append(request.url))
    page.goto(page_of_the_parent(demo, mlflow_ui))
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("front.html", exact=True).first.click()
    frame = frame_of(page)
    frame.locator(".scatterlayer .trace").nth(1).wait_for()  # the front and the dense point
    *dominated, members, dense = frame.locator(".scatterlayer .trace").all()
    for number, member in enumerate(front.members):
        members.locator(".points path").nth(number).hover(force=True)
        hover = frame.locator(".hoverlayer .hovertext").first
        expect(hover).to_contain_text(member.name)
        expect(hover).to_contain_text("heads")  # the plan, in words
    keep(page, "front")
    dense.locator(".points path").hover(force=True)
    expect(frame.locator(".hoverlayer .hovertext").first).to_contain_text("0000 dense")
    drawn = sum(trace.locator(".points path").count() for trace in dominated)
    assert drawn == 4 - len(front.members)  # plotly leaves a trace without points out
    box = page.locator("iframe").first.bounding_box()
    assert box is not None
    shown = frame.locator(".main-svg").first.bounding_box()
    assert shown is not None
    assert shown["width"] < box["width"] + 1  # pixels are whole
    assert shown["height"] < box["height"] + 1
    assert all(url.startswith((mlflow_ui, "blob:", "data:")) for url in asked_for), asked_for
    for name in ("hypervolume.png", "kept.png", "methods.png", "classes.png"):
        page.get_by_text(name, exact=True).first.click()
        page.locator("img[src^='blob:']").first.wait_for()
        keep(page, name.removesuffix(".png"))


def test_runs_are_found_by_a_filter(
    demo: Demo, front: Front, client: MlflowClient, mlflow_ui: str, browser_page: Page
) -> None:
    page = browser_page
    experiment = client.get_experiment_by_name("sample")
    assert experiment is not None
    page.goto(
        f"{mlflow_ui}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    )
    box = page.get_by_placeholder("metrics.rmse < 1")
    limit = front.members[-1].gmacs
    box.fill(f'tags.front = "true" and metrics.gmacs < {limit}')
    box.press("Enter")
    page.get_by_role("gridcell", name="sample").get_by_role("button").first.click()  # unfold
    *fewer, dearest = front.members
    expect(page.get_by_role("link", name=dearest.name)).to_have_count(0)
    for member in fewer:
        expect(page.get_by_role("link", name=member.name)).to_be_visible()
    expect(page.get_by_role("link", name="0000 dense")).to_have_count(0)
    keep(page, "filter")
    page.get_by_role("button", name="Views").click()
    page.get_by_text("front", exact=True).last.click()
    for member in front.members:
        expect(page.get_by_role("link", name=member.name)).to_be_visible()
    expect(page.get_by_role("link", name="0000 dense")).to_have_count(0)
    for column in ("val_top1", "cost_ratio"):
        expect(page.get_by_text(column, exact=True).first).to_be_visible()
    keep(page, "view")


def as_here(code: str, demo: Demo, out: Path | None = None) -> str:
    """Return what a reader of the page copies, for this sweep and this place of an export."""
    code = code.replace("results/sample", str(demo.directory))
    return re.sub(r"\bsmall\b", str(out), code) if out else code


def test_a_version_is_approved(
    demo: Demo, client: MlflowClient, mlflow_ui: str, browser_page: Page
) -> None:
    page = browser_page
    page.goto(f"{mlflow_ui}/#/models/sample?workflowType=machine_learning")
    expect(page.get_by_text("best-under-50").first).to_be_visible()
    _, *command = shlex.split(as_here(block("Approve a model", "python -m search promote"), demo))
    said = python(*command)
    version = client.get_model_version_by_alias("sample", "approved")
    assert f"approved version 1 of sample: trial {version.tags['trial']}" in said
    served = as_here(block("Serve it", "MLFLOW_TRACKING_URI"), demo)
    assert f"serve it with: {served}" in said + "\n"
    page.reload()
    expect(page.get_by_text("approved").first).to_be_visible()
    keep(page, "model")
    page.goto(f"{mlflow_ui}/#/models/sample/versions/1?workflowType=machine_learning")
    expect(page.get_by_text("onnxruntime").first).to_be_visible()
    keep(page, "version")


@pytest.fixture(scope="session")
def approved(demo: Demo, client: MlflowClient) -> PrunableViT:
    trial = client.get_model_version_by_alias("sample", "approved").tags["trial"]
    return PrunableViT.load(next((demo.directory / "models" / trial).glob("epoch-*"))).eval()


def test_what_was_approved_is_served(demo: Demo, approved: PrunableViT) -> None:
    """By the page's two commands, word for word but for the port."""
    variable, program, *arguments = shlex.split(
        as_here(block("Serve it", "MLFLOW_TRACKING_URI"), demo).replace("--port 5001", "")
    )
    assert program == "mlflow"
    ask = as_here(block("Serve it", "curl"), demo)
    with server(*arguments, **dict([variable.split("=", 1)])) as address:
        ask = ask.replace("http://127.0.0.1:5001", address)
        answer = subprocess.run(ask, shell=True, capture_output=True, text=True, check=True)
    logits = np.asarray(json.loads(answer.stdout)["predictions"]["logits"], dtype=np.float32)
    (example,) = re.findall(r"@(\S+)", ask)
    images = torch.tensor(json.loads(Path(example).read_text())["inputs"])
    with torch.no_grad():
        np.testing.assert_allclose(logits, approved(images).numpy(), atol=1e-4)


@pytest.fixture(scope="session")
def exported(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's command exports."""
    out = tmp_path_factory.mktemp("export") / "small"
    _, *command = shlex.split(as_here(block("Export it", "python -m search export"), demo, out))
    python(*command)
    return out


USE = """
import sys
import numpy as np
images = np.load("images.npy")
if {torch}:
    import torch
    torch.set_grad_enabled(False)
    images = torch.from_numpy(images)
{code}
assert {torch} or not {{"torch", "pruners", "search"}} & sys.modules.keys()
np.save("logits.npy", np.asarray(logits))
"""


@pytest.mark.parametrize("number", range(len(CODE)))
def test_lines_of_code_do_what_they_say(
    number: int, demo: Demo, exported: Path, approved: PrunableViT, tmp_path: Path
) -> None:
    code = as_here(CODE[number], demo, exported)
    needs_torch = "import torch" in code or "PrunableViT" in code
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", USE.format(torch=needs_torch, code=code)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = approved(images).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_a_page(
    scheme: str, demo: Demo, front: Front, browser_page: Page, tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    python("-m", "search", "report", str(demo.directory), "--out", str(out))
    page, trouble = browser_page, []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(out.as_uri())
    page.locator(".scatterlayer .points path").first.wait_for()
    expect(page.get_by_text(f"{front.hypervolume:.4f}").first).to_be_visible()
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue, *_ = map(float, re.findall(r"[\d.]+", paper))
    assert (red + green + blue > 384) == (scheme == "light")
    assert not trouble
    keep(page, f"report-{scheme}")
