"""Each strategy's published vector, through HTTP: created, uploaded to, aggregated, resumed from a kill."""

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.utils import timezone
from rest_framework.test import APIClient
from safetensors.numpy import load, save

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.models import ModelVersion, TrainerEvent, User
from fl_server_core.services.events import event_claim
from fl_server_core.storage import local_path
from tests.scenes import person

pytestmark = pytest.mark.django_db
Tensors = dict[str, np.ndarray]


@dataclass
class Sent:
    """One client's answer in one round; `tensors` are its file, extras included."""

    tensors: Tensors
    samples: int = 1
    steps: int | None = None


END = "-0000-4000-8000-{:0>12}"  # of participants' ids
LATER = Sent({})  # fetches the round's task, and answers it in a later round


@dataclass
class Case:
    """A vector: clients that send nothing in a round (None) give up. Copied from the shared test vectors."""

    method: str
    start: Tensors
    rounds: Sequence[Sequence[Sent | None]]
    expected: Sequence[Tensors | None]  # after each round
    options: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, Any] = field(default_factory=dict)
    atol: float = 1e-9
    scalars: dict[str, Any] | None = None
    state: dict[str, list[float]] = field(default_factory=dict)  # at the end
    target: int = 0  # rounds asked for, if not as many as there are


def vec(*values: float) -> Tensors:
    return {"w": np.array(values, np.float64)}


def with_extra(weights: Tensors, **extras: Any) -> Tensors:
    """`a__b=1.0` becomes extra.a.b; a list becomes the extra of tensor w."""
    named = dict(weights)
    for key, value in extras.items():
        name = f"extra.{key.replace('__', '.')}"
        per_tensor = isinstance(value, list)
        named[f"{name}.w" if per_tensor else name] = np.array(value, np.float64)
    return named


def plain(rows: Sequence[Sequence[float]], samples: Sequence[int] = ()) -> list[Sent]:
    return [Sent(vec(*row), n) for row, n in zip(rows, samples or [1] * len(rows), strict=True)]


LAYERS = [
    {"a": np.array([[1.0, 2.0], [3.0, 4.0]]), "b": np.array([0.0, 1.0])},
    {"a": np.array([[2.0, 0.0], [1.0, -1.0]]), "b": np.array([2.0, -1.0])},
    {"a": np.array([[-1.0, 1.0], [0.0, 2.0]]), "b": np.array([1.0, 0.5])},
]
ZERO = {"a": np.zeros((2, 2)), "b": np.zeros(2)}
LAYERED = [Sent(model, n) for model, n in zip(LAYERS, (10, 20, 70), strict=True)]
DELTAS = [[0.2, -0.1, 0.4], [0.1, 0.3, -0.2], [-0.3, 0.05, 0.1]]
CLOUD = [[1.0, 2.0], [1.1, 2.02], [0.97, 2.1], [0.9, 2.05], [1.06, 1.9], [6.0, 7.0], [-5.0, 6.0]]
FIVE = [[1.0, 10.0], [2.0, -3.0], [4.0, 0.0], [100.0, 1.0], [-50.0, 2.5]]
SEVEN = [
    [1.0, 1.0], [1.1, 0.9], [0.9, 1.2], [1.05, 1.0], [0.95, 0.95], [1.2, 1.1], [9.0, -9.0],
]  # fmt: skip


STALE = 0.6 * 2**-0.5  # alpha S(1)
BUFFERED = [  # the third client trains on while the first two make a version
    [*plain([[1.0, 0.0], [0.0, 2.0]]), LATER],
    [Sent(vec(1.5, 1.0)), LATER, Sent(vec(-1.0, 1.0))],
]


def stepped(expected: Sequence[Sequence[float]]) -> list[list[Sent]]:
    """Rounds of the server optimizers: from each expected model on, two clients whose mean is the delta."""
    starts = [[1.0, -2.0, 0.5], *expected[:-1]]
    return [
        plain([(np.array(x) + 4 * np.array(delta)).tolist(), x], [1, 3])
        for x, delta in zip(starts, DELTAS, strict=True)
    ]


def bulyan(rows: Sequence[Sequence[float]], f: int) -> list[float]:
    """The paper's algorithm, word for word."""
    left = [np.array(row) for row in rows]
    chosen = []
    for _ in range(len(rows) - 2 * f):
        nearest = max(1, len(left) - f - 2)
        scores = [
            sum(sorted(float(((a - b) ** 2).sum()) for j, b in enumerate(left) if j != i)[:nearest])
            for i, a in enumerate(left)
        ]
        chosen.append(left.pop(scores.index(min(scores))))
    made = []
    for column in np.array(chosen).T:
        near = sorted(column, key=lambda value: abs(value - np.median(column)))
        made.append(float(np.mean(near[: len(chosen) - 2 * f])))
    return made


