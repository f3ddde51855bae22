"""Resumable uploads, as people see them."""

from rest_framework import serializers

from fl_server_core.models import Upload
from fl_server_core.services.parts import Parts


class UploadOutput(serializers.ModelSerializer[Upload]):
    offset = serializers.SerializerMethodField(help_text="Bytes that are here.")

    class Meta:
        model = Upload
        fields = [
            "id", "length", "offset", "sha256", "finished_at", "used_at", "created_at", "expires_at",
        ]  # fmt: skip

    def get_offset(self, upload: Upload) -> int:
        return upload.length if upload.used_at else Parts(upload.pk).size()
