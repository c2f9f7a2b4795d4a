"""`neg view` as a browser, and as those who should not, meet it: the real server on the loopback interface."""

import html
import re
import shutil
import signal
import socket
from pathlib import Path

import httpx
import pytest
from support import neg
from views import EVIL, NAME, hostile_runs, serving

from negcore.store.reader import open_negs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = hostile_runs(tmp_path_factory.mktemp("view"))
    (root.parent / "secret.html").write_text("secret")
    (root / "copy" / "figure.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    return root


@pytest.fixture(scope="module")
def server(root):
    with serving(root) as found:
        yield found


@pytest.fixture(scope="module")
def browser(server):
    """A client that opened the printed address."""
    with httpx.Client(base_url=server.address, follow_redirects=True, timeout=120) as client:
        assert client.get("/", params={"token": server.token}).status_code == 200
        yield client


def part_of(client, dataset, split="test"):
    """The name of a split in addresses, as the page of its run has it."""
    page = client.get("/run", params={"run": f"runs/{NAME}"}).text
    (found,) = [one for one in re.findall(r'href="(/rows\?[^"]*)"', page) if dataset in one and one.endswith(split)]
    return html.unescape(found)


def text_of(page, status=200):
    """The texts of a page, without its markup."""
    assert page.status_code == status, page.text
    return html.unescape(re.sub(r"<[^>]*>", "", page.text))


def test_the_index_names_every_run_and_leads_to_it(browser):
    page = browser.get("/")
    assert f"runs/{NAME}" in text_of(page) and "runs/copy" in text_of(page)
    assert "finished" in text_of(page)
    for link in re.findall(r'href="(/run\?[^"]*)"', page.text):
        assert browser.get(html.unescape(link)).status_code == 200


def test_a_run_shows_its_accuracies_best_neurons_and_run_file(browser):
    page = text_of(browser.get("/run", params={"run": f"runs/{NAME}"}))
    for words in ("Accuracy on test", "best neurons by Magn", "report of the run", "kind: pipeline", "predictions"):
        assert words in page


def test_every_link_of_a_run_can_be_opened(browser):
    page = browser.get("/run", params={"run": f"runs/{NAME}"}).text
    links = [html.unescape(link) for link in re.findall(r'href="([^"]*)"', page)]
    kinds = {}
    for link in links:  # one of each kind, and every table
        kinds.setdefault(link if link.startswith(("/table", "/rows", "/report")) else link.partition("?")[0], link)
    assert {"/", "/style.css", "/neuron"} < set(kinds)
    for link in kinds.values():
        assert browser.get(link).status_code == 200, link


def test_a_row_shows_its_prompt_its_options_and_the_numbers_that_are_stored(browser, root):
    negs = open_negs(root / NAME).select(dataset="local/questions", split="test")
    part = httpx.URL(part_of(browser, "questions")).params["part"]
    page = text_of(browser.get("/row", params={"run": f"runs/{NAME}", "part": part, "row": negs.ids[3]}))
    assert re.search(r"Question: .* Answer:", page)
    for probability in negs.probs_PO[3]:
        assert f"{probability:.4g}" in page
    layers = [abs(negs.layer(layer)[3, negs.gold_P[3]]) for layer in range(negs.n_layers)]
    layer = max(range(negs.n_layers), key=lambda one: layers[one].max())
    assert page.index(f"{layer}.{layers[layer].argmax()}") < page.index("NEG for the right option")
    assert "Answers of the probes" in page


def test_a_neuron_shows_its_means_and_the_rows_it_moves_most(browser, root):
    negs = open_negs(root / NAME).select(dataset="local/questions", split="test")
    page = text_of(browser.get("/neuron", params={"run": f"runs/{NAME}", "neuron": "1.7"}))
    for mean in negs.neurons([(1, 7)])[:, :, 0].mean(axis=0, dtype=float):
        assert f"{mean:+.1e}" in page
    assert "local/questions" in page and "local/hostile" in page and "prompts it moves most" in page


def test_runs_are_compared(browser):
    page = text_of(browser.get("/compare", params={"run": [f"runs/{NAME}", "runs/copy"]}))
    assert "run by run" in page and NAME in page
    assert "What probes add to the model's own answer, run by run" in page


def test_a_run_whose_accuracies_are_gone_is_not_compared_and_the_page_says_so(root, tmp_path):
    shutil.copytree(root / "copy", tmp_path / "runs" / "a")
    (shutil.copytree(root / "copy", tmp_path / "runs" / "b") / "accuracy.arrow").unlink()
    with serving(tmp_path / "runs") as found, httpx.Client(base_url=found.address, follow_redirects=True) as client:
        client.get("/", params={"token": found.token})
        answer = client.get("/compare", params={"run": ["runs/a", "runs/b"]})
    assert "accuracy.arrow' cannot be trusted (it is gone)" in text_of(answer, 404)


def test_a_model_given_as_a_path_is_called_by_its_name(browser):
    page = text_of(browser.get("/run", params={"run": f"runs/{NAME}"}))
    assert "Neurons of tiny-llama" in page
    shown = text_of(browser.get("/neuron", params={"run": f"runs/{NAME}", "neuron": "1.7"}))
    assert "tiny-llama" in shown and "/tiny-llama" not in shown
    assert "/tiny-llama" not in text_of(browser.get("/"))


def test_names_and_prompts_stay_text(browser):
    rows = part_of(browser, "hostile")
    page = browser.get(rows)
    links = [html.unescape(link) for link in re.findall(r'href="(/row\?[^"]*)"', page.text)]
    for one in (page, browser.get(links[0]), browser.get("/"), browser.get("/run", params={"run": f"runs/{NAME}"})):
        assert one.status_code == 200
        assert not re.search(r"<(script|b|img)\b", one.text)
        assert "\u202e" not in one.text
    assert EVIL in text_of(page) and "\\u202e" in text_of(page)
    for where in ("/run", "/table", "/rows", "/row", "/neuron", "/compare"):
        values = {"run": EVIL, "table": EVIL, "part": EVIL, "row": EVIL, "neuron": EVIL}
        answer = browser.get(where, params=values)
        assert answer.status_code == 404 and "<script" not in answer.text


def test_pages_run_no_script_and_load_nothing_of_others(browser):
    for page in ("/", "/nothing", "/style.css"):
        policy = browser.get(page).headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src" not in policy and "unsafe" not in policy
        assert browser.get(page).headers["X-Content-Type-Options"] == "nosniff"


def test_the_report_is_the_runs_own_file_in_a_sandbox(browser, root):
    page = browser.get("/run", params={"run": "runs/copy"}).text
    (report,) = re.findall(r'href="(/report/[^"]*)"', page)
    answer = browser.get(report)
    assert answer.content == (root / "copy" / "report.html").read_bytes()
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("sandbox allow-scripts allow-downloads;") and "allow-same-origin" not in policy
    alone = httpx.get(f"{browser.base_url}{report.replace('report.html', 'figure.svg')}")  # a sandbox has no cookie
    assert alone.status_code == 200 and alone.headers["Content-Type"] == "image/svg+xml"


def test_nothing_outside_the_runs_is_served(browser, server):
    (report,) = re.findall(r'href="(/report/[^"]*)report.html"', browser.get("/run", params={"run": "runs/copy"}).text)
    files = [
        "../secret.html",
        "..%2fsecret.html",
        "../../secret.html",
        "run.yaml",
        "accuracy.arrow",
        "//etc/passwd",
        "",
    ]
    for file in files:
        assert raw(server, f"GET {report}{file} HTTP/1.1")[0] == 404, file
    assert raw(server, "GET /report/0000/report.html HTTP/1.1")[0] == 404
    for run in ("..", "../secret.html", "/etc", "runs/../..", "runs/copy/.."):
        assert browser.get("/run", params={"run": run}).status_code == 404
        assert browser.get("/table", params={"run": "runs/copy", "table": f"{run}/x"}).status_code == 404


def raw(server, line, host=None, **headers):
    """Send a request as it stands, which a client would mend; return status and answer."""
    host = host or server.address.removeprefix("http://")
    lines = [line, f"Host: {host}", "Connection: close", *(f"{name}: {value}" for name, value in headers.items())]
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b"".join(iter(lambda: connection.recv(2**16), b"")).decode(errors="replace")
    return int(answer.split()[1]), answer


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "127.0.0.2", "localhost.evil.example", "[::1]"]
)
def test_another_host_is_refused_even_with_the_token(server, host):
    cookie = f"neg-view-{server.port}={server.token}"
    status, answer = raw(server, "GET / HTTP/1.1", host=f"{host}:{server.port}", Cookie=cookie)
    assert status == 400 and "runs" not in answer
    status, answer = raw(server, f"GET /?token={server.token} HTTP/1.1", host=host)
    assert status == 400 and server.token not in answer


