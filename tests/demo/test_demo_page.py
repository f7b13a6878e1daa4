"""The demo as its users meet it: the program, its server, and the page in a browser."""

import io
import json
import shutil
import signal
import socket
import sys
import time
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from evaluation.demo.analysis import analyse, load_pair
from tests.helpers import noise, save_models
from tests.programs import ROOT, free_port, run, start

CHROMIUM = shutil.which("chromium")
expect.set_options(timeout=60_000)  # milliseconds: the machine may be busy


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("demo"))


def test_missing_digits_say_how_to_make_them(tmp_path):
    command = [sys.executable, "-m", "evaluation.demo"]
    done = run("env", "-C", tmp_path, f"PYTHONPATH={ROOT}", *command, check=False)
    assert done.returncode == 1
    assert "raptor_k3: no such folder. `bash training/reproduce.sh digits` makes" in done.stderr


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    """The program as a user starts it: its address, process, and folder of uploads."""
    port, uploads = free_port(), tmp_path_factory.mktemp("uploads")
    command = ["--teacher_head", folders / "head.safetensors", "--port", port]
    command += ["--max_upload_megabytes", "0.5", "--max_megapixels", "0.25"]
    process = start(
        sys.executable, "-m", "evaluation.demo", *command,
        DEMO_MODEL=str(folders / "raptor"), DEMO_TEACHER=str(folders / "teacher"),
        GRADIO_TEMP_DIR=str(uploads), GRADIO_ANALYTICS_ENABLED="True",
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}/"
    while True:
        if process.poll() is not None:
            break
        try:
            httpx.get(address)
            break
        except httpx.TransportError:
            time.sleep(0.1)
    yield SimpleNamespace(address=address, port=port, process=process)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "Traceback" not in printed  # uploads that can't be shown are no failures of the program


@pytest.fixture
def page(server):
    """The page in a browser, with all that it asked for and complained about."""
    if CHROMIUM is None:
        pytest.skip("needs chromium, which is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.errors, page.addresses = [], []
        page.on("request", lambda request: page.addresses.append(request.url))
        page.on("requestfailed", lambda request: note_failure(page, request))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        page.goto(server.address)
        expect(page.locator("#view img")).to_have_count(3)
        yield page
        browser.close()
    local = (server.address, "data:", "blob:")
    assert page.addresses and [a for a in page.addresses if not a.startswith(local)] == []


def note_failure(page, request):
    # Gradio ends the stream of an event's messages itself, once it has them all
    if "/queue/data?" not in request.url or request.failure != "net::ERR_ABORTED":
        page.errors.append(f"{request.url} {request.failure}")


def sources(page, part):
    return page.locator(f"#{part} img").evaluate_all("images => images.map(image => image.src)")


def upload(page, content, name="image.png"):
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.locator("#image input[type=file]").set_input_files(file)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def classes(page, model):
    return page.locator(f"#{model}_top dt").all_inner_texts()


def test_an_upload_changes_every_picture_and_the_classes(page, folders):
    before = {part: sources(page, part) for part in ("view", "strip", "curves")}
    assert [len(images) for images in before.values()] == [3, 14, 2]
    pair = load_pair(
        str(folders / "raptor"), str(folders / "teacher"),
        teacher_head=str(folders / "head.safetensors"),
    )  # fmt: skip
    upload(page, png(noise(5, (200, 300))))
    expect(page.locator("#view img").first).not_to_have_attribute("src", before["view"][0])
    page.wait_for_function(
        "old => document.querySelector('#curves img').src != old", arg=before["curves"][0]
    )
    for part, old in before.items():
        new = sources(page, part)
        assert len(new) == len(old) and not set(new) & set(old)
    analysis = analyse(pair, noise(5, (200, 300)))
    assert classes(page, "raptor") == list(analysis.raptor_top)
    assert classes(page, "teacher") == list(analysis.teacher_top)
    facts = page.locator("#view .facts").inner_text()
    assert f"cls {analysis.cosines['cls'][6]:.3f}" in facts
    assert page.errors == []


def test_the_keyboard_is_enough_and_pictures_have_words(page):
    first = sources(page, "view")
    page.locator("#layer input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#view figcaption").nth(2)).to_have_text("Raptor, layer 5 (block 1)")
    assert sources(page, "view")[0] == first[0]  # the image stays
    assert sources(page, "view")[1] != first[1]
    outline = "image => getComputedStyle(image).outlineStyle"
    assert page.locator("#strip .layer5 img").first.evaluate(outline) == "solid"
    assert page.locator("#strip .layer6 img").first.evaluate(outline) == "none"
    page.locator("#examples button").nth(4).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#view img").first).not_to_have_attribute("src", first[0])
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    assert page.errors == []


