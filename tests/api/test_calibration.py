"""Calibration reports over HTTP: the numbers of a reference, the pictures, and what is refused."""

import io
import json
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from django.core.files.uploadedfile import SimpleUploadedFile
from safetensors.numpy import save
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from fl_server_ai.inference import pool
from fl_server_ai.inference.tasks import run_inference
from fl_server_core.models import InferenceJob, User
from tests.api import images
from tests.api.test_inference import OWNER, network, options, scripted, upload
from tests.scenes import person

pytestmark = pytest.mark.django_db
RANDOM = np.random.default_rng(5)
INPUTS = RANDOM.standard_normal((60, 4)).astype(np.float32)
LABELS = RANDOM.integers(0, 3, 60)
LOGITS = options(output="logits")


@pytest.fixture(scope="module", autouse=True)
def children() -> Any:
    yield
    pool.close()


@pytest.fixture
def owner() -> User:
    return person("owner", id=OWNER, actor=True)


@pytest.fixture
def client(login, owner: User) -> Any:
    return login(owner)


def judge(
    client: Any, model: str, inputs: Any = INPUTS, labels: Any = LABELS, **fields: Any
) -> Any:
    """The report, after a worker has had the job; the refusal of the POST if it is one."""
    body = {"model_input": as_file(inputs), "labels": as_file(labels), **fields}
    if "options" in fields:
        body["options"] = json.dumps(fields["options"])
    posted = client.post(f"/api/models/{model}/calibration/", body, format="multipart")
    return answer_of(client, posted)


def answer_of(client: Any, posted: Any) -> Any:
    if posted.status_code != 202:
        return posted
    run_inference(posted.json()["job_id"])
    return client.get(posted.json()["url"])


def as_file(array: np.ndarray) -> SimpleUploadedFile:
    return SimpleUploadedFile("x", save({"x": np.ascontiguousarray(array)}))


def probabilities() -> np.ndarray:
    with torch.no_grad():
        return network()(torch.from_numpy(INPUTS)).double().softmax(1).numpy()


def test_the_figures_are_those_of_a_reference(client) -> None:
    report = judge(client, upload(client), options=LOGITS, bins=10)

    assert report.status_code == 200, report.json()
    body, probs = report.json(), probabilities()
    predicted, confidence = probs.argmax(1), probs.max(1)
    wrong = predicted != LABELS
    entropy = -(probs * np.log(probs)).sum(1)
    places = np.clip(np.ceil(confidence * 10) - 1, 0, 9)
    gaps = [
        (places == b).sum() * abs((~wrong)[places == b].mean() - confidence[places == b].mean())
        for b in np.unique(places)
    ]
    assert (body["samples"], body["ranked_by"]) == (60, "predictive_entropy")
    np.testing.assert_allclose(body["accuracy"], 1 - wrong.mean())
    np.testing.assert_allclose(body["nll"], log_loss(LABELS, probs, labels=[0, 1, 2]), rtol=1e-6)
    np.testing.assert_allclose(body["brier"], ((probs - np.eye(3)[LABELS]) ** 2).sum(1).mean())
    np.testing.assert_allclose(body["ece"], sum(gaps) / 60, rtol=1e-6)
    np.testing.assert_allclose(body["auroc"], roc_auc_score(wrong, entropy))
    assert len(body["bins"]) == 10
    assert sum(part["count"] for part in body["bins"]) == 60


def test_nested_lists_give_the_same_report_and_the_method_counts(client) -> None:
    model = upload(client)
    url = f"/api/models/{model}/calibration/"
    body = {"model_input": INPUTS.tolist(), "labels": LABELS.tolist(), "options": LOGITS}
    how = {"uncertainty_method": "MC_DROPOUT", "options": options(output="logits", N=20)}

    listed = answer_of(client, client.post(url, body, format="json")).json()
    files = judge(client, model, options=LOGITS).json()
    dropout = judge(client, model, **how).json()

    assert {**listed, "job_id": 0} == {**files, "job_id": 0}
    assert dropout["nll"] != files["nll"]


