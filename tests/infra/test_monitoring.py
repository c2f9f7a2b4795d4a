"""The dashboard and what feeds it: they ask for what runs and Ray export, at the port where they do."""

import json
import re

from manifests import INFRA, dashboard, documents, mappings, queried, queries

from tasks.pool.metrics import METRICS

PANELS = dashboard()["panels"]


def test_every_panel_has_a_number_and_a_place_of_its_own():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = [
        (row, column)
        for place in (panel["gridPos"] for panel in PANELS)
        for row in range(place["y"], place["y"] + place["h"])
        for column in range(place["x"], place["x"] + place["w"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(column for _, column in cells) < 24


def test_every_panel_asks_the_chosen_prometheus_and_says_what_it_shows():
    variables = {one["name"]: one for one in dashboard()["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    asked = [one["datasource"] for one in mappings(dashboard()) if "datasource" in one]
    assert asked == [{"type": "prometheus", "uid": "${datasource}"}] * len(asked)
    for panel in (panel for panel in PANELS if panel["type"] != "row"):
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    names = set(re.findall(r"\$(\w+)", json.dumps(dashboard()))) - {"__rate_interval", "__all"}
    assert names == {"run"}


def test_every_metric_of_ours_is_shown_and_no_other():
    assert {name.removeprefix("ray_") for name in queried() if name.startswith("ray_neg_")} == set(METRICS)
    (runs,) = [one["query"]["query"] for one in dashboard()["templating"]["list"] if one["name"] == "run"]
    name, label = re.fullmatch(r"label_values\(ray_(\w+), (\w+)\)", runs).groups()
    assert label in METRICS[name].labels


def test_labels_of_our_metrics_exist():
    targets = [target for panel in PANELS for target in panel.get("targets", ()) if "ray_neg_" in target["expr"]]
    for target in targets:
        labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        labels |= {label for found in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in found.split(", ")}
        labels |= set(re.findall(r"[{,] *(\w+)=", target["expr"]))
        for name in re.findall(r"ray_(neg_\w+)", target["expr"]):
            assert labels <= set(METRICS[name].labels), target["expr"]


def test_counters_are_shown_by_their_increase():
    for query in queries():
        for name in re.findall(r"ray_(neg_\w+_total)", query):
            assert re.search(rf"(rate|increase)\(ray_{name}{{[^}}]*}}\[", query), query


def test_prometheus_asks_where_ray_answers():
    port = 8080
    (monitor,) = [one for one in documents(INFRA / "monitoring" / "podmonitor.yaml") if one["kind"] == "PodMonitor"]
    name = monitor["spec"]["podMetricsEndpoints"][0]["port"]
    folder = INFRA / "kubernetes"
    opened = [
        one["containerPort"]
        for path in (folder / "base" / "raycluster.yaml", folder / "job-base" / "rayjob.yaml")
        for one in mappings(documents(path))
        if one.get("name") == name and "containerPort" in one
    ]
    assert set(opened) == {port}
    assert len(opened) == 6
    jobs = documents(INFRA / "monitoring" / "prometheus.yaml")[0]["scrape_configs"]
    asked = [one for job in jobs for one in job["dns_sd_configs"]]
    services = documents(INFRA / "compose.yaml")[0]["services"]
    assert all(name in services for one in asked for name in one["names"])
    assert {one["port"] for one in asked} == {port}
    for file in ("compose.yaml", "worker.sh"):
        starts = re.findall(r"ray[, ]+start\b[^&\]]*", (INFRA / file).read_text())
        assert starts
        assert all(re.search(rf'--metrics-export-port[, ]+"?{port}', start) for start in starts), file


def test_the_readme_has_every_metric():
    readme = (INFRA / "README.md").read_text()
    for name, metric in METRICS.items():
        assert f"| `ray_{name}` | {metric.kind} | {metric.help[0].lower()}{metric.help[1:-1]} |" in readme
