"""The admin site: everything opens, costs the same at any length, and acts through the services."""

import re
import uuid
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Group, Permission
from django.db import connection
from django.db.models import Model
from django.test import Client, RequestFactory
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from fl_server_ai.services.trainings import training_start
from fl_server_api.admin import overview
from fl_server_core.exceptions import IllegalMove
from fl_server_core.lifecycle import RoundPhase, TaskState, TrainingState, move
from fl_server_core.models import (
    ApiToken,
    Blob,
    ClientProfile,
    GlobalModel,
    IdempotencyKey,
    LocalModel,
    Metric,
    ModelStatistics,
    ModelVersion,
    Notification,
    Participant,
    Round,
    SwagMoments,
    Task,
    TrainerEvent,
    Training,
    Upload,
    User,
    WorkSlice,
)
from fl_server_core.services.models import model_create
from fl_server_core.services.tokens import BadToken, token_issue, token_user
from fl_server_core.services.trainings import training_create
from tests.scenes import scene

pytestmark = pytest.mark.django_db

HISTORY: list[type[Model]] = [
    ModelVersion,
    Blob,
    Round,
    Task,
    LocalModel,
    Metric,
    TrainerEvent,
    Notification,
    IdempotencyKey,
    Participant,
    SwagMoments,
    ClientProfile,
    Upload,
    ModelStatistics,
    WorkSlice,
]
OURS: list[type[Model]] = [*HISTORY, User, ApiToken, GlobalModel, Training]
EVERY: list[type[Model]] = [*OURS, Group]
names = pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
history = pytest.mark.parametrize("kind", HISTORY, ids=lambda kind: kind.__name__)


def page(kind: type[Model], view: str, *args: object) -> str:
    return reverse(f"admin:{kind._meta.app_label}_{kind._meta.model_name}_{view}", args=args)


def blob(index: int = 0) -> Blob:
    """A row without a file: no admin page opens one."""
    return Blob(name=f"aa/{uuid.uuid4()}", digest=f"{index:064x}", size=1_500_000)


def a_model(owner: User, name: str = "chest x-ray") -> GlobalModel:
    return model_create(
        owner=owner, name=name, description="", container="safetensors", weights=blob()
    )


def a_training(*clients: User, owner: User | None = None, **fields: Any) -> Training:
    owner = owner or User.objects.create(username=f"actor {uuid.uuid4()}", actor=True)
    return training_create(
        actor=owner,
        model=fields.pop("model", None) or a_model(owner),
        target_num_updates=3,
        aggregation_method="FedAvg",
        options=fields.pop("options", {}),
        clients=[client.pk for client in clients],
    )


def site(name: str) -> User:
    return User.objects.create(username=name, client=True, message_endpoint="https://site.example")