def optimizer(
    method: str, wrong: dict[str, Any], expected: list[list[float]], **options: Any
) -> Case:
    return Case(
        method, vec(1.0, -2.0, 0.5), stepped(expected), [vec(*x) for x in expected], options, wrong
    )


CASES: dict[str, Case] = {
    "fedavg_weighted": Case(
        "FedAvg", ZERO, [LAYERED],
        [{"a": np.array([[-0.2, 0.9], [0.5, 1.6]]), "b": np.array([1.1, 0.25])}],
        wrong={"weighting": "size"},
    ),
    "fedavg_uniform": Case(
        "FedAvg", ZERO, [LAYERED],
        [{"a": np.array([[2 / 3, 1.0], [4 / 3, 5 / 3]]), "b": np.array([1.0, 1 / 6])}],
        {"weighting": "uniform"}, {"cap": 0},
    ),
    "fedavg_capped": Case(
        "FedAvg", vec(0.0), [plain([[1.0], [2.0], [4.0]], [10, 20, 70])], [vec(2.6)],
        {"cap": 20}, {"cap": 1.5},
    ),
    "fedavgm": optimizer(
        "FedAvgM", {"momentum": 1},
        [[1.2, -2.1, 0.9], [1.48, -1.89, 1.06], [1.432, -1.651, 1.304]],
        server_lr=1, momentum=0.9,
    ),
    "fedadagrad_paper": optimizer(
        "FedAdagrad", {"eta": 0},
        [
            [1.0995012499921877, -2.099004999875006, 0.5997503124995117],
            [1.144023056753543, -2.004436195729492, 0.5551288411462568],
            [1.0640586835432821, -1.988867523846299, 0.5769030630788157],
        ],
    ),
    "fedadam_paper": optimizer(
        "FedAdam", {"beta1": 0.9},
        [
            [1.0951260516755887, -2.090502831185222, 0.5975315422879747],
            [1.2153335788779895, -2.0261300072397486, 0.6326553748236029],
            [1.2028041000923475, -1.9533944465933748, 0.6851920967437096],
        ],
    ),
    "fedadagrad_flwr": optimizer(
        "FedAdagrad", {"variant": "tff"},
        [
            [1.099502487562189, -2.099009900990099, 0.5997506234413965],
            [1.1440247375571848, -2.004440625492293, 0.5551290407834875],
            [1.0640600795216144, -1.9888718779010168, 0.5769033144464851],
        ],
        variant="flwr",
    ),
    "fedadam_flwr": optimizer(
        "FedAdam", {"beta_2": True},
        [
            [1.0707104560384255, -2.067496344400315, 0.5724351013076554],
            [1.1472274954505797, -2.0265396203273736, 0.5947771520066534],
            [1.1399928310280498, -1.9845360622841026, 0.6251091311117831],
        ],
        variant="flwr",
    ),
    "fedyogi_paper": optimizer(
        "FedYogi", {"tau": "small"},
        [
            [1.0095124921972505, -2.009049875621121, 0.5097531245118713],
            [1.0214869885971862, -2.0026157729729075, 0.5132517275912865],
            [1.0202379622699487, -1.9953801972590475, 0.5184613212279975],
        ],
    ),
    "fedprox_mean": Case(
        "FedProx", vec(1.0, -1.0), [plain([[1.925, -0.5935], [1.4, -0.85]], [1, 3])],
        [vec(1.53125, -0.785875)], {"mu": 0.5}, {"mu": -1},
    ),
    "fedprox_adaptive": Case(
        "FedProx", vec(0.0),
        [
            [Sent(with_extra(vec(1.0), prox__loss=loss)) for loss in losses]
            for losses in ([2.0, 4.0], [1.0, 3.0], [5.0, 5.0])
        ],
        [vec(1.0)] * 3,
        {"mu": 1.0, "adaptive": True, "delta": 0.1, "patience": 2}, {"patience": 0},
        # Falls twice (the first round counts: the loss before it is infinite), then a rise.
        scalars={"mu": 1.0, "loss": 5.0, "falls": 0},
    ),
    "fednova_sgd": Case(
        "FedNova", vec(1.0, 2.0),
        [[Sent(vec(0.5, 1.0), 2, 2), Sent(vec(0.0, 2.5), 3, 5)]],
        [vec(0.164, 1.468)], {"gamma": 1}, {"gamma": 0},
    ),
    "fednova_uniform_p": Case(
        "FedNova", vec(1.0, 2.0),
        [[Sent(vec(0.5, 1.0), 2, 2), Sent(vec(0.0, 2.5), 3, 5)]],
        [vec(0.2125, 1.3)], {"weighting": "uniform"}, {"momentum": 1},
    ),
    "fednova_norms_that_clients_send": Case(
        "FedNova", vec(1.0, 2.0),
        [[
            Sent(with_extra(vec(0.5, 1.0), fednova__norm=2.0), 2, 77),
            Sent(with_extra(vec(0.0, 2.5), fednova__norm=5.0), 3, 99),
        ]],
        [vec(0.164, 1.468)],
    ),
    "scaffold_server": Case(
        "SCAFFOLD", vec(1.0, 0.0),
        [
            # c = (0.1, -0.1) is made by a first round in which nobody moves.
            [Sent(with_extra(vec(1.0, 0.0), scaffold__dc=[0.1, -0.1])) for _ in range(4)],
            [
                Sent(with_extra(vec(0.8, 0.4), scaffold__dc=[0.05, 0.0])),
                Sent(with_extra(vec(1.6, 0.0), scaffold__dc=[-0.15, 0.1])),
                None, None,
            ],
        ],
        [vec(1.0, 0.0), vec(1.2, 0.2)], {"server_lr": 1.0}, {"server_lr": "fast"},
        state={"c.0": [0.075, -0.075]},
    ),
    "feddyn_server": Case(
        "FedDyn", vec(1.0, 1.0),
        [
            [*plain([[0.8, 1.2], [0.6, 1.1]]), None, None],
            [*plain([[0.7, 1.3], [0.9, 1.0]]), None, None],
        ],
        [vec(0.55, 1.225), vec(0.775, 1.1875)], {"alpha": 0.1}, {"alpha": 0},
    ),
    "qfedavg_q0.0": Case(
        "qFedAvg", vec(1.0, -1.0),
        [[
            Sent(with_extra(vec(0.9, -0.8), qfedavg__loss=0.5)),
            Sent(with_extra(vec(0.5, -1.2), qfedavg__loss=2.0)),
        ]],
        [vec(0.7, -1.0)], {"q": 0, "client_lr": 0.1}, {"q": -1},
    ),
    "qfedavg_q1": Case(
        "qFedAvg", vec(1.0, -1.0),
        [[
            Sent(with_extra(vec(0.9, -0.8), qfedavg__loss=0.5)),
            Sent(with_extra(vec(0.5, -1.2), qfedavg__loss=2.0)),
        ]],
        # L 10; D = .5*10*(.1,-.2) + 2*10*(.5,.2) = (10.5, 3); h = 5 + 5 + 29 + 20 = 59
        [vec(1 - 10.5 / 59, -1 - 3 / 59)], {"q": 1, "client_lr": 0.1},
    ),
    "feddgga": Case(
        "FedDGGA", vec(0.0),
        [
            [
                Sent(with_extra(vec(1.0), feddgga__received=9.0, feddgga__trained=0.1)),
                Sent(with_extra(vec(3.0), feddgga__received=9.0, feddgga__trained=0.5)),
            ],
            [
                Sent(with_extra(vec(1.0), feddgga__received=0.5, feddgga__trained=0.1)),
                Sent(with_extra(vec(3.0), feddgga__received=0.5, feddgga__trained=0.5)),
            ],
        ],
        # G = (.4, 0), d = .2: a = (.7, .3)
        [vec(2.0), vec(0.7 * 1 + 0.3 * 3)], {"step": 0.2}, {"metric": "auc"},
    ),
    "median_odd": Case(
        "FedMedian", vec(0.0, 0.0), [plain(FIVE)], [vec(2.0, 1.0)], wrong={"f": 1}
    ),
    "trimmed_mean_beta0.2": Case(
        "TrimmedMean", vec(0.0, 0.0), [plain(FIVE)], [vec(7 / 3, 3.5 / 3)],
        {"beta": 0.2}, {"beta": 0.5},
    ),
    "krum": Case("Krum", vec(0.0, 0.0), [plain(CLOUD)], [vec(1.0, 2.0)], {"f": 2}, {"f": 1.5}),
    "multikrum_weighted": Case(
        "MultiKrum", vec(0.0, 0.0), [plain(CLOUD, [10, 20, 30, 40, 50, 60, 70])],
        [vec(1.0183333333333333, 2.0566666666666666)],
        {"f": 2, "m": 3, "weighting": "samples"}, {"m": 0},
    ),
    "bulyan_oneshot": Case(
        "Bulyan", vec(0.0, 0.0), [plain(SEVEN)], [vec(1.05, 0.9833333333333334)],
        {"f": 1, "selection": "oneshot"}, {"selection": "twice"},
    ),
    "multikrum_paper": Case(  # n - f of them, all alike: 1 to 5 are nearest
        "MultiKrum", vec(0.0, 0.0), [plain(CLOUD, [10, 20, 30, 40, 50, 60, 70])],
        [vec(5.03 / 5, 10.07 / 5)], {"f": 2}, {"m": "all"},
    ),
    "bulyan_iterative": Case(
        "Bulyan", vec(0.0, 0.0), [plain(SEVEN)], [vec(*bulyan(SEVEN, 1))], {"f": 1}, {"f": -1},
    ),
    "geometric_median_converged": Case(
        "GeometricMedian", vec(0.0, 0.0),
        [plain([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [10.0, 10.0]], [1, 2, 2, 1])],
        [vec(0.5, 0.5)], {"nu": 1e-6, "iters": 500, "tolerance": 0}, {"nu": 0}, atol=1e-5,
    ),
    "norm_clipping_mean": Case(
        "NormClipping", vec(1.0, 1.0), [plain([[4.0, 5.0], [1.3, 1.4], [1.0, 1.0]])],
        [vec(1.3, 1.4)], {"C": 1}, {"C": 0},
    ),
    "centered_clipping": Case(
        "CenteredClipping", vec(0.0, 0.0),
        # In the second round both are as far from v, which is (0.45, 0.6), as from 0 in the first.
        [plain([[3.0, 4.0], [0.3, 0.4]]), plain([[3.9, 5.2], [1.2, 1.6]])],
        [vec(0.45, 0.6), vec(1.35, 1.8)], {"tau": 1.0, "iters": 1}, {"iters": 0},
        state={"v.0": [0.9, 1.2]},
    ),
    "fltrust": Case(
        "FLTrust", vec(0.0, 0.0),
        [plain([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [-3.0, 0.0], [0.0, 5.0]])],
        [vec(0.8786796564403575, 0.2928932188134524)],
        {"root": "first client"}, {"root": "somebody"},
    ),
    "tff_zeroing": Case(
        "AdaptiveZeroing", vec(0.0, 0.0),
        [plain([[5.0, 0.0], [1.0, -21.0], [22.0, 0.0], [0.0, 1000.0]])],
        [vec(6.0 / 4, -21.0 / 4)], {}, {"multiplier": 0},
        scalars={"estimate": 10 * 10 ** (0.98 - 0.25)},
    ),
    "iiadmm_server": Case(
        "IIADMM", vec(1.0, 0.0),
        [plain([[0.8, 0.2], [0.6, -0.2]]), plain([[0.7, 0.1], [0.9, 0.0]])],
        [vec(0.4, 0.0), vec(0.9, 0.1)], {"rho": 2}, {"rho": 0},
    ),
    "iceadmm": Case(
        "ICEADMM", vec(0.0, 0.0),
        [[
            Sent(with_extra(vec(0.8, 0.2), admm__dual=[0.4, -0.2], admm__rho=2.0)),
            Sent(with_extra(vec(0.6, -0.2), admm__dual=[0.2, 0.6], admm__rho=3.0)),
        ]],
        [vec((1.6 + 1.8 + 0.6) / 5, (0.4 - 0.6 + 0.4) / 5)], {"rho": 2}, {"rho": -1},
    ),
    "fedsgd": Case(
        "FedSGD", vec(1.0, 2.0), [plain([[0.5, -1.0], [1.5, 0.0]], [1, 3])], [vec(0.875, 2.025)],
        {"lr": 0.1}, {"lr": 0},
    ),
    "fedpm": Case(
        "FedPM", vec(0.5, 0.5),
        [plain([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])], [vec(0.75, 0.25)],
        {}, {"prior": 0.5},
    ),
    "feddc": Case(  # the models go round once; what comes out is the mean of those that went through two sites
        "FedDC", vec(0.0), [plain([[1.0], [2.0]]), plain([[3.0], [6.0]], [1, 3])],
        [None, vec((3.0 + 3 * 6.0) / 4)], {"daisy_chain_period": 2}, {"cap": 0}, target=1,
    ),
    "fedasync_polynomial": Case(
        "FedAsync", vec(1.0, 2.0),
        [[Sent(vec(2.0, 0.0)), LATER], [LATER, Sent(vec(0.0, 1.0))]],
        [vec(1.6, 0.8), vec(*(1 - STALE) * np.array([1.6, 0.8]) + STALE * np.array([0.0, 1.0]))],
        {"alpha": 0.6}, {"alpha": 0},
    ),
    "fedbuff_paper": Case(
        "FedBuff", vec(0.0, 0.0), BUFFERED,
        [vec(0.5, 1.0), vec(1 - 0.5 * 2**-0.5, 1 + 0.5 * 2**-0.5)],
        {"buffer_size": 2}, {"server_lr": 0},
    ),
    "fedbuff_normalised": Case(
        "FedBuff", vec(0.0, 0.0), BUFFERED,
        [vec(0.5, 1.0), vec(0.5 + (1 - 2**-0.5) / (1 + 2**-0.5), 1 + 2**-0.5 / (1 + 2**-0.5))],
        {"buffer_size": 2, "normalised": True}, {"normalised": 1},
    ),
    "integer_buffers": Case(
        "FedAvg", {"n": np.array([0])},
        [[Sent({"n": np.array([v])}, n) for v, n in ((10, 1), (11, 1), (14, 2))]],
        [{"n": np.array([12])}],
    ),
}  # fmt: skip