def test_what_can_not_be_shown_is_said_on_the_page(page):
    before, toast = sources(page, "view"), page.locator(".toast-wrap")
    refused = {
        b"no image": "This file can't be shown: it is broken",
        png(noise(0, (200, 200)))[:3000]: "This file can't be shown: it is broken",
        png(Image.new("RGB", (501, 500))): "or has more than 0.25 million pixels",
    }
    for content, message in refused.items():
        upload(page, content)
        expect(toast).to_contain_text(message)
        expect(page.locator("#image img")).to_have_count(0)
        page.locator(".toast-close").first.click()
        expect(toast).not_to_contain_text(message)
    assert page.errors == []
    upload(page, b"0" * 600_000)
    expect(toast).to_contain_text("exceed the maximum allowed size of 512.0 Kb")
    assert sources(page, "view") == before


def test_the_server_itself_refuses_what_is_too_large(server):
    files = {"files": ("image.png", b"0" * 600_000, "image/png")}
    assert httpx.post(f"{server.address}gradio_api/upload", files=files).status_code == 413


def answer(server, index, data):
    """What an event ends in, sent by a client that is no browser."""
    event = {"data": data, "fn_index": index, "session_hash": f"session{index}"}
    assert httpx.post(f"{server.address}gradio_api/queue/join", json=event).status_code == 200
    query = {"session_hash": event["session_hash"]}
    with httpx.stream("GET", f"{server.address}gradio_api/queue/data", params=query) as lines:
        messages = [json.loads(line[5:]) for line in lines.iter_lines() if line]
    [done] = [message for message in messages if message["msg"] == "process_completed"]
    return done


def test_addresses_are_not_fetched(server):
    """Gradio downloads the `path` of a file in an event, also of a part that takes no file."""
    config = httpx.get(f"{server.address}config").json()
    for dependency in config["dependencies"]:
        if not dependency["inputs"]:
            continue
        for mark in ({}, {"meta": {"_type": "gradio.FileData"}}):
            data = [{"path": "http://example.org/image.png", **mark}] * len(dependency["inputs"])
            error = answer(server, dependency["id"], data)["output"]["error"]
            assert error == "Upload the file itself: no address is fetched."


def test_files_of_the_machine_are_not_served(server, folders, tmp_path):
    noise(0, (20, 20)).save(tmp_path / "secret.png")
    config = httpx.get(f"{server.address}config").json()
    for dependency in config["dependencies"]:
        for file in ({"path": str(tmp_path / "secret.png")}, {"path": "/dev/zero"}):
            data = [file] * len(dependency["inputs"])
            if data:
                error = answer(server, dependency["id"], data)["output"]["error"]
                assert error == "Upload the file itself: no other one is opened."
    for path in (folders / "raptor" / "config.json", ROOT / "README.md", "/etc/passwd"):
        assert httpx.get(f"{server.address}gradio_api/file={path}").status_code in (403, 404)


def test_only_this_machine_is_listened_to(server):
    listening = {}
    for host in ("127.0.0.1", "127.0.0.2"):  # a server on 0.0.0.0 answers on all addresses
        with socket.socket() as client:
            client.settimeout(2)
            listening[host] = client.connect_ex((host, server.port)) == 0
    assert listening == {"127.0.0.1": True, "127.0.0.2": False}


def test_nothing_is_told_to_anyone(server):
    assert httpx.get(f"{server.address}config").json()["analytics_enabled"] is False
