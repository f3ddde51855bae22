"""Joining in: a client says what it is and has, before anything is trained."""

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_ai.services.joining import client_join
from fl_server_api.auth import caller
from fl_server_api.serializers.clients import JoinInput, JoinOutput
from fl_server_api.views.base import MIN_PROTOCOL, View, answers, parsed


class JoinView(View):
    """What a client says about itself."""

    @extend_schema(
        operation_id="clients_join",
        request={"application/json": JoinInput},
        responses=answers({200: JoinOutput}, 400, 415),
    )
    def post(self, request: Request) -> Response:
        """Say what you can do and have; learn what your trainings still require of you."""
        user = caller(request)
        missing = client_join(user=user, **parsed(JoinInput, request))
        answer = {"client": user.pk, "missing": missing, "min_protocol": MIN_PROTOCOL}
        return Response(JoinOutput(answer).data)
