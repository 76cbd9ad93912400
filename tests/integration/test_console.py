"""The console in a real browser, against a real endpoint: what it shows is what the endpoint says.

With CONSOLE_SCREENSHOTS set to a folder, pictures of it are left there, to be looked at.
"""

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from endpoints import LocalServer, local_server, make_checkpoint
from mlflow import MlflowClient
from pages import CHROMIUM
from PIL import Image

from ray_app.core.evaluation import AlignmentEvaluator, TrainingMeans
from ray_app.core.metrics import THETAS, rate_key
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.pair_store import PairStore

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
SAMPLES = ("Road by day", "Crossing", "Town at dusk")


def registered(tmp_path: Path, store: PairStore) -> tuple[str, dict[str, Any]]:
    """(tracking URI, evaluation): a champion in a registry, judged on the store's pairs, as `promote` leaves one."""
    folder = make_checkpoint(tmp_path / "checkpoint")
    checkpoint = load_checkpoint(folder)
    event, target = store.read_rows(np.arange(len(store.index)))
    means = TrainingMeans.of(target).mean_target(1 / 255)
    evaluator = AlignmentEvaluator(checkpoint.adapter, means, 1 / 255, 1 / 255, images=True)
    evaluator.add(torch.from_numpy(event), torch.from_numpy(target))
    previous = np.arange(len(event)) - 1
    metrics = evaluator.result([str(s) for s in store.index.sequence], previous).metrics()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("alignment", str(tmp_path / "artifacts"))).info.run_id
    client.log_artifacts(run, str(folder), "checkpoint")
    client.create_registered_model("alignment-adapter")
    evaluation = {**metrics, "split": "sequence", "source": "numpy"}
    tags = {"checkpoint_sha256": checkpoint.sha256, "evaluation": json.dumps(evaluation)}
    version = client.create_model_version("alignment-adapter", f"runs:/{run}/checkpoint", run, tags=tags)
    client.set_registered_model_alias("alignment-adapter", "champion", version.version)
    return uri, evaluation


