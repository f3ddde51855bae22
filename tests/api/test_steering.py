"""Steering over HTTP: status codes, and what the answers say."""

import pytest

from tests.scenes import scene

pytestmark = pytest.mark.django_db


def test_a_training_is_paused_resumed_and_cancelled(login) -> None:
    running = scene()
    client, at = login(running.actor), f"/api/trainings/{running.training.pk}/"

    answers = [
        client.post(f"{at}{verb}/")
        for verb in ("pause", "pause", "resume", "resume", "cancel", "cancel", "resume")
    ]

    assert [a.status_code for a in answers] == [200] * 6 + [409]
    assert [a.json()["state"] for a in answers] == ["P", "P", "O", "O", "X", "X", "X"]
    assert answers[-1].json()["code"] == "ILLEGAL_STATE"


def test_a_deadline_is_extended(login) -> None:
    running = scene(round_deadline=60.0)
    client, at = login(running.actor), f"/api/trainings/{running.training.pk}/extend/"

    longer = client.post(at, {"seconds": 600})
    again = client.post(at, {"deadline": longer.json()["deadline"]})
    shorter = client.post(at, {"seconds": 5})
    both = client.post(at, {"seconds": 900, "deadline": "2099-01-01T00:00:00Z"})
    far = client.post(at, {"deadline": "2099-01-01T00:00:00Z"})

    assert (longer.status_code, again.status_code) == (200, 200)
    assert again.json()["deadline"] == longer.json()["deadline"]
    codes = [answer.json()["code"] for answer in (shorter, both, far)]
    assert codes == ["NOT_LATER", "FIELD_REQUIRED", "TOO_LATE"]
    assert {a.status_code for a in (shorter, both, far)} == {400}