def row(kind: type[Model], index: int) -> Model:
    """One more row of this kind, with rows of its own behind every foreign key."""
    if kind is Group:
        return Group.objects.create(name=f"group {index}")
    if kind is IdempotencyKey:
        return IdempotencyKey.objects.create(
            user=site(f"caller {index}"),
            scope="POST /api/users/",
            key=str(index),
            body_digest="0" * 64,
            status=201,
            answer={"token": "secret answer"},
        )
    user = site(f"site {kind.__name__} {index}")
    if kind is User:
        return user
    if kind is ApiToken:
        token_issue(user=user, label=f"laptop {index}")
        return user.api_tokens.get()
    if kind is Upload:
        return Upload.objects.create(owner=user, length=7, expires_at=timezone.now())
    training = a_training(user)
    training_start(training=training, user=training.actor)
    round = training.rounds.get()
    if kind is LocalModel:
        stored = blob(index)
        stored.save()
        return LocalModel.objects.create(
            training=training,
            round=round,
            owner=user,
            sample_size=7,
            digest=stored.digest,
            size=stored.size,
            blob=stored,
        )
    if kind is SwagMoments:
        pair = [blob(index), blob(index + 500), blob(index + 700)]
        for stored in pair:
            stored.save()
        return SwagMoments.objects.create(
            training=training,
            round=round,
            owner=user,
            sample_size=7,
            first=pair[0],
            second=pair[1],
            deviations=pair[2],
            digest=f"{pair[0].digest}.{pair[1].digest}",
        )
    if kind is ModelStatistics:
        return ModelStatistics.objects.create(key=f"{index:064x}", result={"total_params": 1})
    if kind is ClientProfile:
        return ClientProfile.objects.create(user=user, attributes={"gpu": True}, num_examples=7)
    if kind is Metric:
        return Metric.objects.create(
            model=training.model, key="curve", step=0, reporter=user, value_binary=b"\x00" * 1234
        )
    if kind is TrainerEvent:
        return TrainerEvent.objects.create(
            training=training, round=round, type="TrainingRoundFinished"
        )
    if kind is WorkSlice:
        event = TrainerEvent.objects.create(training=training, round=round, type="T")
        return WorkSlice.objects.create(event=event, kind="columns", index=index, of=index + 1)
    found = {
        Training: training,
        GlobalModel: training.model,
        ModelVersion: training.base_version,
        Blob: training.base_version.blob,
        Participant: training.memberships.get(),
        Round: round,
        Task: round.tasks.get(),
        Notification: training.notifications.first(),
    }[kind]
    assert found is not None
    return found


@pytest.fixture
def root() -> User:
    return User.objects.create_superuser("root", password="correct horse")


@pytest.fixture
def browser(root: User) -> Client:
    client = Client()
    client.force_login(root)
    return client


@pytest.fixture
def ada() -> User:
    return site("ada")


@pytest.fixture
def grace() -> User:
    return site("grace")


def act(browser: Client, kind: type[Model], action: str, *rows: Model, **more: str) -> str:
    """Run an action from the list, and give back the page that answers."""
    answer = browser.post(
        page(kind, "changelist"),
        {"action": action, "_selected_action": [str(row.pk) for row in rows], **more},
        follow=True,
    )
    assert answer.status_code == 200
    return answer.content.decode()


def save(browser: Client, training: Training, target: str, options: str) -> str:
    data = {"target_num_updates": target, "options": options}
    answer = browser.post(page(Training, "change", training.pk), data, follow=True)
    assert answer.status_code == 200
    return answer.content.decode()


# --- opening pages ----------------------------------------------------------------------------


def test_every_model_of_ours_is_registered() -> None:
    registered = {kind for kind in admin.site._registry if kind._meta.app_label == "fl_server_core"}

    assert registered == set(OURS)


@names
def test_list_page_search_and_every_filter_open(kind: type[Model], browser: Client) -> None:
    one = row(kind, 1)
    url = page(kind, "changelist")

    listing = browser.get(url)
    filters = [
        choice["query_string"]
        for spec in listing.context["cl"].filter_specs
        for choice in spec.choices(listing.context["cl"])
    ]

    assert listing.status_code == 200
    assert browser.get(page(kind, "change", one.pk)).status_code == 200
    assert browser.get(page(kind, "history", one.pk)).status_code == 200
    for query in ["?q=one", f"?q={uuid.uuid4()}", "?q=%27%22%3C", *filters]:
        assert browser.get(url + query).status_code == 200, query
    for column in range(1, len(listing.context["cl"].list_display)):
        assert browser.get(f"{url}?o=-{column}").status_code == 200


@names
def test_a_list_costs_the_same_with_1_and_8_rows(kind: type[Model], browser: Client) -> None:
    def queries() -> int:
        with CaptureQueriesContext(
            connection,
        ) as captured:
            assert browser.get(page(kind, "changelist")).status_code == 200
        return len(captured)

    row(kind, 0)
    queries()  # warms caches of content types
    few = queries()
    for index in range(1, 8):
        row(kind, index)
    many = queries()

    assert kind._default_manager.count() >= 8
    assert many == few


