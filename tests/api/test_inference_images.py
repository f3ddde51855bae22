"""Asking with pictures: decoded and prepared in the sandbox as Pillow and torch do; hostile ones are refused there."""

import base64
import io
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from django.core.files.uploadedfile import SimpleUploadedFile
from PIL import Image
from safetensors.numpy import load, save
from torch import Tensor, nn

from fl_server_ai.inference import pool
from fl_server_ai.preprocessing.pipeline import canonical_text, parse
from fl_server_ai.sandbox.image_steps import carried_out
from fl_server_core.models import Blob, GlobalModel, InferenceJob, User
from fl_server_core.storage import weights_storage
from tests.api import images
from tests.api.test_inference import Same, Weighted, ask, options, scripted, upload
from tests.scenes import person

pytestmark = pytest.mark.django_db
OWNER = uuid.UUID(int=8)
RAW = options(task="regression")  # the outputs as they are
STEPS = [
    {"step": "resize", "size": 12}, {"step": "center_crop", "size": 8},
    {"step": "cast", "dtype": "float32", "scale": True},
    {"step": "normalize", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
]  # fmt: skip
PIPELINE = json.dumps({"steps": STEPS}, indent=1).encode()
MADE = Path(__file__).parent.parent / "ai" / "transforms"
SAME = scripted(Same())


class Halved(Weighted):
    """Preprocessing as a program: bytes to numbers around zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 127.5 - self.weight


class Counting(Weighted):
    """Changes what it is made of."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.add_(1)
        return x.float() + self.weight


@pytest.fixture(scope="module", autouse=True)
def children() -> Iterator[None]:
    yield
    pool.close()


@pytest.fixture
def owner() -> User:
    return person("owner", id=OWNER, actor=True)


@pytest.fixture
def client(login, owner: User) -> Any:
    return login(owner)


def file(data: bytes, name: str = "f") -> SimpleUploadedFile:
    return SimpleUploadedFile(name, data)


def same(client: Any, **fields: Any) -> str:
    """A model that answers what it is given."""
    return upload(client, SAME, **fields)


def seen(client: Any, model: str, data: bytes) -> np.ndarray[Any, Any]:
    """What the model gets to see of a file."""
    answer = ask(client, model, file(data), options=json.dumps(RAW))
    assert answer.status_code == 200, answer.json()
    return load(b"".join(answer) if answer.streaming else answer.content)["inference"]


def prepared(client: Any, preprocessing: bytes, **fields: Any) -> str:
    return same(client, model_preprocessing_file=file(preprocessing), **fields)


def child() -> psutil.Process:
    return psutil.Process(pool._sandboxes[0]._pool.pids[-1])


# Images without preprocessing.


def test_a_picture_is_its_pixels_from_0_to_1_with_a_batch_dimension(client) -> None:
    colours = images.pixels(5, 7)

    found = seen(client, same(client), images.encoded(colours))

    np.testing.assert_array_equal(found, colours.transpose(2, 0, 1)[None].astype(np.float32) / 255)


def test_a_jpeg_is_what_pillow_decodes(client) -> None:
    data = images.encoded(images.smooth(16, 24), "JPEG", quality=90)

    found = seen(client, same(client), data)

    decoded = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)[None]
    np.testing.assert_array_equal(found, decoded.astype(np.float32) / 255)


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)]
)
def test_grey_has_one_channel_and_all_else_three(client, mode: str, channels: int) -> None:
    grey = Image.fromarray(images.pixels(6, 6, 1)).convert(mode)
    packed = io.BytesIO()
    grey.save(packed, "PNG")

    found = seen(client, same(client), packed.getvalue())

    expected = np.asarray(grey.convert("L" if channels == 1 else "RGB")).reshape(6, 6, channels)
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1)[None] / 255, atol=1e-6)


def test_sixteen_bits_of_grey_are_kept(client) -> None:
    deep = np.array([[0, 1, 257], [65534, 65535, 40000]], np.uint16)

    found = seen(client, same(client), images.encoded(deep))

    np.testing.assert_allclose(found[0, 0], deep / 65535, rtol=1e-6)


