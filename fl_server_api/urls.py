"""Every route of the wire contract that is there today."""

from django.urls import path, re_path
from drf_spectacular.views import (
    SpectacularAPIView,
    SpectacularRedocView,
    SpectacularSwaggerView,
)

from fl_server_api import errors
from fl_server_api.views import (
    calibration,
    clients,
    inference,
    models,
    system,
    tasks,
    trainings,
    uploads,
    users,
)

urlpatterns = [
    path("", system.IndexView.as_view()),
    path("users/", users.UsersView.as_view()),
    path("users/myself/", users.MyselfView.as_view()),
    path("users/myself/tokens/", users.TokensView.as_view()),
    path("users/myself/tokens/<str:pk>/", users.TokenView.as_view()),
    path("users/myself/webhook-secret/", users.WebhookSecretView.as_view()),
    path("users/groups/", users.MyGroupsView.as_view()),
    path("users/trainings/", users.MyTrainingsView.as_view()),
    path("users/<str:pk>/", users.UserView.as_view()),
    path("groups/", users.GroupsView.as_view()),
    path("groups/<str:pk>/", users.GroupView.as_view()),
    path("models/", models.ModelsView.as_view()),
    path("models/<str:pk>/", models.ModelView.as_view()),
    path("models/<str:pk>/metadata/", models.MetadataView.as_view()),
    path("models/<str:pk>/calibration/", calibration.CalibrationsView.as_view()),
    path("models/<str:pk>/metrics/", models.MetricsView.as_view()),
    path("models/<str:pk>/preprocessing/", models.PreprocessingView.as_view()),
    path("models/<str:pk>/swag/", models.SwagView.as_view()),
    path("trainings/", trainings.TrainingsView.as_view()),
    path("trainings/<str:pk>/", trainings.TrainingView.as_view()),
    path("trainings/<str:pk>/clients/", trainings.TrainingClientsView.as_view()),
    path("trainings/<str:pk>/start/", trainings.TrainingStartView.as_view()),
    path("trainings/<str:pk>/models/", trainings.TrainingModelsView.as_view()),
    path("trainings/<str:pk>/models/latest/", trainings.TrainingLatestModelsView.as_view()),
    path("trainings/<str:pk>/rounds/", trainings.TrainingRoundsView.as_view()),
    path("clients/me/join/", clients.JoinView.as_view()),
    path("tasks/", tasks.TasksView.as_view()),
    path("tasks/<str:pk>/progress/", tasks.TaskProgressView.as_view()),
    path("tasks/<str:pk>/failure/", tasks.TaskFailureView.as_view()),
    path("tasks/<str:pk>/result/", tasks.TaskResultView.as_view()),
    path("uploads/", uploads.UploadsView.as_view()),
    path("uploads/<str:pk>/", uploads.UploadView.as_view()),
    path("inference/", inference.InferencesView.as_view()),
    path("inference/<str:pk>/", inference.InferenceView.as_view()),
    path("calibrations/<str:pk>/", calibration.CalibrationView.as_view()),
    path("aggregators/", system.AggregatorsView.as_view()),
    path("uncertainty-methods/", inference.MethodsView.as_view()),
    path("schema/", SpectacularAPIView.as_view(), name="schema"),
    path("schema/swagger-ui/", SpectacularSwaggerView.as_view(url_name="schema"), name="swagger"),
    path(
        "schema/redoc/",
        SpectacularRedocView.as_view(url_name="schema", template_name="fl_server_api/redoc.html"),
        name="redoc",
    ),
    re_path(r"^.*$", errors.not_found),
]
