"""Models: uploading, downloading, deleting, and what belongs to them."""

from collections.abc import Callable
from typing import Any

from django.http import HttpResponseBase
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_ai.services.ensembles import mean_create
from fl_server_ai.services.models import (
    SAFETENSORS,
    model_announce,
    model_prepared,
    weights_for,
    weights_open,
)
from fl_server_ai.services.moments import model_moments, moments_submit
from fl_server_ai.services.preprocessing import PIPELINE, kind_of, preprocessing_upload
from fl_server_ai.services.statistics import model_statistics
from fl_server_ai.services.updates import (
    metrics_submit,
    update_from_upload,
    update_precheck,
    update_submit,
)
from fl_server_api.auth import caller
from fl_server_api.downloads import send, wants_safetensors
from fl_server_api.files import model_file, refuse_over_quota, size_of, staged_of, upload_of
from fl_server_api.idempotency import answered_before, create_once
from fl_server_api.listing import listed, parameters
from fl_server_api.serializers.common import Detail
from fl_server_api.serializers.models import (
    ANY_MODEL,
    GlobalModelOutput,
    LocalModelOutput,
    MetadataOutput,
    MetricOutput,
    MetricsInput,
    ModelCreated,
    ModelInput,
    PreprocessingInput,
    SwagInput,
    UpdateCreated,
    UpdateInput,
)
from fl_server_api.throttling import UPLOADS
from fl_server_api.views.base import View, answers, parsed
from fl_server_core.exceptions import Invalid, NotFound
from fl_server_core.lifecycle import UpdateState
from fl_server_core.models import GlobalModel, LocalModel, ModelVersion
from fl_server_core.selectors import (
    get_visible,
    local_models_visible_to,
    metrics_visible_to,
    models_visible_to,
)
from fl_server_core.services.metrics import metrics_parse
from fl_server_core.services.models import model_delete
from fl_server_core.services.quotas import storage_check, storage_claimed
from fl_server_core.storage import local_path

FILE = {(200, "application/octet-stream"): OpenApiTypes.BINARY}
MODEL_FILTERS = {"name": "name", "type": "type", "owner": "owner"}
METRIC_FILTERS = {
    "key": "key", "step": "step", "reporter": "reporter", "identifier": "identifier",
}  # fmt: skip


class ModelsView(View):
    """All models that one sees."""

    rates = {"POST": UPLOADS}

    @extend_schema(
        operation_id="models_list",
        parameters=parameters(MODEL_FILTERS, ["created_at", "name", "round"]),
        responses=answers({200: ANY_MODEL}, 400, 404),
    )
    def get(self, request: Request) -> Response:
        """Global models, then your own local ones (not in pages); never any bytes."""
        user = caller(request)
        found = listed(
            request,
            models_visible_to(user),
            GlobalModelOutput,
            filters=MODEL_FILTERS,
            ordering=["created_at", "name", "round"],
        )
        if isinstance(found.data, list) and not request.query_params:
            local = local_models_visible_to(user).filter(owner=user)
            found.data = [*found.data, *LocalModelOutput(local, many=True).data]
        return found

    @extend_schema(
        operation_id="models_create",
        request={"multipart/form-data": ModelInput},
        responses=answers({201: ModelCreated}, 400, 404, 409, 415, 422, 507),
    )
    def post(self, request: Request) -> Response:
        """Upload a model: safetensors, .npz, torch.save, TorchScript, torch.export; or an ensemble of some (MEAN)."""
        refuse_over_quota(request)
        body = parsed(ModelInput, request)
        if body["type"] == "MEAN":
            return create_once(request, lambda: _mean(request, body))
        if body.get("initial_weights"):
            return create_once(request, lambda: _announced(request, body))
        remembered = answered_before(request)  # the upload that it was made of is used up by now
        if remembered is not None:
            return remembered
        size = size_of(body, "model_file", "model_preprocessing_file")
        storage_check(user=caller(request), size=size)  # they may have come packed
        preprocessing = body.get("model_preprocessing_file")
        with (
            model_file(request, body) as file,
            model_prepared(
                owner=caller(request),
                name=body["name"],
                description=body["description"],
                model_file=file.staged_path,
                sha256=file.sha256,
                round=body["round"],
                type=body["type"],
                input_shape=body.get("input_shape") or None,
                preprocessing_file=preprocessing.staged_path if preprocessing else None,
            ) as create,
        ):
            return create_once(request, lambda: _created(request, size, create))