def test_a_training_page_costs_the_same_with_1_and_30_participants(browser: Client) -> None:
    def queries(training: Training) -> int:
        training_start(training=training, user=training.actor)
        with CaptureQueriesContext(connection) as captured:
            assert browser.get(page(Training, "change", training.pk)).status_code == 200
        return len(captured)

    queries(a_training(site("warm")))
    few = queries(a_training(site("alone")))
    many = queries(a_training(*(site(f"site {index}") for index in range(30))))

    assert many == few


def test_binary_metrics_are_never_read_and_shown_by_their_size(browser: Client) -> None:
    metric = row(Metric, 1)

    for url in (page(Metric, "changelist"), page(Metric, "change", metric.pk)):
        with CaptureQueriesContext(connection) as captured:
            text = browser.get(url).content.decode()

        assert "1,234 bytes" in text
        for query in captured:
            assert "value_binary" not in re.sub(r'LENGTH\("[^)]*\)', "", query["sql"])


def test_no_page_shows_a_secret(browser: Client, ada: User) -> None:
    ada.set_password("battery staple")
    ada.save()
    key = token_issue(user=ada)
    token = ada.api_tokens.get()
    answer = row(IdempotencyKey, 1)

    pages = [
        page(User, "changelist"),
        page(User, "change", ada.pk),
        page(ApiToken, "changelist"),
        page(ApiToken, "change", token.pk),
        page(IdempotencyKey, "change", answer.pk),
    ]
    text = "".join(browser.get(url).content.decode() for url in pages)

    for secret in (key, token.digest, ada.password, "secret answer"):
        assert secret not in text


def test_a_name_with_markup_is_shown_as_text(browser: Client) -> None:
    evil = "<script>alert(1)</script>"
    user = site(evil)
    owner = User.objects.create(username="actor", actor=True)
    training = a_training(user, owner=owner, model=a_model(owner, evil))
    training_start(training=training, user=owner)
    round = training.rounds.get()
    Metric.objects.create(
        model=training.model, key=evil, step=1, identifier="aggregated", value_float=0.5
    )
    move(round.tasks.get(), TaskState.FAILED, failure=evil)

    pages = [
        page(Training, "changelist"),
        page(Training, "change", training.pk),
        page(GlobalModel, "changelist"),
        page(GlobalModel, "change", training.model_id),
        page(Metric, "changelist"),
        page(Participant, "changelist"),
        page(Task, "changelist"),
    ]

    for url in pages:
        text = browser.get(url).content.decode()
        assert evil not in text
        assert "&lt;script&gt;" in text


def test_a_training_page_says_who_has_sent_and_who_is_missing(
    browser: Client, ada: User, grace: User
) -> None:
    training = a_training(ada, grace)
    training_start(training=training, user=training.actor)
    move(Task.objects.get(user=ada), TaskState.DONE)
    for step, value in enumerate([0.5, 0.75], start=1):
        Metric.objects.create(
            model=training.model,
            key="accuracy",
            step=step,
            identifier="aggregated",
            value_float=value,
        )

    text = browser.get(page(Training, "change", training.pk)).content.decode()
    lines = re.findall(r"<tr>(.*?)</tr>", text)

    assert "1 of 2 sent an update" in text
    assert any("ada" in line and "sent" in line for line in lines)
    assert any("grace" in line and "missing" in line for line in lines)
    assert any("accuracy" in line and "<svg" in line and "0.75" in line for line in lines)


def test_a_model_page_links_every_version_for_download(browser: Client) -> None:
    training = a_training(site("ada"))

    text = browser.get(page(GlobalModel, "change", training.model_id)).content.decode()

    assert f'href="/api/models/{training.model_id}/?version=0"' in text
    assert training.base_version.blob.digest in text


# --- actions ----------------------------------------------------------------------------------


