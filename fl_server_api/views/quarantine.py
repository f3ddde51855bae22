"""Updates in quarantine: a person lets them count, or gives them up."""

from collections.abc import Callable

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_ai.services.quarantine import update_refuse, update_release
from fl_server_api.auth import caller
from fl_server_api.serializers.models import LocalModelOutput
from fl_server_api.views.base import View, answers
from fl_server_core.models import LocalModel
from fl_server_core.selectors import get_visible, local_models_visible_to

DECIDED = answers({200: LocalModelOutput}, 404, 409)


def _decide(request: Request, pk: str, act: Callable[..., LocalModel]) -> Response:
    user = caller(request)
    update = act(update=get_visible(local_models_visible_to(user), pk), user=user)
    return Response(LocalModelOutput(update).data)


class UpdateReleaseView(View):
    """The way out of quarantine."""

    @extend_schema(operation_id="updates_release", request=None, responses=DECIDED)
    def post(self, request: Request, pk: str) -> Response:
        """Let a quarantined update count, if its round still collects (or failed, and is retried then)."""
        return _decide(request, pk, update_release)


class UpdateRefuseView(View):
    """The end of an update."""

    @extend_schema(operation_id="updates_refuse", request=None, responses=DECIDED)
    def post(self, request: Request, pk: str) -> Response:
        """Give a quarantined update up for good; its files are deleted."""
        return _decide(request, pk, update_refuse)