def _created(request: Request, size: int, create: Callable[[], GlobalModel]) -> dict[str, str]:
    with storage_claimed(user=caller(request), size=size):  # others of his may have come meanwhile
        return {"detail": "Model Upload Accepted", "model_id": str(create().pk)}


def _announced(request: Request, body: dict[str, Any]) -> dict[str, str]:
    for name in ("model_file", "upload", "model_preprocessing_file"):
        if body.get(name) is not None:
            raise Invalid(f"initial_weights is instead of {name}", code="INITIAL_WEIGHTS")
    model = model_announce(
        owner=caller(request),
        name=body["name"],
        description=body["description"],
        input_shape=body.get("input_shape") or None,
    )
    return {"detail": "Model Announced", "model_id": str(model.pk)}


def _mean(request: Request, body: dict[str, Any]) -> dict[str, str]:
    for name in ("model_file", "model_preprocessing_file"):
        if body.get(name) is not None:
            raise Invalid(f"a MEAN model has no {name}, but models", code="BAD_MEMBERS")
    mean = mean_create(
        owner=caller(request),
        name=body["name"],
        description=body["description"],
        models=body.get("models", []),
        weights=body.get("weights", []),
        input_shape=body.get("input_shape") or None,
    )
    return {"detail": "Model Upload Accepted", "model_id": str(mean.pk)}


class ModelView(View):
    """One model: its weights, and updates of it."""

    rates = {"POST": UPLOADS}

    @extend_schema(
        operation_id="models_download",
        parameters=[
            OpenApiParameter("format", str, enum=["safetensors"]),
            OpenApiParameter(
                "version", str, description="A version's number; the newest if left out."
            ),
        ],
        responses=answers(
            {**FILE, 206: OpenApiTypes.BINARY, 304: None, 416: None}, 400, 404, 409, 422, 507
        ),
    )
    def get(self, request: Request, pk: str) -> HttpResponseBase:
        """The weights, in the container that the model was uploaded in unless safetensors is asked for.

        A participant in a daisy chain gets those that he has to go on from, unless he asks for a version.
        """
        user = caller(request)
        local = _local_or_none(request, pk)
        if local is not None:
            return _send_local(request, local)
        model = get_visible(models_visible_to(user), pk)
        version = request.query_params.get("version")
        blob = _version(model, version).blob if version else weights_for(model=model, user=user)
        container = SAFETENSORS if wants_safetensors(request) else model.container
        with weights_open(model=model, blob=blob, container=container) as file:
            return send(
                request, file.path, etag=file.etag, size=file.size, filename=f"model-{model.pk}.pt"
            )

    @extend_schema(
        operation_id="models_update",
        request={"multipart/form-data": UpdateInput},
        responses=answers(
            {200: UpdateCreated, 201: UpdateCreated}, 400, 404, 409, 415, 422, 503, 507
        ),
    )
    def post(self, request: Request, pk: str) -> Response:
        """Send an update of a running training's model. The same one again answers 200."""
        update_precheck(model_id=pk, user=caller(request))
        body = parsed(UpdateInput, request)
        return submit(request, pk, body, metrics_of(body))

    @extend_schema(operation_id="models_destroy", responses=answers({200: Detail}, 404, 409))
    def delete(self, request: Request, pk: str) -> Response:
        """Delete a model that no training uses."""
        model = get_visible(models_visible_to(caller(request)), pk)
        model_delete(model=model, user=caller(request))
        return Response({"detail": "Model removed"})


def metrics_of(body: dict[str, Any]) -> dict[str, float | bytes]:
    """The metrics of a form."""
    return metrics_parse(names=body["metric_names"], values=body["metric_values"])


def submit(
    request: Request,
    model_id: str,
    body: dict[str, Any],
    metrics: dict[str, float | bytes],
) -> Response:
    """Store an update and say how far the round is."""
    fields = {
        "model_id": model_id,
        "owner": caller(request),
        "round": body["round"],
        "sample_size": body["sample_size"],
        "metrics": metrics,
        "num_steps": body.get("num_steps"),
        "base_version": body.get("base_version"),
        "announced": body.get("sha256", ""),
    }
    upload = upload_of(request, body)
    if upload is not None:
        receipt = update_from_upload(upload=upload, **fields)
    else:
        file = staged_of(body, "model_file")
        receipt = update_submit(file=file.staged_path, sha256=file.sha256, **fields)
    answer = {
        "detail": _become_of(receipt.update),
        "update_id": receipt.update.pk,
        "round": body["round"],
        "received": receipt.received,
        "needed": receipt.needed,
        "deadline": receipt.deadline,
        "state": receipt.update.state,
        "reason": receipt.update.reason,
    }
    return Response(UpdateCreated(answer).data, status=201 if receipt.created else 200)