@pytest.mark.parametrize("kind", ["exif", "mpo", "cmyk", "progressive"])
def test_what_cameras_write_is_read(client, kind: str) -> None:
    picture = Image.fromarray(images.smooth(16, 16))
    packed = io.BytesIO()
    if kind == "exif":
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "a camera"
        picture.save(packed, "JPEG", exif=exif)
    elif kind == "mpo":
        picture.save(packed, "MPO", save_all=True, append_images=[picture])
    elif kind == "cmyk":
        picture.convert("CMYK").save(packed, "JPEG")
    else:
        picture.save(packed, "JPEG", progressive=True)

    found = seen(client, same(client), packed.getvalue())

    expected = np.asarray(Image.open(packed).convert("RGB")).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(found, expected / 255, atol=1e-6)


def test_base64_of_a_picture_is_the_same_as_its_file(client) -> None:
    colours = images.pixels(5, 7)
    text = base64.b64encode(images.encoded(colours)).decode()

    answer = ask(client, same(client), text, options=RAW)

    assert answer.status_code == 200, answer.json()
    np.testing.assert_allclose(answer.json()["inference"][0][2], colours[..., 2] / 255, rtol=1e-6)


def test_a_picture_that_does_not_fit_is_told_how_to_make_it_fit(client) -> None:
    model = same(client, input_shape=["None", "1", "8", "8"])

    answer = ask(client, model, file(images.encoded(images.pixels(8, 8))))

    assert (answer.status_code, answer.json()["code"]) == (400, "INPUT_SHAPE")
    told = answer.json()
    assert "dimension 1 is 3 instead of 1" in told["detail"]
    assert 'model_preprocessing_file, such as {"steps"' in told["detail"]
    assert told["errors"][0]["pointer"] == "/model_input"


def test_dtype_is_not_for_pictures(client) -> None:
    answer = ask(client, same(client), file(images.encoded(images.pixels(2, 2))), dtype="int64")

    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (400, "/dtype")