class Site:
    """Everybody of one training, over HTTP."""

    def __init__(self, login: Callable[[User], APIClient], case: Case, tag: str = "0") -> None:
        self.case = case
        count = max(len(sent) for sent in case.rounds)
        self.actor = login(person(f"actor{tag}", actor=True))
        people = [
            User(username=f"site{k}{tag}", client=True, id=f"{k:08x}" + END.format(tag))
            for k in range(count)
        ]
        for user in people:
            user.save()
        self.sites = [login(user) for user in people]
        self.options = dict(case.options)
        if "root" in self.options:
            self.options["root"] = str(people[0].pk)
        body = {"name": "m", "description": "d", "model_file": file(case.start)}
        answer = self.actor.post("/api/models/", body, format="multipart")
        assert answer.status_code == 201, answer.content
        self.model = answer.json()["model_id"]
        self.clients = [str(user.pk) for user in people]
        self.held: dict[APIClient, Any] = {}

    def create(self, options: dict[str, Any]) -> Any:
        return self.actor.post(
            "/api/trainings/",
            {
                "model_id": self.model,
                "target_num_updates": self.case.target or len(self.case.rounds),
                "metric_names": [],
                "aggregation_method": self.case.method,
                "clients": self.clients,
                "options": {"skip_model_tests": True, **options},
            },
            format="json",
        )

    def start(self) -> str:
        answer = self.create(self.options)
        assert answer.status_code == 201, answer.content
        training = answer.json()["training_id"]
        started = self.actor.post(f"/api/trainings/{training}/start/")
        assert started.status_code == 202, started.content
        return str(training)

    def answer_round(self, number: int) -> TrainerEvent:
        """Every client answers its task; the event that follows."""
        for client, sent in zip(self.sites, self.case.rounds[number], strict=False):
            task = self.held.pop(client, None)
            if task is None:
                task = client.get("/api/tasks/").json()["task"]
                assert task["round"] == number
            if sent is LATER:
                self.held[client] = task
                continue
            if sent is None:
                url = f"/api/tasks/{task['id']}/failure/"
                done = client.post(url, {"code": "ABSENT", "text": "not today"}, format="json")
                assert done.status_code == 200, done.content
                continue
            meta: dict[str, Any] = {"num_examples": sent.samples, "base_version": task["round"]}
            if sent.steps is not None:
                meta["num_steps"] = sent.steps
            body = {"meta": json.dumps(meta), "model_file": file(sent.tensors)}
            done = client.post(f"/api/tasks/{task['id']}/result/", body, format="multipart")
            assert done.status_code == 201, done.content
        return TrainerEvent.objects.get(state="pending", round__training__model=self.model)

    def download(self) -> Tensors:
        return load(b"".join(self.actor.get(f"/api/models/{self.model}/").streaming_content))

    def bytes_of(self, number: int) -> list[bytes]:
        """Weights, state and what clients get of a version, as they are stored."""
        version = ModelVersion.objects.get(model_id=self.model, number=number)
        found = []
        for blob in (version.blob, version.strategy_state, version.shared):
            if blob is not None:
                with local_path(blob) as path:
                    found.append(path.read_bytes())
        return found