def test_the_diagram_comes_as_svg_and_png(client) -> None:
    judge(client, upload(client), options=LOGITS)
    url = f"/api/calibrations/{InferenceJob.objects.get().pk}/"

    svg, png = (client.get(f"{url}?format={kind}") for kind in ("svg", "png"))

    assert svg.headers["Content-Type"] == "image/svg+xml"
    assert svg.content.startswith(b"<svg")
    assert b"ECE" in svg.content
    assert png.headers["Content-Type"] == "image/png"
    pixels = matplotlib.image.imread(io.BytesIO(png.content))
    assert pixels.shape == (760, 840, 3)
    colours = {tuple(colour) for colour in (pixels.reshape(-1, 3) * 255).round().astype(int)}
    assert {(255, 255, 255), (213, 94, 0), (34, 34, 34)} <= colours
    assert client.get(f"{url}?format=gif").json()["code"] == "BAD_FORMAT"


def test_binary_outputs_are_judged_too(client) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    yes = module(torch.from_numpy(INPUTS)).detach().double().numpy()[:, 0]
    labels = (LABELS > 0).astype(np.uint8)

    report = judge(
        client, upload(client, scripted(module)), labels=labels,
        options=options(task="binary", output="probs"),
    ).json()  # fmt: skip

    np.testing.assert_allclose(report["nll"], log_loss(labels, yes), rtol=1e-6)
    np.testing.assert_allclose(report["accuracy"], ((yes > 0.5) == labels).mean())


def test_without_errors_there_is_no_auroc(client) -> None:
    report = judge(client, upload(client), labels=probabilities().argmax(1), options=LOGITS).json()

    assert (report["accuracy"], report["auroc"]) == (1.0, None)


