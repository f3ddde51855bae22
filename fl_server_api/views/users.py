"""Users, their tokens, and groups."""

from typing import Any

from django.conf import settings
from django.contrib.auth.models import Group
from django.db import IntegrityError, transaction
from drf_spectacular.utils import extend_schema
from rest_framework.permissions import AllowAny
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_api.auth import caller
from fl_server_api.idempotency import create_once, once
from fl_server_api.listing import listed, parameters
from fl_server_api.serializers.trainings import TrainingOutput
from fl_server_api.serializers.users import (
    GroupInput,
    GroupOutput,
    RegistrationInput,
    RegistrationOutput,
    TokenInput,
    TokenOutput,
    TokenSecret,
    UserOutput,
    WebhookSecret,
)
from fl_server_api.throttling import REGISTRATIONS, TOKENS
from fl_server_api.views.base import View, answers, parsed
from fl_server_core.exceptions import Invalid, NotPermitted
from fl_server_core.models import ApiToken, User
from fl_server_core.selectors import (
    get_visible,
    groups_visible_to,
    is_admin,
    trainings_visible_to,
    users_visible_to,
    with_gaps,
)
from fl_server_core.services.tokens import (
    token_create,
    token_issue,
    token_rekey,
    token_revoke,
    webhook_secret,
)
from fl_server_core.services.users import user_prepare, user_register

USER_FILTERS = {"username": "username"}


class UsersView(View):
    """Registering and finding users."""

    rates = {"POST": REGISTRATIONS}

    def get_permissions(self) -> list[Any]:
        if self.request.method == "POST":
            return [AllowAny()]
        return list(super().get_permissions())

    @extend_schema(
        operation_id="users_list",
        parameters=parameters(USER_FILTERS),
        responses=answers({200: UserOutput(many=True)}, 400, 404),
    )
    def get(self, request: Request) -> Response:
        """Yourself, and the clients that you may invite if you are an actor."""
        return listed(request, users_visible_to(caller(request)), UserOutput, filters=USER_FILTERS)

    @extend_schema(
        operation_id="users_register",
        request=RegistrationInput,
        responses=answers({201: RegistrationOutput}, 400, 409, 415),
    )
    def post(self, request: Request) -> Response:
        """Register; the token and the webhook secret are shown this once."""
        admin = isinstance(request.user, User) and is_admin(request.user)
        if not settings.FL_OPEN_REGISTRATION and not admin:
            raise NotPermitted(
                "registration is closed here; ask the admin for an account",
                code="REGISTRATION_CLOSED",
            )
        prepared = user_prepare(**parsed(RegistrationInput, request))

        def act() -> dict[str, Any]:
            with transaction.atomic():
                user = user_register(prepared)
                secrets = {
                    "token": token_issue(user=user, label="registration"),
                    "webhook_secret": webhook_secret(user=user),
                }
            shown = UserOutput(user, context={"request": request}).data
            own = {"email": user.email, "message_endpoint": user.message_endpoint}
            return {**shown, **own, "id": str(user.pk), **secrets}

        return create_once(request, act, secret=frozenset({"token", "webhook_secret"}))


class MyselfView(View):
    """The one who asks."""

    @extend_schema(operation_id="users_myself", responses=answers({200: UserOutput}))
    def get(self, request: Request) -> Response:
        """Who you are here."""
        return Response(UserOutput(caller(request), context={"request": request}).data)


class UserView(View):
    """One user."""

    @extend_schema(operation_id="users_retrieve", responses=answers({200: UserOutput}, 404))
    def get(self, request: Request, pk: str) -> Response:
        """A user that you may see."""
        user = get_visible(users_visible_to(caller(request)), pk)
        return Response(UserOutput(user, context={"request": request}).data)


class MyGroupsView(View):
    """One's own groups."""

    @extend_schema(
        operation_id="users_groups",
        parameters=parameters({}),
        responses=answers({200: GroupOutput(many=True)}, 400, 404),
    )
    def get(self, request: Request) -> Response:
        """The groups that you are in."""
        return listed(request, caller(request).groups.order_by("id"), GroupOutput)


class MyTrainingsView(View):
    """One's own trainings."""

    @extend_schema(
        operation_id="users_trainings",
        parameters=parameters({}),
        responses=answers({200: TrainingOutput(many=True)}, 400, 404),
    )
    def get(self, request: Request) -> Response:
        """The trainings that you started or take part in."""
        rows = with_gaps(trainings_visible_to(caller(request)))
        rows = rows.select_related("model__current_version").prefetch_related("memberships")
        return listed(request, rows, TrainingOutput)