def test_starting_opens_round_0_with_a_task_for_everybody(
    browser: Client, ada: User, grace: User
) -> None:
    training = a_training(ada, grace)

    act(browser, Training, "start", training)

    training.refresh_from_db()
    assert training.state == TrainingState.ONGOING
    assert training.rounds.get().number == 0
    assert Task.objects.filter(round__training=training).count() == 2
    assert LogEntry.objects.filter(object_id=str(training.pk)).exists()


def test_starting_without_clients_is_a_message_and_the_others_start(
    browser: Client, ada: User
) -> None:
    empty, good = a_training(), a_training(ada)

    text = act(browser, Training, "start", empty, good)

    empty.refresh_from_db()
    good.refresh_from_db()
    assert "has no clients" in text
    assert (empty.state, good.state) == (TrainingState.INITIAL, TrainingState.ONGOING)


def test_starting_again_is_a_message(browser: Client, ada: User) -> None:
    training = a_training(ada)
    act(browser, Training, "start", training)

    text = act(browser, Training, "start", training)

    assert "be started" in text
    assert training.rounds.count() == 1


def test_removing_who_is_missing_completes_the_round(
    browser: Client, ada: User, grace: User
) -> None:
    training = a_training(ada, grace)
    training_start(training=training, user=training.actor)
    move(Task.objects.get(user=ada), TaskState.DONE)

    act(browser, Participant, "remove", training.memberships.get(user=grace))

    assert training.memberships.get(user=grace).removed_at is not None
    assert training.rounds.get().phase == RoundPhase.AGGREGATING
    assert TrainerEvent.objects.get(training=training).type == "TrainingRoundFinished"


def test_an_issued_token_is_shown_once_and_a_revoked_one_is_dead(
    browser: Client, ada: User
) -> None:
    text = act(browser, User, "issue_token", ada)
    found = re.search(r"\b[0-9a-f]{40}\b", text)
    assert found is not None
    key = found.group()
    assert token_user(key=key) == ada

    later = browser.get(page(User, "changelist")).content.decode()
    act(browser, ApiToken, "revoke", ada.api_tokens.get())

    assert key not in later
    with pytest.raises(BadToken):
        token_user(key=key)


def test_only_label_and_expiry_of_a_token_can_be_changed(browser: Client, ada: User) -> None:
    token_issue(user=ada, label="before")
    token = ada.api_tokens.get()

    browser.post(
        page(ApiToken, "change", token.pk),
        {"label": "after", "digest": "0" * 64, "user": str(uuid.uuid4()), "prefix": "x"},
    )

    changed = ApiToken.objects.get(pk=token.pk)
    assert changed.label == "after"
    assert (changed.digest, changed.prefix, changed.user) == (token.digest, token.prefix, ada)


# --- what may change --------------------------------------------------------------------------


@history
def test_history_cannot_be_added_changed_or_deleted(kind: type[Model], browser: Client) -> None:
    one = row(kind, 1)
    before = kind._default_manager.filter(pk=one.pk).values().get()

    answers = [
        browser.post(page(kind, "add"), {"state": "x"}),
        browser.post(page(kind, "change", one.pk), {"state": "x"}),
        browser.post(page(kind, "delete", one.pk), {"post": "yes"}),
    ]
    act(browser, kind, "delete_selected", one, post="yes")

    assert [answer.status_code for answer in answers] == [403, 403, 403]
    assert kind._default_manager.filter(pk=one.pk).values().get() == before


def test_a_waiting_training_takes_a_target_and_checked_options(browser: Client, ada: User) -> None:
    training = a_training(ada)

    save(browser, training, "9", '{"min_updates": 2}')
    training.refresh_from_db()
    assert (training.target_num_updates, training.options) == (9, {"min_updates": 2})

    for bad in ('{"min_updates": 0}', '{"nonsense": 1}', "[1]", "{"):
        assert "errorlist" in save(browser, training, "9", bad)
    training.refresh_from_db()
    assert training.options == {"min_updates": 2}