@pytest.mark.parametrize(
    ("labels", "fields", "code", "pointer"),
    [
        (LABELS[:-1], {}, "BAD_LABEL", "/labels"),
        (LABELS[:, None], {}, "BAD_LABEL", "/labels"),
        (LABELS.astype(np.float32), {}, "BAD_LABEL", "/labels"),
        (LABELS - 1, {}, "BAD_LABEL", "/labels"),
        (LABELS + 1, {}, "BAD_LABEL", "/labels"),
        (LABELS, {"bins": 0}, "INVALID", "/bins"),
        (LABELS, {"options": options(task="regression")}, "BAD_OPTION", "/options/uncertainty/task"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_labels_is_pointed_at(
    client, labels: np.ndarray, fields: dict[str, Any], code: str, pointer: str
) -> None:
    answer = judge(client, upload(client), labels=labels, **{"options": LOGITS, **fields})

    assert (answer.status_code, answer.json()["code"]) == (400, code), answer.json()
    assert answer.json()["errors"][0]["pointer"] == pointer


def test_a_file_of_labels_holds_one_tensor(client) -> None:
    two = SimpleUploadedFile("y", save({"a": LABELS, "b": LABELS}))
    body = {"model_input": as_file(INPUTS), "labels": two, "options": json.dumps(LOGITS)}

    answer = client.post(f"/api/models/{upload(client)}/calibration/", body, format="multipart")

    assert (answer.status_code, answer.json()["code"]) == (400, "BAD_LABEL")
    assert answer.json()["errors"][0]["pointer"] == "/labels"


@pytest.mark.parametrize(
    ("labels", "pointer"),
    [([0, 1.5], "/labels/1"), ([True, 1], "/labels/0"), ([-1, 0], "/labels/0"), ([], "/labels")],
)
def test_labels_in_json_are_whole_numbers(client, labels: list[Any], pointer: str) -> None:
    body = {"model_input": INPUTS[:2].tolist(), "labels": labels, "options": LOGITS}

    answer = client.post(f"/api/models/{upload(client)}/calibration/", body, format="json")

    assert answer.status_code == 400, answer.json()
    assert answer.json()["errors"][0]["pointer"] == pointer


def test_outputs_that_are_no_probabilities_say_what_to_declare(client) -> None:
    answer = judge(client, upload(client))

    assert (answer.status_code, answer.json()["code"]) == (422, "NOT_PROBABILITIES")
    assert "output: logits" in answer.json()["detail"]


def test_outsiders_see_neither_model_nor_report(client, login) -> None:
    model = upload(client)
    judge(client, model, options=LOGITS)
    job = InferenceJob.objects.get()
    stranger = login(person("stranger", actor=True))

    assert judge(stranger, model, options=LOGITS).status_code == 404
    assert stranger.get(f"/api/calibrations/{job.pk}/").status_code == 404
    assert client.get(f"/api/inference/{job.pk}/").status_code == 404


def test_the_same_key_judges_once(client) -> None:
    model = upload(client)
    url = f"/api/models/{model}/calibration/"
    body = {"model_input": INPUTS.tolist(), "labels": LABELS.tolist(), "options": LOGITS}
    key = {"HTTP_IDEMPOTENCY_KEY": "k"}

    first, again = (client.post(url, body, format="json", **key) for _ in range(2))
    other = client.post(url, {**body, "bins": 3}, format="json", **key)

    assert first.json()["job_id"] == again.json()["job_id"]
    assert InferenceJob.objects.count() == 1
    assert (other.status_code, other.json()["code"]) == (409, "IDEMPOTENCY_MISMATCH")


def flat(size: int) -> nn.Module:
    """Pictures of size x size with three channels to three logits."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 3)).eval()


def test_a_picture_is_one_sample(client) -> None:
    module = flat(6)
    model = upload(client, scripted(module), input_shape=["None", 3, 6, 6])
    picture = images.encoded(images.pixels(6, 6))

    def judged(*labels: int) -> Any:
        body = {"model_input": SimpleUploadedFile("x.png", picture), "options": json.dumps(LOGITS)}
        body["labels"] = as_file(np.array(labels))
        posted = client.post(f"/api/models/{model}/calibration/", body, format="multipart")
        return answer_of(client, posted)

    one, two = judged(2), judged(2, 1)

    x = torch.from_numpy(images.pixels(6, 6)).permute(2, 0, 1)[None] / 255
    wanted = -module(x).log_softmax(1)[0, 2].item()
    assert one.status_code == 200, one.json()
    assert one.json()["samples"] == 1
    assert one.json()["nll"] == pytest.approx(wanted, rel=1e-5)
    assert (two.status_code, two.json()["code"]) == (400, "BAD_LABEL")
    assert two.json()["errors"][0]["pointer"] == "/labels"


def test_samples_are_counted_after_the_preprocessing(client) -> None:
    steps = {"steps": [{"step": "cast", "dtype": "float32", "scale": True}]}
    file = SimpleUploadedFile("p", json.dumps(steps).encode())
    model = upload(client, scripted(flat(6)), model_preprocessing_file=file)
    grid = images.pixels(6, 6).transpose(2, 0, 1)  # one picture without a batch, in bytes

    one = judge(client, model, grid[None], np.array([1]), options=LOGITS)
    bare = judge(client, model, grid, np.array([1]), options=LOGITS)
    two = judge(client, model, grid[None], np.array([1, 0]), options=LOGITS)

    assert one.status_code == bare.status_code == 200, bare.json()
    assert one.json()["nll"] == bare.json()["nll"]
    assert (two.status_code, two.json()["errors"][0]["pointer"]) == (400, "/labels")


def test_members_are_judged_together_each_with_its_own_preprocessing(client) -> None:
    steps = {"steps": [{"step": "cast", "dtype": "float32", "scale": True}]}
    file = SimpleUploadedFile("p", json.dumps(steps).encode())
    prepared = upload(client, scripted(flat(6)), model_preprocessing_file=file)
    plain = upload(client, scripted(flat(6)))
    mean = {"name": "m", "description": "-", "type": "MEAN", "models": [prepared, plain]}
    model = client.post("/api/models/", mean, format="json").json()["model_id"]
    grid = images.pixels(6, 6).transpose(2, 0, 1)[None].astype(np.float32) / 255

    report = judge(client, model, grid, np.array([1]), options=LOGITS)
    alone = judge(client, plain, grid, np.array([1]), options=LOGITS)
    own = client.post(
        f"/api/models/{model}/preprocessing/",
        {"model_preprocessing_file": SimpleUploadedFile("p", json.dumps(steps).encode())},
        format="multipart",
    )

    assert report.json()["nll"] == pytest.approx(alone.json()["nll"])
    assert (own.status_code, own.json()["code"]) == (422, "MEMBERS_ONLY")