# Hostile pictures.


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (images.bomb(), 413, "IMAGE_TOO_LARGE"),
        (images.jpeg_bomb(), 413, "IMAGE_TOO_LARGE"),
        (images.png(64, 64, rows=b"\0"), 400, "BAD_IMAGE"),
        (images.encoded(images.pixels(64, 64))[:-3000], 400, "BAD_IMAGE"),
        (images.encoded(images.pixels(64, 64), "JPEG")[:-900], 400, "BAD_IMAGE"),
        (images.SIGNATURE + b"nonsense", 400, "BAD_IMAGE"),
        (b"\xff\xd8\xff" + b"\xe0\x00" * 20, 400, "BAD_IMAGE"),
        (images.png(0, 0), 400, "BAD_IMAGE"),
        (images.text_bomb(), 400, "BAD_IMAGE"),
        (images.profile_bomb(), 400, "BAD_IMAGE"),
    ],
    ids=["bomb", "jpeg bomb", "short rows", "cut png", "cut jpeg", "nonsense", "markers", "empty",
         "text bomb", "profile bomb"],
)  # fmt: skip
def test_hostile_pictures_are_refused_in_the_child_which_goes_on(
    client, data: bytes, status: int, code: str
) -> None:
    model = same(client)
    honest = images.pixels(3, 4)
    seen(client, model, images.encoded(honest))
    before, memory = child().pid, child().memory_info().rss

    answer = ask(client, model, file(data))
    after = child().memory_info().rss

    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.json()
    assert after - memory < 100 * 2**20
    found = seen(client, model, images.encoded(honest))
    np.testing.assert_array_equal(found, honest.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    assert child().pid == before


def test_the_limit_counts_pixels_exactly(client, settings) -> None:
    settings.FL_MAX_IMAGE_PIXELS = 12
    model = same(client)

    assert ask(client, model, file(images.encoded(images.pixels(3, 4)))).status_code == 200
    over = ask(client, model, file(images.encoded(images.pixels(13, 1))))

    assert (over.status_code, over.json()["code"]) == (413, "IMAGE_TOO_LARGE")


@pytest.mark.parametrize(
    "data",
    [
        images.encoded(images.pixels(4, 4), "GIF"), images.encoded(images.pixels(4, 4), "TIFF"),
        images.encoded(images.pixels(4, 4), "WEBP"), images.encoded(images.pixels(4, 4), "BMP"),
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', b"<svg></svg>",
        b"\0\0\0\x18ftypheic" + bytes(20),
    ],
    ids=["gif", "tiff", "webp", "bmp", "xml", "svg", "heic"],
)  # fmt: skip
def test_other_formats_are_refused_at_once(client, data: bytes) -> None:
    answer = ask(client, same(client), file(data))

    assert (answer.status_code, answer.json()["code"]) == (415, "IMAGE_FORMAT")
    assert "PNG or JPEG" in answer.json()["detail"]
    assert not InferenceJob.objects.exists()


# Pipelines.


def test_a_pipeline_is_stored_as_canonical_json_and_given_back_so(client) -> None:
    model = prepared(client, PIPELINE)

    given = client.get(f"/api/models/{model}/preprocessing/")

    expected = canonical_text(parse({"steps": STEPS}))
    assert b"".join(given.streaming_content) == expected
    assert ".json" in given["Content-Disposition"]
    assert client.get(f"/api/models/{model}/metadata/").json()["has_preprocessing"] is True
    again = {"model_preprocessing_file": file(expected)}
    path = f"/api/models/{model}/preprocessing/"
    assert client.post(path, again, format="multipart").status_code == 202
    assert b"".join(client.get(path).streaming_content) == expected


@pytest.mark.parametrize("where", ["with the model", "after it"])
def test_a_bad_pipeline_is_refused_with_pointers_and_nothing_is_stored(client, where: str) -> None:
    bad = json.dumps(
        {"steps": [*STEPS[:3], {"step": "normalize", "mean": [0], "std": [0]}]}
    ).encode()
    sent = {"model_preprocessing_file": file(bad)}
    if where == "after it":
        path = f"/api/models/{same(client)}/preprocessing/"
    else:
        path, sent = (
            "/api/models/",
            {**sent, "name": "n", "description": "-", "model_file": file(SAME)},
        )
    before = Blob.objects.count()

    answer = client.post(path, sent, format="multipart")

    assert (answer.status_code, answer.json()["code"]) == (400, "BAD_PREPROCESSING")
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/steps/3/std/0"]
    assert Blob.objects.count() == before
    assert not GlobalModel.objects.filter(preprocessing__isnull=False).exists()


def test_a_picture_goes_through_the_pipeline(client) -> None:
    colours = images.pixels(20, 31)
    model = prepared(client, PIPELINE, input_shape=["None", "3", "8", "8"])

    found = seen(client, model, images.encoded(colours))

    given = torch.from_numpy(colours.transpose(2, 0, 1).copy())
    expected = carried_out(parse({"steps": STEPS}), given)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 20, 31), (4, 3, 20, 31)])