def test_a_started_training_cannot_be_changed(browser: Client, ada: User) -> None:
    training = a_training(ada)
    training_start(training=training, user=training.actor)

    answer = browser.post(
        page(Training, "change", training.pk), {"target_num_updates": "9", "options": "{}"}
    )

    training.refresh_from_db()
    assert answer.status_code == 403
    assert training.target_num_updates == 3
    assert browser.get(page(Training, "add")).status_code == 403


def test_a_form_that_was_opened_before_the_start_changes_nothing(ada: User) -> None:
    training = a_training(ada)
    opened = Training.objects.get(pk=training.pk)
    opened.target_num_updates = 9
    training_start(training=training, user=training.actor)

    with pytest.raises(IllegalMove, match="nothing was changed"):
        admin.site._registry[Training].save_model(
            RequestFactory().post("/"),
            opened,
            SimpleNamespace(changed_data=["options"]),
            change=True,
        )

    training.refresh_from_db()
    assert (training.target_num_updates, training.state) == (3, TrainingState.ONGOING)


@pytest.mark.parametrize("from_list", [True, False])
def test_a_running_training_is_not_deleted_an_ended_one_is(
    browser: Client, ada: User, from_list: bool
) -> None:
    def delete(training: Training) -> str:
        if from_list:
            return act(browser, Training, "delete_selected", training, post="yes")
        url = page(Training, "delete", training.pk)
        return browser.post(url, {"post": "yes"}, follow=True).content.decode()

    running, waiting = a_training(ada), a_training(ada)
    training_start(training=running, user=running.actor)

    text = delete(running)
    delete(waiting)

    assert "cancel it first" in text
    assert "uccessfully" not in text
    assert not LogEntry.objects.filter(object_id=str(running.pk)).exists()
    assert list(Training.objects.all()) == [running]


def test_a_model_in_use_is_not_deleted_another_is(browser: Client, ada: User) -> None:
    used = a_training(ada).model
    free = a_model(ada)

    for model in (used, free):
        assert browser.get(page(GlobalModel, "delete", model.pk)).status_code == 200
        browser.post(page(GlobalModel, "delete", model.pk), {"post": "yes"})

    assert list(GlobalModel.objects.all()) == [used]
    assert Blob.objects.filter(doomed_at__isnull=False).count() == 1


def test_a_user_is_made_and_changed_with_his_roles(browser: Client) -> None:
    made = {"username": "new", "usable_password": "false", "client": "on"}
    browser.post(page(User, "add"), made)
    user = User.objects.get(username="new")
    assert user.client

    moment = timezone.now() - timedelta(days=1)
    browser.post(
        page(User, "change", user.pk),
        {
            "username": "new",
            "actor": "on",
            "is_active": "on",
            "message_endpoint": "https://site.example/hook",
            "date_joined_0": f"{moment:%Y-%m-%d}",
        },
    )

    user.refresh_from_db()
    assert (user.actor, user.client) == (True, False)
    assert user.message_endpoint == "https://site.example/hook"


# --- people with fewer permissions ------------------------------------------------------------


def staff(*codes: str) -> Client:
    user = User.objects.create(username="staff", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=codes))
    client = Client()
    client.force_login(user)
    return client


def test_of_a_user_with_a_history_the_delete_pages_advise_to_unset_active(
    browser: Client, ada: User
) -> None:
    fresh = site("fresh")
    training_start(training=(training := a_training(ada)), user=training.actor)
    many = {"action": "delete_selected", "_selected_action": [str(ada.pk)]}

    one = browser.get(page(User, "delete", ada.pk)).content.decode()
    several = browser.post(page(User, "changelist"), many).content.decode()
    without = browser.get(page(User, "delete", fresh.pk)).content.decode()
    for user in (ada, fresh):
        browser.post(page(User, "delete", user.pk), {"post": "yes"})

    for text in (one, several):
        assert "unset <em>Active</em>" in text
        assert "ada: " in text
        assert "participants" in text
    assert "Are you sure" in without
    assert "unset <em>Active</em>" not in without
    assert set(User.objects.values_list("username", flat=True)) >= {"ada"}
    assert not User.objects.filter(username="fresh").exists()


