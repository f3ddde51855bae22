from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

from fl_server_api.views.system import livez, readyz

urlpatterns = [
    path("", RedirectView.as_view(url="/api/schema/swagger-ui/")),
    path("livez", livez),
    path("readyz", readyz),
    path("admin/", admin.site.urls),
    path("api/", include("fl_server_api.urls_v1")),
]
handler400 = "fl_server_api.errors.bad_request"
handler404 = "fl_server_api.errors.not_found"
handler500 = "fl_server_api.errors.server_error"
