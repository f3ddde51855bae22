# The server's image: `docker build -t fl-server:local .`
# torch comes as constraints.txt pins it, for the CPU. For CUDA: --build-arg PIP_ARGS="<pip options>"
FROM python:3.11-slim AS build
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fl_server_core fl_server_core
COPY fl_server_ai fl_server_ai
COPY fl_server_api fl_server_api
COPY fl_server fl_server
COPY fl_client fl_client
RUN /venv/bin/pip install -c constraints.txt $PIP_ARGS ".[fast,s3]"

FROM python:3.11-slim
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin fl \
    && install -d -o fl -g fl -m 0750 /data
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    DJANGO_SETTINGS_MODULE=fl_server.settings.production FL_DATA_DIR=/data \
    NUMBA_CACHE_DIR=/tmp/numba
COPY --from=build /venv /venv
WORKDIR /app
COPY manage.py ./
COPY deploy/healthy.py deploy/healthy.py
USER 10001:10001
VOLUME /data
EXPOSE 8000
CMD ["python", "-m", "fl_server.front", "--bind", "0.0.0.0:8000"]