@names
def test_titles_say_what_it_is_about(kind: type[Model], browser: Client) -> None:
    one = row(kind, 1)

    title = str(one)

    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}", title)
    if kind in {Round, Task, LocalModel, TrainerEvent, WorkSlice}:
        assert title.startswith("chest x-ray")
        assert ", round 0" in title


@names
def test_staff_without_permissions_sees_nothing(kind: type[Model]) -> None:
    one = row(kind, 1)
    browser = staff()

    assert browser.get(page(kind, "changelist")).status_code == 403
    assert browser.get(page(kind, "change", one.pk)).status_code == 403
    assert page(kind, "changelist") not in browser.get(reverse("admin:index")).content.decode()


def test_who_may_only_look_cannot_act(ada: User) -> None:
    training = a_training(ada)
    token_issue(user=ada)
    browser = staff("view_training", "view_participant", "view_apitoken", "view_user")

    act(browser, Training, "start", training)
    act(browser, Participant, "remove", training.memberships.get())
    act(browser, ApiToken, "revoke", ada.api_tokens.get())
    act(browser, User, "issue_token", ada)

    training.refresh_from_db()
    assert training.state == TrainingState.INITIAL
    assert training.memberships.get().removed_at is None
    assert ada.api_tokens.get().revoked_at is None


def test_a_service_refuses_staff_who_are_not_the_actor(ada: User) -> None:
    training = a_training(ada)
    browser = staff("change_training", "delete_training")

    text = act(browser, Training, "start", training)
    answer = browser.post(page(Training, "delete", training.pk), {"post": "yes"}, follow=True)

    training.refresh_from_db()
    assert "only the actor" in text
    assert "Only the actor" in answer.content.decode()
    assert training.state == TrainingState.INITIAL


def test_staff_cannot_make_themselves_or_become_superusers(root: User) -> None:
    codes = ("add_user", "change_user", "view_user", "add_apitoken", "delete_user")
    browser = staff(*codes)
    me = User.objects.get(username="staff")

    browser.post(
        page(User, "change", me.pk),
        {"username": "staff", "is_active": "on", "is_staff": "on", "is_superuser": "on"},
    )
    password = browser.post(
        reverse("admin:auth_user_password_change", args=[root.pk]),
        {"password1": "correct battery", "password2": "correct battery"},
    )
    deleted = browser.post(page(User, "delete", root.pk), {"post": "yes"})
    from_list = browser.post(
        page(User, "changelist"),
        {"action": "delete_selected", "_selected_action": [str(root.pk)], "post": "yes"},
    )
    text = act(browser, User, "issue_token", root)

    me.refresh_from_db()
    assert not me.is_superuser
    assert me.is_staff
    assert [answer.status_code for answer in (password, deleted, from_list)] == [403, 403, 403]
    assert User.objects.filter(pk=root.pk).exists()
    assert "may not issue" in text
    assert not root.api_tokens.exists()


def test_the_list_of_updates_says_why_one_was_refused(browser: Client) -> None:
    row(LocalModel, 1)
    LocalModel.objects.update(reason="TOO_LARGE: its norm is 7" + " and more" * 100)

    listed = browser.get(page(LocalModel, "changelist")).content.decode()

    assert "TOO_LARGE: its norm is 7 and more" in listed
    assert listed.count("and more") < 20


def test_a_training_without_tests_says_why_it_has_no_metrics() -> None:
    running = scene(skip_model_tests=True)

    assert "skip_model_tests" in overview.curves(running.now)


def test_a_training_that_is_yet_to_be_tested_has_no_metrics_yet() -> None:
    assert overview.curves(scene().now) == "no metrics yet"