@pytest.fixture(scope="module")
def endpoint(
    tmp_path_factory: pytest.TempPathFactory, small_store: Path
) -> Iterator[tuple[LocalServer, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("console")
    uri, evaluation = registered(folder, PairStore.open(small_store))
    with local_server("models:/alignment-adapter@champion", tracking_uri=uri) as server:
        yield server, evaluation


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


def opened(browser: Any, server: LocalServer, width: int = 1400, height: int = 1000, scheme: str = "light") -> Any:
    """The page, once it shows the model. Whatever the browser complains of is kept in `page.complaints`."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.complaints = []
    page.on("console", lambda said: page.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(f"http://{server.url}/")
    page.get_by_text("serving version").wait_for(timeout=120_000)
    return page


def closed(page: Any, name: str = "") -> None:
    """Leaves a picture where one is wanted; fails on anything that the browser complained of."""
    if name and (folder := os.environ.get("CONSOLE_SCREENSHOTS")):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)
    complaints = page.complaints
    page.close()
    assert not complaints


def shown_in(page: Any, side: str) -> Any:
    """The pixels of a picture on the page."""
    source = page.locator(f"#{side}-picture img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB"))


def rows_of(page: Any) -> dict[str, str]:
    """What the table under the curve says."""
    return {row.locator("th").inner_text(): row.locator("td").inner_text() for row in page.locator("#rates tr").all()}


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("light", 1400, "light"), ("dark", 1400, "dark"), ("narrow", 360, "light")]
)
def test_a_sample_is_aligned_and_judged(browser: Any, endpoint: Any, name: str, width: int, scheme: str) -> None:
    server, _ = endpoint
    page = opened(browser, server, width, scheme=scheme)
    for sample in SAMPLES:
        page.get_by_role("button", name=sample).click()
        page.locator("#target-picture img").wait_for()
        page.locator("#verdict strong").wait_for()
    said = page.locator("#verdict").inner_text()
    found = re.search(r"cos_sim ([\d.]+) is (not )?above θ 0\.80\. .* scores ([\d.]+)", said)
    assert found
    accepted = page.locator("#verdict strong").inner_text() == "Accepted"
    assert accepted == (float(found[1]) > 0.8) == (found[2] is None)
    assert page.locator("#problem").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert page.locator(".picture img").first.evaluate("image => image.naturalWidth") == 16
    closed(page, f"console-{name}")


def test_the_pictures_are_those_of_the_endpoint(browser: Any, endpoint: Any, tmp_path: Path) -> None:
    server, _ = endpoint
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "event.png")
    page = opened(browser, server)
    page.set_input_files("#event-file", tmp_path / "event.png")
    page.get_by_text("Add the target image").wait_for()
    assert np.array_equal(shown_in(page, "event"), pixels)
    assert page.get_by_text("not given").is_visible()
    page.set_input_files("#target-file", tmp_path / "event.png")
    page.locator("#verdict strong").wait_for()
    assert "scores 1.000" in page.locator("#verdict").inner_text()
    closed(page, "console-own")


DROP = """(zone, [kind, name, data]) => {
    const files = new DataTransfer();
    files.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
    zone.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: files}));
    return zone.classList.contains("over");
}"""


def test_files_are_dropped_on_either_side(browser: Any, endpoint: Any) -> None:
    out = io.BytesIO()
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    data = base64.b64encode(out.getvalue()).decode()
    page = opened(browser, endpoint[0])
    event, target = (page.locator(f'.drop[data-side="{side}"]') for side in ("event", "target"))
    assert event.evaluate(DROP, ["dragover", "event.png", data])
    assert not event.evaluate(DROP, ["drop", "event.png", data])
    page.get_by_text("Add the target image").wait_for()
    assert page.locator("#event-name").inner_text() == "event.png"
    assert np.array_equal(shown_in(page, "event"), pixels)
    target.evaluate(DROP, ["drop", "target.png", data])
    page.locator("#verdict strong").wait_for()
    assert "scores 1.000" in page.locator("#verdict").inner_text()
    closed(page)


def test_a_recording_is_drawn(browser: Any, endpoint: Any, tmp_path: Path) -> None:
    rng, count = np.random.default_rng(2), 5000
    x, y, p = (rng.integers(0, limit, count) for limit in (64, 48, 2))
    events = {"x": x, "y": y, "t": np.arange(count), "p": p}
    np.save(tmp_path / "drive.npy", events, allow_pickle=True)  # type: ignore[arg-type]
    page = opened(browser, endpoint[0])
    page.set_input_files("#event-file", tmp_path / "drive.npy")
    page.get_by_label("width").fill("64")
    page.get_by_label("height").fill("48")
    page.get_by_label("height").press("Enter")
    page.locator("#aligned-picture img").wait_for()
    assert page.locator("#event-name").inner_text() == "drive.npy"
    closed(page, "console-recording")


def test_a_refusal_of_the_endpoint_is_shown_in_its_words(browser: Any, endpoint: Any, tmp_path: Path) -> None:
    page = opened(browser, endpoint[0])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    page.set_input_files("#event-file", tmp_path / "broken.png")
    page.get_by_role("alert").wait_for()
    assert "no readable image" in page.get_by_role("alert").inner_text()
    assert re.search(r"\(request [\w-]+\)", page.get_by_role("alert").inner_text())
    (tmp_path / "words.txt").write_text("words")
    page.set_input_files("#event-file", tmp_path / "words.txt")
    assert "use a .png or .jpg image" in page.get_by_role("alert").inner_text()
    page.get_by_role("button", name="Crossing").click()
    page.get_by_role("alert").wait_for(state="hidden")
    page.complaints[:] = [said for said in page.complaints if "422" not in said]  # the browser notes the refusal too
    closed(page)


def test_theta_slides_over_the_curve_by_keyboard(browser: Any, endpoint: Any) -> None:
    server, evaluation = endpoint
    page = opened(browser, server)
    page.get_by_role("button", name="Crossing").click()
    page.locator("#verdict strong").wait_for()
    cosine = float(re.search(r"cos_sim ([\d.]+)", page.locator("#verdict").inner_text())[1])  # type: ignore[index]
    page.locator("#theta").focus()
    for theta in reversed(THETAS):
        while float(page.locator("#theta-value").inner_text()) > theta + 0.001:
            page.keyboard.press("ArrowLeft")
        while float(page.locator("#theta-value").inner_text()) < theta - 0.001:
            page.keyboard.press("ArrowRight")
        rows, key = rows_of(page), rate_key(theta)
        assert rows["adapter"] == f"{100 * evaluation['cosine_accept_rate'][key]:.1f} %"
        assert (
            rows["mean_target"] == f"{100 * evaluation['baselines']['mean_target']['cosine_accept_rate'][key]:.1f} %"
        )
        assert len(rows) == 1 + len(evaluation["baselines"])
        assert (page.locator("#verdict strong").inner_text() == "Accepted") == (cosine > theta)
    page.keyboard.press("ArrowRight")
    assert all(rate.startswith("≈") for rate in rows_of(page).values())
    assert page.locator("#chart polyline").count() == 1 + len(evaluation["baselines"])
    assert page.locator("#theta").get_attribute("aria-valuetext").startswith("0.51")
    closed(page)


def test_everything_is_reached_by_tab_and_has_a_name(browser: Any, endpoint: Any) -> None:
    page = opened(browser, endpoint[0])
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert reached[: len(SAMPLES) + 4] == ["Skip to the input", "event-file", "target-file", *SAMPLES, "theta"]
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input, [role=group]')].filter((e) => !(e.textContent.trim()
        || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.labels?.length)).length"""
    )
    assert unnamed == 0
    closed(page)