def test_tensors_go_through_the_pipeline_too(client, shape: tuple[int, ...]) -> None:
    given = np.random.default_rng(2).integers(0, 256, shape, np.uint8)
    model = prepared(client, PIPELINE, input_shape=["None", "3", "8", "8"])

    found = seen(client, model, save({"x": given}))
    lists = ask(client, model, given.tolist(), dtype="uint8", options=RAW)

    expected = carried_out(parse({"steps": STEPS}), torch.from_numpy(given)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(lists.json()["inference"], expected, atol=1e-6)


def test_flattened_pictures_fit_models_of_rows(client) -> None:
    steps = [{"step": "to_tensor"}, {"step": "grayscale"}, {"step": "flatten"}]
    model = prepared(client, json.dumps({"steps": steps}).encode(), input_shape=["None", "30"])

    assert seen(client, model, images.encoded(images.pixels(5, 6))).shape == (1, 30)


def test_what_does_not_fit_after_the_pipeline_says_so(client) -> None:
    model = prepared(client, PIPELINE, input_shape=["None", "3", "9", "8"])

    answer = ask(client, model, file(images.encoded(images.pixels(20, 20))))

    assert (answer.status_code, answer.json()["code"]) == (400, "INPUT_SHAPE")
    assert "after the model's preprocessing" in answer.json()["detail"]


def test_a_step_that_cannot_be_done_is_named(client) -> None:
    model = prepared(client, PIPELINE)

    answer = ask(client, model, file(images.encoded(images.pixels(20, 20, 1))))

    assert (answer.status_code, answer.json()["code"]) == (422, "PREPROCESSING_FAILED")
    assert "steps[3], normalize" in answer.json()["detail"]


def test_dropout_draws_see_the_same_prepared_input(client) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout(0.5)).eval()
    model = upload(client, scripted(network), model_preprocessing_file=file(PIPELINE))
    colours = images.pixels(20, 31)
    how = options(N=400, output="logits")

    answer = ask(
        client, model, base64.b64encode(images.encoded(colours)).decode(), uncertainty_method="MC_DROPOUT",
        options=how,
    )  # fmt: skip

    given = torch.from_numpy(colours.transpose(2, 0, 1).copy())
    logits = network(carried_out(parse({"steps": STEPS}), given)).detach()
    masks = torch.bernoulli(torch.full((20_000, 4), 0.5), generator=torch.manual_seed(1)) * 2
    expected = (logits * masks).softmax(1).mean(0)
    np.testing.assert_allclose(answer.json()["inference"][0], expected, atol=0.1)


def test_each_member_of_an_ensemble_prepares_for_itself(client) -> None:
    def linear(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()

    small = json.dumps(
        {"steps": [{"step": "to_tensor"}, {"step": "resize", "size": [4, 4]}]}
    ).encode()
    crop = json.dumps(
        {"steps": [{"step": "to_tensor"}, {"step": "center_crop", "size": 4}]}
    ).encode()
    members = [
        upload(client, scripted(linear(seed)), model_preprocessing_file=file(text))
        for seed, text in enumerate([small, crop])
    ]
    body = {"name": "mean", "description": "-", "type": "MEAN", "models": members}
    mean = client.post("/api/models/", body, format="multipart").json()["model_id"]
    colours = images.pixels(9, 10)

    answer = ask(client, mean, base64.b64encode(images.encoded(colours)).decode(), options=RAW)

    given = torch.from_numpy(colours.transpose(2, 0, 1).copy())
    outputs = [
        linear(seed)(carried_out(parse(json.loads(text)), given)).detach()
        for seed, text in enumerate([small, crop])
    ]
    np.testing.assert_allclose(answer.json()["inference"], torch.stack(outputs).mean(0), atol=1e-5)


# torchvision's transforms, TorchScript, and tensors.


@pytest.mark.parametrize("name", ["usual.pt", "usual.pickle"])
def test_a_pickled_compose_is_stored_as_a_pipeline_and_applied(client, name: str) -> None:
    model = prepared(client, (MADE / name).read_bytes())
    colours = images.pixels(16, 20)

    stored = b"".join(client.get(f"/api/models/{model}/preprocessing/").streaming_content)
    found = seen(client, model, images.encoded(colours))

    assert json.loads(stored)["steps"][1]["step"] == "resize"
    given = torch.from_numpy(colours.transpose(2, 0, 1).copy())
    np.testing.assert_allclose(found, carried_out(parse(json.loads(stored)), given), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("v1.pt", "TRANSFORMS_V1"),
        ("v1.pickle", "TRANSFORMS_V1"),
        ("random.pt", "UNKNOWN_TRANSFORM"),
    ],
)
def test_transforms_that_cannot_be_translated_are_a_400(client, name: str, code: str) -> None:
    sent = {"model_preprocessing_file": file((MADE / name).read_bytes())}

    answer = client.post(f"/api/models/{same(client)}/preprocessing/", sent, format="multipart")

    assert (answer.status_code, answer.json()["code"]) == (400, code)