def _become_of(update: LocalModel) -> str:
    """In words what `state` and `reason` say."""
    if update.state in (UpdateState.REFUSED, UpdateState.QUARANTINED):
        return f"Model Update {update.get_state_display()}: {update.reason}"
    received = update.state == UpdateState.RECEIVED
    return "Model Update Received" if received else "Model Update Accepted"


def _local_or_none(request: Request, pk: str) -> LocalModel | None:
    try:
        return get_visible(local_models_visible_to(caller(request)), pk)
    except NotFound:
        return None


def _send_local(request: Request, local: LocalModel) -> HttpResponseBase:
    if local.blob is None:
        raise NotFound("the file of this update was deleted after its round", code="FILE_DELETED")
    with local_path(local.blob) as path:
        return send(
            request,
            path,
            etag=local.blob.digest,
            size=local.blob.size,
            filename=f"model-{local.pk}.pt",
        )


def _version(model: GlobalModel, wanted: str) -> ModelVersion:
    versions = model.versions.select_related("blob")
    if wanted.isdecimal() and len(wanted) < 10:
        found = versions.filter(number=int(wanted)).first()
        if found is None:
            raise NotFound(f"model {model.pk} has no version {wanted}")
        return found
    return get_visible(versions, wanted)


class ExtrasView(View):
    """What the strategy sends beside the weights."""

    @extend_schema(
        operation_id="models_extras",
        parameters=[OpenApiParameter("version", str, description="A version's number or id.")],
        responses=answers({**FILE, 204: None, 206: OpenApiTypes.BINARY, 304: None, 416: None}, 404),
    )
    def get(self, request: Request, pk: str) -> HttpResponseBase:
        """A safetensors file of tensors `extra.<namespace>.<name>.<tensor>`, such as control variates.

        204 without a body where there is nothing: most strategies, and all before the first aggregation.
        """
        model = get_visible(models_visible_to(caller(request)), pk)
        version = request.query_params.get("version")
        found = _version(model, version) if version else model.weights
        if found.shared is None:
            return Response(status=204)
        with local_path(found.shared) as path:
            return send(
                request,
                path,
                etag=found.shared.digest,
                size=found.shared.size,
                filename=f"extras-{model.pk}.safetensors",
            )


class MetadataView(View):
    """What is known about a model."""

    @extend_schema(operation_id="models_metadata", responses=answers({200: MetadataOutput}, 404))
    def get(self, request: Request, pk: str) -> Response:
        """The model's fields and `stats`: parameters, sizes and multiply-adds per layer.

        Those of a program are counted by a worker when somebody first asks: ask again while `stats_state` is pending.
        """
        user = caller(request)
        local = _local_or_none(request, pk)
        model = local.training.model if local else get_visible(models_visible_to(user), pk)
        found = model_statistics(model=model, user=user)
        fields = (LocalModelOutput(local) if local else GlobalModelOutput(model)).data
        told = {"stats": found.stats, "stats_state": found.state, "stats_error": found.error}
        return Response({**fields, **told})


class MetricsView(View):
    """A model's metrics."""

    rates = {"POST": UPLOADS}

    @extend_schema(
        operation_id="metrics_list",
        parameters=parameters(METRIC_FILTERS, ["step", "key", "id"]),
        responses=answers({200: MetricOutput(many=True)}, 400, 404),
    )
    def get(self, request: Request, pk: str) -> Response:
        """Metrics of a global model, or of one update."""
        user = caller(request)
        local = _local_or_none(request, pk)
        if local is not None:
            rows = metrics_visible_to(user).filter(local_model=local)
        else:
            model = get_visible(models_visible_to(user), pk)
            rows = metrics_visible_to(user).filter(model=model, local_model=None)
        return listed(
            request, rows, MetricOutput, filters=METRIC_FILTERS, ordering=["step", "key", "id"]
        )

    @extend_schema(
        operation_id="metrics_create",
        request={"multipart/form-data": MetricsInput, "application/json": MetricsInput},
        responses=answers({201: ModelCreated}, 400, 404, 409, 415),
    )
    def post(self, request: Request, pk: str) -> Response:
        """Send what you measured on the current global model; in a test round that ends your part."""
        get_visible(models_visible_to(caller(request)), pk)
        body = parsed(MetricsInput, request)
        metrics = metrics_of(body)
        if not metrics:
            raise Invalid("metric_names and metric_values are missing", code="FIELD_REQUIRED")
        model = metrics_submit(
            model_id=pk,
            reporter=caller(request),
            metrics=metrics,
            sample_size=body.get("sample_size"),
            round=body.get("round"),
        )
        return Response({"detail": "Model Metrics Accepted", "model_id": model.pk}, status=201)