def test_it_shows_the_model_in_service_and_the_live_numbers(browser: Any, endpoint: Any) -> None:
    server, evaluation = endpoint
    page = opened(browser, server)
    served = page.locator("#served").inner_text()
    for words in ("models:/alignment-adapter@champion", "lightweight", "768 → 768", evaluation["best_baseline"]):
        assert words in served
    page.locator("#since", has_text="since").wait_for()
    before = server.endpoint.telemetry.snapshot(0).codes.total()
    page.get_by_role("button", name="Crossing").click()
    page.locator("#verdict strong").wait_for()
    page.wait_for_timeout(1500)
    shown = int(re.search(r"requests\s+([\d,]+)", page.locator("#live").inner_text())[1].replace(",", ""))  # type: ignore[index]
    assert before < shown <= server.endpoint.telemetry.snapshot(0).codes.total()
    assert float(page.locator("#rate").inner_text()) > 0
    closed(page)


def test_a_token_is_asked_for_and_forgotten(browser: Any, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"me:infer:{hashlib.sha256(b'secret').hexdigest()}\n")
    tokens.chmod(0o600)
    with local_server(make_checkpoint(tmp_path / "checkpoint"), token_file=tokens) as server:
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.goto(f"http://{server.url}/")
        field = page.get_by_label("This endpoint requires a token")
        field.wait_for()
        assert field.evaluate("field => field === document.activeElement")
        if folder := os.environ.get("CONSOLE_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/console-token.png")
        field.fill("wrong")
        field.press("Enter")
        page.get_by_text("The token was rejected").wait_for()
        field.fill("secret")
        field.press("Enter")
        page.get_by_text("serving version").wait_for()
        page.get_by_role("button", name="Crossing").click()
        page.locator("#verdict strong").wait_for()
        assert "No acceptance was recorded" in page.locator("#curve-note").inner_text()
        assert page.evaluate("JSON.stringify({...localStorage, ...sessionStorage}) + document.cookie") == "{}"
        page.reload()
        field.wait_for()
        page.close()


def test_an_endpoint_that_goes_away_is_noticed(browser: Any, tmp_path: Path) -> None:
    with local_server(make_checkpoint(tmp_path / "checkpoint")) as server:
        page = opened(browser, server)
    page.get_by_text("the endpoint does not answer").wait_for(timeout=120_000)
    page.close()