def file(tensors: Tensors) -> SimpleUploadedFile:
    return SimpleUploadedFile("weights", save(tensors))


@pytest.mark.parametrize("name", CASES)
def test_the_vector_comes_out_of_uploads_over_http_and_a_killed_worker_leaves_the_same_bytes(
    login, name: str, monkeypatch
) -> None:
    """Killed, in a training beside, before the last round's result was committed: its files are made once more."""
    case = CASES[name]
    site, killed = Site(login, case, "a"), Site(login, case, "b")
    last = len(case.rounds)
    site.start()
    killed.start()

    for number, expected in enumerate(case.expected):
        process_trainer_task(site.answer_round(number).pk)
        event = killed.answer_round(number)
        if number + 1 == last:
            interrupt(event, monkeypatch)
        process_trainer_task(event.pk)

        got = site.download()
        assert got.keys() == case.start.keys()
        if expected is not None:
            for tensor, values in expected.items():
                np.testing.assert_allclose(got[tensor], values, rtol=0, atol=case.atol)
                assert got[tensor].dtype == case.start[tensor].dtype
    version = ModelVersion.objects.get(model_id=site.model, number=last)
    if case.scalars is not None:
        assert version.scalars == pytest.approx(case.scalars)
    if case.state:
        with local_path(version.strategy_state) as path:
            remembered = load(path.read_bytes())
        for block, numbers in case.state.items():
            np.testing.assert_allclose(remembered[block], numbers, rtol=0, atol=case.atol)
    made, again = site.bytes_of(last), killed.bytes_of(last)
    assert len(made) == len(again)
    for one, other in zip(made, again, strict=True):
        assert nameless(one) == nameless(other)