class PreprocessingView(View):
    """What has to be done to inputs before the model sees them."""

    rates = {"POST": UPLOADS}

    @extend_schema(operation_id="preprocessing_download", responses=answers(FILE, 404))
    def get(self, request: Request, pk: str) -> HttpResponseBase:
        """The preprocessing as it is stored: a pipeline as canonical JSON, other files as they were uploaded.

        A local model has its global model's.
        """
        local = _local_or_none(request, pk)
        wanted = local.training.model_id if local else pk
        model = get_visible(models_visible_to(caller(request)), wanted)
        blob = model.preprocessing
        if blob is None:
            raise NotFound("this model has no preprocessing", code="NO_PREPROCESSING")
        with local_path(blob) as path:
            suffix = "json" if kind_of(blob) == PIPELINE else "pt"
            name = f"model-{model.pk}-preprocessing.{suffix}"
            return send(request, path, etag=blob.digest, size=blob.size, filename=name)

    @extend_schema(
        operation_id="preprocessing_upload",
        request={"multipart/form-data": PreprocessingInput},
        responses=answers({202: Detail}, 400, 404, 409, 415, 422, 507),
    )
    def post(self, request: Request, pk: str) -> Response:
        """Replace the preprocessing: a JSON pipeline, torchvision's v2 transforms, or a TorchScript module.

        It is applied to whatever the model is asked with. Transforms (`torch.save` or pickle of a `v2.Compose`)
        are translated to a pipeline, never unpickled.
        """
        model = get_visible(models_visible_to(caller(request)), pk)
        refuse_over_quota(request)
        file = parsed(PreprocessingInput, request)["model_preprocessing_file"]
        preprocessing_upload(model=model, user=caller(request), file=file.staged_path)
        return Response({"detail": "Preprocessing Upload Accepted"}, status=202)


MOMENTS = ("first", "second", "deviations")


class SwagView(View):
    """First and second moments of a model's weights, and deviations from their mean (arXiv:1902.02476)."""

    rates = {"POST": UPLOADS}

    @extend_schema(
        operation_id="swag_download",
        parameters=[OpenApiParameter("moment", str, enum=MOMENTS, required=True)],
        responses=answers({**FILE, 206: OpenApiTypes.BINARY, 304: None, 416: None}, 400, 404),
    )
    def get(self, request: Request, pk: str) -> HttpResponseBase:
        """The combined moments of the newest SWAG round, as float64 safetensors; deviations as float32."""
        model = get_visible(models_visible_to(caller(request)), pk)
        wanted = request.query_params.get("moment", "")
        if wanted not in MOMENTS:
            raise Invalid(f"moment is one of {', '.join(MOMENTS)}", code="BAD_MOMENT")
        found = model_moments(model)
        if found is None:
            raise NotFound("no SWAG round of this model has ended yet", code="NO_MOMENTS")
        blob = getattr(found, wanted)
        if blob is None:
            raise NotFound(
                "the newest SWAG round has no deviations; options.swag_rank asks for them",
                code="NO_DEVIATIONS",
            )
        with local_path(blob) as path:
            kind = wanted if wanted == "deviations" else f"{wanted}-moment"
            name = f"model-{model.pk}-{kind}.safetensors"
            return send(request, path, etag=blob.digest, size=blob.size, filename=name)

    @extend_schema(
        operation_id="swag_upload",
        request={"multipart/form-data": SwagInput},
        responses=answers({200: Detail, 201: Detail}, 400, 404, 409, 415, 422, 507),
    )
    def post(self, request: Request, pk: str) -> Response:
        """Send your moments in a SWAG round. The same ones again answer 200."""
        update_precheck(model_id=pk, user=caller(request))
        body = parsed(SwagInput, request)
        deviations = body.get("deviations_file")
        _, created = moments_submit(
            model_id=pk,
            owner=caller(request),
            round=body["round"],
            sample_size=body["sample_size"],
            first=body["first_moment_file"].staged_path,
            second=body["second_moment_file"].staged_path,
            deviations=deviations.staged_path if deviations else None,
        )
        return Response({"detail": "SWAg Statistics Accepted"}, status=201 if created else 200)
