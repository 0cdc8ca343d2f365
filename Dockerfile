# The verifier in an image. Every step is a script of the repository, so that what happens here is tested without Docker.
#
#   docker build -t verifier .                             # CUDA (also runs without a GPU)
#   docker build -t verifier:cpu --build-arg VARIANT=cpu . # CPU only, much smaller
#   docker run --rm -v "$PWD:/data" -w /data verifier verify --onnx net.onnx --vnnlib prop.vnnlib
#   docker run --rm --gpus all ... verifier run_instance.sh v1 CATEGORY net.onnx prop.vnnlib results.txt 60
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG VARIANT=cuda
WORKDIR /opt/verifier
COPY . .
ENV ORT_DISABLE_TELEMETRY=1 VERIFIER_PYTHON=/opt/venv/bin/python PATH=/opt/venv/bin:$PATH
RUN scripts/image.sh "$VARIANT" /opt/venv

ENTRYPOINT ["/opt/verifier/scripts/entrypoint.sh"]
CMD ["--help"]