def nameless(data: bytes) -> bytes:
    """A state's scalars may be by participant, who have other ids in the other training."""
    return data.replace(END.format("b").encode(), END.format("a").encode())


def interrupt(event: TrainerEvent, monkeypatch) -> None:
    """A worker that does all the work and is gone before it can say so."""
    from fl_server_ai.trainer import publishing

    class Killed(BaseException):
        pass

    def die(*_: Any) -> bool:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(publishing, "_publish", die)
        with pytest.raises(Killed):
            process_trainer_task(event.pk)
    past = timezone.now() - timedelta(seconds=1)
    TrainerEvent.objects.filter(pk=event.pk).update(lease_until=past)
    assert event_claim(event_id=event.pk) is not None
    TrainerEvent.objects.filter(pk=event.pk).update(lease_until=past)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].wrong])
def test_a_wrong_option_is_refused_with_a_pointer(login, name: str) -> None:
    site = Site(login, CASES[name])

    answer = site.create(CASES[name].wrong)

    assert answer.status_code == 400
    assert answer.json()["code"] == "BAD_OPTION"
    pointers = [fault["pointer"] for fault in answer.json()["errors"]]
    assert pointers == [f"/options/{key}" for key in CASES[name].wrong]


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_no_strategy_goes_without(login, name: str) -> None:
    """What each must have, or this fails: a vector here, a wrong option, a line in the docs and in the API."""
    cases = [case for case in CASES.values() if case.method == name]
    overview = Path(__file__).parents[2] / "docs" / "reference" / "strategies.md"
    page = docs_page()
    client = login(person("reader"))

    listed = {entry["name"]: entry for entry in client.get("/api/aggregators/").json()}

    assert cases, "no vector over HTTP, and so no resume after a kill"
    assert any(case.wrong for case in cases), "no wrong option"
    assert name in overview.read_text(encoding="utf-8"), "nothing says when to take it"
    section = page.split(f"## {name}\n", 1)[1].split("\n## ", 1)[0]
    assert "\nPaper: <https://" in section, "the paper is not linked"
    assert all(f"`{option}`" in section for option in listed[name]["defaults"])
    assert listed[name]["paper"]
    assert listed[name]["options_schema"]["additionalProperties"] is False


@functools.cache
def docs_page() -> str:
    path = Path(__file__).parents[2] / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("docs_generate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.strategies_page()
