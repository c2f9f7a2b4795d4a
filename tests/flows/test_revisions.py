"""Several revisions of one model of the hub, in a run and in a campaign: each has weights, name and place."""

import pyarrow as pa
import pytest
import yaml
from hub import COMMIT, commit_id, serving
from safetensors.torch import load_file, save_file
from support import neg, save_tiny_model

from flows.show.dataset_card import dataset_card
from negcore.analysis.training import revision_profiles
from negcore.errors import RunError
from negcore.store.reader import open_negs
from tasks.neurons import best_neurons
from tasks.publish import read_publication
from tasks.rundir.checks import read_checks
from tasks.rundir.query import query

STEPS = ("step2", "step10", "main")
NAMES = ["org/m@step2", "org/m@step10", "org/m"]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Three states of a model: weights that are 1, .9 and .8 times those at the end."""
    root = tmp_path_factory.mktemp("hub")
    for number, step in enumerate(STEPS):
        folder = root / "models/org" / ("m" if step == "main" else f"m@{step}")
        weights = save_tiny_model("llama", folder, n_positions=4096) / "model.safetensors"
        changed = {name: tensor * (1 - number / 10) for name, tensor in load_file(weights).items()}
        save_file(changed, weights, metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module")
def ran(repositories, tmp_path_factory):
    """A run and a campaign, each in a process of its own: the hub's client reads its environment once."""
    folder = tmp_path_factory.mktemp("revisions")
    dataset = ["--dataset", "mini/fact", "--limit", "12", "--backend", "local", "--orchestrator", "none"]
    models = ["--model", "org/m@step2, @step10", "--model", "org/m"]
    file = folder / "campaign.yaml"
    values = {"kind": "campaign", "model": ["org/m@step2, @step10", "@main"], "stage": "mceval8k", "backend": "local"}
    values["mceval8k"] = {"dataset": ["mini/fact"], "limit": 12, "shots": [0], "probe": ["polar"], "max_neurons": 8}
    file.write_text(yaml.safe_dump(values))
    with serving(repositories) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
        run = neg("pipeline", *models, *dataset, "--probe", "polar", "--out", str(folder / "run"), **environment)
        assert run.returncode == 0, run.stderr
        made = neg("campaign", str(file), "--out", str(folder / "made"), "--orchestrator", "none", **environment)
        assert made.returncode == 0, made.stderr
    return folder


def table(path):
    return pa.ipc.open_file(path).read_all().to_pylist()


def test_a_run_keeps_revisions_apart_in_order_and_records_their_commits(ran):
    negs = open_negs(ran / "run")
    commits = dict(zip(NAMES, (commit_id("step2"), commit_id("step10"), COMMIT), strict=True))
    splits = {name: negs.select(name, "mini/fact", "test") for name in NAMES}
    assert {name: split.identity.model_revision for name, split in splits.items()} == commits
    assert {name: split.identity.model for name, split in splits.items()} == dict(zip(NAMES, NAMES, strict=True))
    first, second, last = (split.layer(0) for split in splits.values())
    assert (first != second).any() and (second != last).any()
    assert list(dict.fromkeys(row["model"] for row in table(ran / "run" / "accuracy.arrow"))) == NAMES
    assert yaml.safe_load((ran / "run" / "run.yaml").read_text())["model"] == NAMES
    assert {one.model for one in read_checks(ran / "run")} == set(NAMES)


def test_a_campaign_has_a_folder_and_a_name_for_every_revision_in_order(ran):
    outcomes = table(ran / "made" / "campaign" / "outcomes.arrow")
    assert [row["name"] for row in outcomes] == ["m@step2", "m@step10", "m@main"]
    assert [row["model"] for row in outcomes] == ["org/m@step2", "org/m@step10", "org/m@main"]
    commits = [commit_id("step2"), commit_id("step10"), COMMIT]
    found = [open_negs(ran / "made" / row["name"] / "mceval8k" / "shots-0") for row in outcomes]
    assert [next(iter(one)).identity.model_revision for one in found] == commits


def test_a_neuron_and_an_answer_are_of_the_named_revision(ran):
    assert {row.model for row in best_neurons(ran / "run", "polar", model="org/m@step10").rows} == {"org/m@step10"}
    with pytest.raises(RunError, match="org/m@step9' is not in this run; it has org/m@step2, org/m@step10, org/m"):
        best_neurons(ran / "run", "polar", model="org/m@step9")
    cached = {"HF_HOME": str(ran / "cache")}
    steered = ["--neurons", "0.1=2", "--rows", "1", "--max-tokens", "1", "--effect-rows", "2"]
    done = neg("steer", str(ran / "run"), "--model", "org/m@step10", *steered, **cached)
    assert (done.returncode, "org/m@step10" in done.stdout) == (0, True), done.stderr


def test_a_campaign_tells_how_negs_change_over_its_revisions(ran):
    negs = open_negs(ran / "run")
    rows = table(ran / "made" / "campaign" / "neg_profiles.arrow")
    profiles = revision_profiles([negs.select(name, "mini/fact", "test") for name in NAMES])
    assert [row["model"] for row in rows] == [f"org/m@{STEPS[one.revision]}" for one in profiles]
    for row, one in zip(rows, profiles, strict=True):
        assert {name: row[name] for name in vars(one).keys() & row.keys() - {"revision"}} == {
            name: value for name, value in vars(one).items() if name != "revision"
        }
    assert {row["revision"] for row in rows} == {commit_id("step2"), commit_id("step10"), COMMIT}
    assert {(row["stage"], row["dataset"]) for row in rows} == {("mceval8k", "mini/fact (shots-0)")}
    assert "NEGs over training" in (ran / "made" / "report.html").read_text()
    assert (ran / "made" / "campaign" / "figures" / "models-negs-over-training.svg").is_file()
    asked = query(ran / "made", "select count(*) as n from campaign.neg_profiles where layer is null")
    assert asked.to_pylist() == [{"n": 3}]


def test_the_card_of_what_is_published_names_every_commit(ran):
    card = dataset_card(read_publication(ran / "run"), None)
    named = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["model"]
    assert set(named) == {f"org/m@{commit}" for commit in (commit_id("step2"), commit_id("step10"), COMMIT)}