@pytest.mark.parametrize(
    "path", ["/", "/run?run=runs/copy", "/style.css", "/?token=wrong", "/?token=", "/?token=%C3%A9"]
)
def test_without_the_token_nothing_is_shown(server, path):
    answer = httpx.get(server.address + path)
    assert answer.status_code == 403 and "copy" not in answer.text
    assert httpx.get(server.address + path, cookies={f"neg-view-{server.port}": "wrong"}).status_code == 403


def test_the_token_leads_to_the_index_and_becomes_a_cookie_of_this_server_alone(server):
    answer = httpx.get(f"{server.address}//evil.example/", params={"token": server.token})
    assert answer.status_code == 303 and answer.headers["Location"] == "/"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and f"neg-view-{server.port}=" in cookie


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_written(browser, method):
    assert browser.request(method, "/run", params={"run": "runs/copy"}).status_code == 405


def test_the_server_listens_on_the_loopback_interface_alone(server):
    port = f"{server.port:04X}"
    tcp = [line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()]
    listening = [words[1] for words in tcp if words[3] == "0A" and words[1].endswith(f":{port}")]
    assert listening == [f"0100007F:{port}"]


def test_looking_changes_no_file_and_ctrl_c_ends_it_without_a_traceback(root):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}
    with serving(root / "copy") as found, httpx.Client(base_url=found.address, follow_redirects=True) as client:
        client.get("/", params={"token": found.token})
        for path in ("/run?run=copy", "/neuron?run=copy&neuron=0.1"):
            assert client.get(path, timeout=120).status_code == 200
        found.process.send_signal(signal.SIGINT)
        output, errors = found.process.communicate(timeout=60)
    assert errors.endswith("stopped\n") and found.process.returncode == 130
    assert "Traceback" not in output + errors
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")} == before


def test_a_run_whose_data_is_gone_is_shown_without_texts(root, tmp_path):
    moved = shutil.copytree(root / "copy", tmp_path / "moved")
    file = moved / "run.yaml"
    file.write_text(file.read_text().replace("hostile.jsonl", "gone.jsonl"))
    with serving(moved) as found, httpx.Client(base_url=found.address, follow_redirects=True, timeout=120) as client:
        client.get("/", params={"token": found.token})
        part = next(
            one for one in re.findall(r'href="(/rows\?[^"]*)"', client.get("/run?run=moved").text) if "hostile" in one
        )
        page = client.get(html.unescape(part))
        assert "The texts cannot be shown" in text_of(page) and EVIL not in text_of(page)


def test_a_directory_without_runs_and_a_port_that_is_taken_are_refused_in_a_line(root, tmp_path):
    result = neg("view", tmp_path)
    assert result.returncode == 2 and "holds no run" in result.stderr and result.stderr.count("\n") == 1
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = neg("view", root, "--port", taken.getsockname()[1])
    assert result.returncode == 2 and "cannot be used" in result.stderr and result.stderr.count("\n") == 1