def test_a_torchscript_module_goes_before_the_model(client) -> None:
    model = prepared(client, scripted(Halved()))
    colours = images.pixels(5, 7)

    found = seen(client, model, images.encoded(colours))

    expected = torch.from_numpy(colours.transpose(2, 0, 1)[None].copy()).float() / 127.5 - 1
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_a_module_that_changes_itself_starts_anew_each_time(client) -> None:
    model = prepared(client, scripted(Counting()))
    data = images.encoded(np.zeros((2, 2), np.uint8))

    first, second = seen(client, model, data), seen(client, model, data)

    np.testing.assert_array_equal(first, np.full((1, 1, 2, 2), 2, np.float32))
    np.testing.assert_array_equal(second, first)


def test_another_preprocessing_counts_from_the_next_question_on(client) -> None:
    model = prepared(client, scripted(Halved()))
    data = images.encoded(np.full((2, 2), 255, np.uint8))
    before = seen(client, model, data)

    sent = {"model_preprocessing_file": file(b'{"steps": [{"step": "to_tensor"}]}')}
    client.post(f"/api/models/{model}/preprocessing/", sent, format="multipart")
    after = seen(client, model, data)

    assert (before.max(), after.max()) == (1, 1)
    assert before.shape == after.shape
    zero = images.encoded(np.zeros((2, 2), np.uint8))
    assert seen(client, model, zero).min() == 0


class Failing(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            raise ValueError("no pictures please")
        return x


class Pair(Weighted):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Endless(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        while bool(x.float().sum() > -1):
            x = x + 1
        return x


@pytest.mark.parametrize(
    ("module", "told"), [(Failing, "no pictures please"), (Pair, "answers no tensor")]
)
def test_a_module_that_fails_says_that_it_was_the_preprocessing(client, module, told: str) -> None:
    answer = ask(
        client, prepared(client, scripted(module())), file(images.encoded(images.pixels(2, 2)))
    )

    assert (answer.status_code, answer.json()["code"]) == (422, "PREPROCESSING_FAILED")
    assert told in answer.json()["detail"]


def test_a_module_that_does_not_end_is_ended_and_the_next_question_answered(
    client, settings
) -> None:
    settings.FL_INFERENCE_SECONDS = 2
    data = images.encoded(images.pixels(2, 2))

    answer = ask(client, prepared(client, scripted(Endless())), file(data))

    assert (answer.status_code, answer.json()["code"]) == (422, "SANDBOX_TIMEOUT")
    settings.FL_INFERENCE_SECONDS = 30
    assert seen(client, same(client), data).shape == (1, 3, 2, 2)


def test_a_module_with_forbidden_operators_is_refused_when_it_is_uploaded(client) -> None:
    class Reads(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_file("/etc/passwd", shared=False, size=4)

    sent = {"model_preprocessing_file": file(scripted(Reads()))}
    answer = client.post(f"/api/models/{same(client)}/preprocessing/", sent, format="multipart")

    assert (answer.status_code, answer.json()["code"]) == (422, "FORBIDDEN_OPERATOR")


def test_tensors_as_preprocessing_are_kept_and_a_question_says_what_to_do(client) -> None:
    data = save({"mean": np.zeros(3, np.float32)})
    model = prepared(client, data)

    kept = b"".join(client.get(f"/api/models/{model}/preprocessing/").streaming_content)
    answer = ask(client, model, [[1.0]])

    assert kept == data
    assert (answer.status_code, answer.json()["code"]) == (422, "PREPROCESSING_NOT_RUNNABLE")
    assert '{"steps": [' in answer.json()["detail"]
    assert not InferenceJob.objects.exists()


def test_a_replaced_pipeline_leaves_no_file_behind(client) -> None:
    model = prepared(client, PIPELINE)
    former = GlobalModel.objects.get(pk=model).preprocessing

    sent = {"model_preprocessing_file": file(b'{"steps": []}')}
    client.post(f"/api/models/{model}/preprocessing/", sent, format="multipart")

    former.refresh_from_db()
    assert former.doomed_at is not None
    current = GlobalModel.objects.get(pk=model).preprocessing
    with weights_storage().open(current.name) as stored:
        assert stored.read() == b'{"steps":[]}'