class TokensView(View):
    """One's own tokens."""

    rates = {"POST": TOKENS}

    @extend_schema(
        operation_id="tokens_list",
        parameters=parameters({}),
        responses=answers({200: TokenOutput(many=True)}, 400, 404),
    )
    def get(self, request: Request) -> Response:
        """Your tokens, without their keys."""
        return listed(request, caller(request).api_tokens.order_by("id"), TokenOutput)

    @extend_schema(
        operation_id="tokens_create",
        request=TokenInput,
        responses=answers({201: TokenSecret}, 400, 409, 415),
    )
    def post(self, request: Request) -> Response:
        """Make a token; its key is shown this once.

        Asked again with the same `Idempotency-Key`, because the answer was lost, the same token gets another key.
        """
        body = parsed(TokenInput, request)

        def act() -> dict[str, Any]:
            token, key = token_create(user=caller(request), **body)
            return {"id": token.pk, "token": key}

        made = once(request, act, secret=frozenset({"token"}))
        key = made["token"] if "token" in made else token_rekey(pk=made["id"])
        return Response({"id": made["id"], "token": key}, status=201)


class TokenView(View):
    """One token."""

    @extend_schema(operation_id="tokens_revoke", responses=answers({204: None}, 404))
    def delete(self, request: Request, pk: str) -> Response:
        """Revoke a token, at once and for good."""
        own = ApiToken.objects.filter(user=caller(request))
        token_revoke(token=get_visible(own, pk))
        return Response(status=204)


class WebhookSecretView(View):
    """What messages to oneself are signed with."""

    @extend_schema(
        operation_id="users_webhook_secret", request=None, responses=answers({200: WebhookSecret})
    )
    def post(self, request: Request) -> Response:
        """The secret that your webhook messages are signed with; the same at every call."""
        return Response({"webhook_secret": webhook_secret(user=caller(request))})


class GroupsView(View):
    """Groups that one is in."""

    @extend_schema(
        operation_id="groups_list",
        parameters=parameters({}),
        responses=answers({200: GroupOutput(many=True)}, 400, 404),
    )
    def get(self, request: Request) -> Response:
        """Your groups; all of them if you are an admin."""
        return listed(request, groups_visible_to(caller(request)), GroupOutput)

    @extend_schema(
        operation_id="groups_create",
        request=GroupInput,
        responses=answers({201: GroupOutput}, 400, 409, 415),
    )
    def post(self, request: Request) -> Response:
        """Create a group; you are in it."""
        name = parsed(GroupInput, request)["name"]

        def act() -> dict[str, Any]:
            with transaction.atomic():
                group = _named(Group(), name)
                group.user_set.add(caller(request))
            return GroupOutput(group).data

        return create_once(request, act)


class GroupView(View):
    """One group: for those who are in it to see, for admins to change."""

    def _group(self, request: Request, pk: str) -> Group:
        return get_visible(groups_visible_to(caller(request)), pk)

    def _own(self, request: Request, pk: str) -> Group:
        """Groups carry permissions, and nobody is noted as their owner: only admins change them."""
        group = self._group(request, pk)
        if not is_admin(caller(request)):
            raise NotPermitted("only an admin may rename or delete a group", code="ADMIN_ONLY")
        return group

    @extend_schema(operation_id="groups_retrieve", responses=answers({200: GroupOutput}, 404))
    def get(self, request: Request, pk: str) -> Response:
        """A group."""
        return Response(GroupOutput(self._group(request, pk)).data)

    @extend_schema(
        operation_id="groups_update",
        request=GroupInput,
        responses=answers({200: GroupOutput}, 400, 404, 415),
    )
    def put(self, request: Request, pk: str) -> Response:
        """Rename a group; for admins."""
        group = self._own(request, pk)
        return Response(GroupOutput(_named(group, parsed(GroupInput, request)["name"])).data)

    @extend_schema(
        operation_id="groups_partial_update",
        request=GroupInput,
        responses=answers({200: GroupOutput}, 400, 404, 415),
    )
    def patch(self, request: Request, pk: str) -> Response:
        """Rename a group; for admins."""
        return self.put(request, pk)

    @extend_schema(operation_id="groups_destroy", responses=answers({204: None}, 404))
    def delete(self, request: Request, pk: str) -> Response:
        """Delete a group; for admins."""
        self._own(request, pk).delete()
        return Response(status=204)


def _named(group: Group, name: str) -> Group:
    group.name = name
    try:
        with transaction.atomic():
            group.save()
    except IntegrityError as error:
        raise Invalid(
            f"there is a group {name!r} already",
            code="NAME_TAKEN",
            errors=[{"pointer": "/name", "code": "unique", "detail": "this name is taken"}],
        ) from error
    return group
